"""What `vopd-client info` and `vopd-client score` show, from a real teacher of a tiny model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from teacher_process import RunningTeacher, start_teacher
from tiny_model import tiny_tokenizer
from vopd_client.command_config import InfoConfig, ScoreConfig
from vopd_client.errors import ConfigError, TeacherUnavailableError
from vopd_client.scored_text import Alternative, ScoredText, ScoredToken, score_text, token_text
from vopd_client.show import render_scores, show_info, show_scores, visible
from vopd_client.teacher import RemoteTeacher
from vopd_client.types import SequenceToScore


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[RunningTeacher]:
    with start_teacher(tiny_model_dir) as running:
        yield running


def console() -> tuple[Console, StringIO]:
    screen = StringIO()
    return Console(file=screen, width=120), screen


def shown(renderable: object) -> str:
    terminal, screen = console()
    terminal.print(renderable)
    return screen.getvalue()


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        (" a b", "·a·b"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("\x00\x1b[31m", "\\x00\\x1b[31m"),
        ("é漢", "é漢"),
        ("\u200b", "\\u200b"),
    ],
)
def test_every_token_shows_on_one_line(text, sign):
    assert visible(text) == sign


def test_tokens_read_as_text_and_those_that_are_no_whole_characters_as_they_are():
    tokenizer = tiny_tokenizer().backend_tokenizer
    ids = {text: tokenizer.encode(text).ids for text in ("a", " ", "é")}
    assert token_text(tokenizer, ids["a"][0]) == "a"
    assert token_text(tokenizer, ids[" "][0]) == " "
    assert token_text(tokenizer, ids["é"][0]) == "Ã"
    assert token_text(tokenizer, tokenizer.token_to_id("<|end|>")) == "<|end|>"
    assert token_text(tokenizer, 5000) == "<5000>"


def test_totals_add_up():
    tokens = tuple(ScoredToken(index, "x", logprob, ()) for index, logprob in enumerate((-1.0, -2.0, -3.0)))
    scored = ScoredText("m", 4, tokens, bytes_sent=30, bytes_received=60)
    assert (scored.sum_nats, scored.mean_nats, scored.bytes_per_token) == (-6.0, -2.0, 30.0)
    assert scored.perplexity == pytest.approx(math.exp(2))
    assert shown(render_scores(scored)).splitlines()[-1] == (
        "3 tokens after 4 of context   sum -6.000 nats   mean -2.000   perplexity 7.39   30 bytes a token on the wire"
    )


def test_markup_in_a_token_is_text():
    scored = ScoredText("m", 1, (ScoredToken(0, "[red]", -1.0, ()),), 0, 0)
    assert "[red]" in shown(render_scores(scored))


def test_a_narrow_terminal_cuts_alternatives_and_never_numbers():
    alternatives = tuple(Alternative("alternative", -index - 0.5) for index in range(9))
    scored = ScoredText("m", 1, (ScoredToken(0, "<|im_end|>", -12.345, alternatives),), 0, 0)
    screen = StringIO()
    Console(file=screen, width=60).print(render_scores(scored))
    row = screen.getvalue().splitlines()[3]
    assert row.split()[:2] == ["<|im_end|>", "-12.345"]
    assert "<0.01%" in row
    assert row.rstrip().endswith("…")


def test_an_empty_completion_is_said_to_be_one():
    assert "nothing to score" in shown(render_scores(ScoredText("m", 1, (), 0, 0)))


# ---------------------------------------------------------------- a real teacher


def test_a_text_is_scored_token_by_token_as_its_ids_are(server: RunningTeacher):
    with RemoteTeacher.connect(server.url) as teacher:
        scored = score_text(teacher, "Hello", " wé", top=3)
        encode = tiny_tokenizer().encode
        [by_ids] = teacher.score([SequenceToScore(np.array(encode("Hello")), np.array(encode(" wé")))])
    assert [token.text for token in scored.tokens] == [" ", "w", "Ã", "©"]
    assert scored.num_context_tokens == 5
    np.testing.assert_allclose([token.logprob_nats for token in scored.tokens], by_ids.sampled_logprobs_T, atol=1e-5)
    for token in scored.tokens:
        alternatives = [alternative.logprob_nats for alternative in token.alternatives]
        assert len(alternatives) == 3
        assert alternatives == sorted(alternatives, reverse=True)
        assert alternatives[0] >= token.logprob_nats - 1e-5
    assert scored.bytes_sent > 0
    assert scored.bytes_received > 0


def test_a_chat_is_rendered_with_the_teachers_template(server: RunningTeacher):
    with RemoteTeacher.connect(server.url) as teacher:
        chat = score_text(teacher, "Hi", "yes", top=0, chat=True)
        plain = score_text(teacher, "<|start|>user\nHi<|end|><|start|>assistant\n", "yes", top=0)
    assert chat.num_context_tokens == plain.num_context_tokens == 1 + 5 + 2 + 1 + 1 + 10
    assert [t.logprob_nats for t in chat.tokens] == pytest.approx([t.logprob_nats for t in plain.tokens], abs=1e-5)


def test_a_prompt_without_tokens_is_refused(server: RunningTeacher):
    with RemoteTeacher.connect(server.url) as teacher, pytest.raises(ConfigError, match="at least one"):
        score_text(teacher, "", "yes")


def test_info_shows_what_matters(server: RunningTeacher):
    terminal, screen = console()
    show_info(InfoConfig(teacher_url=[server.url]), terminal)
    text = screen.getvalue()
    for part in (server.url, "transformers", "259 tokens", "its own top-k", "at most 259 ids", "temperature", "any"):
        assert part in text
    assert "not given away (vopd-server serve --allow-full-vocab" in text


def test_info_shows_which_replicas_are_there(server: RunningTeacher):
    terminal, screen = console()
    show_info(InfoConfig(teacher_url=[server.url, "grpc://127.0.0.1:1", server.http_url]), terminal)
    text = screen.getvalue()
    assert "grpc://127.0.0.1:1  missing: connection refused" in text
    assert f"{server.url}  connected, and scores alike" in text
    assert f"{server.http_url}  connected, and scores alike" in text


def test_info_shows_that_the_head_is_offered(tiny_model_dir: Path):
    terminal, screen = console()
    with start_teacher(tiny_model_dir, "--allow-full-vocab") as running:
        show_info(InfoConfig(teacher_url=[running.url]), terminal)
        with RemoteTeacher.connect(running.url) as teacher:
            sha256 = teacher.info.head_sha256
    assert f"hidden states and the output head, SHA-256 {sha256[:16]}" in screen.getvalue()


def test_scores_show_every_token_with_its_alternatives(server: RunningTeacher):
    terminal, screen = console()
    config = ScoreConfig(teacher_url=[server.url], prompt="Hello", completion=" w\n", top=2, temperature=0.5)
    show_scores(config, terminal)
    lines = screen.getvalue().splitlines()
    assert "the teacher would rather say" in lines[1]
    assert [line.split()[0] for line in lines[3:6]] == ["·", "w", "⏎"]
    assert all("%" in line for line in lines[3:6])
    assert "3 tokens after 5 of context" in screen.getvalue()


def test_without_alternatives_there_is_no_column_for_them(server: RunningTeacher):
    terminal, screen = console()
    show_scores(ScoreConfig(teacher_url=[server.url], prompt="Hello", completion="w", top=0), terminal)
    assert "rather" not in screen.getvalue()


def test_a_teacher_that_is_not_there_is_said_to_be_gone():
    config = InfoConfig(teacher_url=["grpc://127.0.0.1:1"], teacher_timeout_s=0.5)
    with pytest.raises(TeacherUnavailableError, match="connection refused"):
        show_info(config, console()[0])
