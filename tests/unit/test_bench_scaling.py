"""What `make bench-scaling` plays, how it searches, and how its figures reach picture and page."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import performance_tables
import scaling_memory
from capacity_check import check
from performance_tables import filled, section_names
from scaling_memory import MemoryProbe, Probe, largest_within
from scaling_models import resized_rows, with_longest_context, with_vocabulary
from scaling_plots import write_picture
from scaling_points import BASE, Point, curves, distinct_points, round_of
from scaling_report import Measured, growth, medians
from scaling_rounds import Rounds
from scaling_teacher import WatchedTeacher, status_bytes
from vopd_client.types import Candidates, TeacherTopK

# ---------------------------------------------------------------- points


def test_a_curve_changes_one_variable_and_passes_through_the_base() -> None:
    for curve in curves():
        fixed = [{**asdict(point), curve.axis: None, "support": None} for point in curve.points]
        assert fixed == [fixed[0]] * len(fixed)
        assert replace(BASE, support=curve.support) in curve.points
        assert sorted({curve.value(point) for point in curve.points}) == [curve.value(point) for point in curve.points]


def test_every_variable_has_a_curve_and_k_one_a_support() -> None:
    assert [curve.name for curve in curves()] == [
        "context",
        "completion",
        "k (candidates)",
        "k (teacher_top_k)",
        "group",
        "concurrency",
        "vocabulary",
    ]


def test_the_base_is_measured_once_a_pass() -> None:
    points = distinct_points(curves())
    assert points.count(BASE) == 1
    assert set(points) == {point for curve in curves() for point in curve.points}


def test_a_round_is_whole_groups_of_fresh_ids() -> None:
    point = replace(BASE, context=7, completion=3, k=5, group=2, concurrency=4, vocabulary=50)
    first, second = (list(round_of(point, rng)) for rng in [np.random.default_rng(0)] for _ in range(2))
    assert len(first) == 4
    contexts = [sequence.context_ids for sequence in first]
    assert [np.array_equal(context, contexts[0]) for context in contexts] == [True, True, False, False]
    for sequence in (*first, *second):
        assert (len(sequence.context_ids), len(sequence.completion_ids)) == (7, 3)
        assert isinstance(sequence.support, Candidates)
        assert (len(sequence.support.ids), list(sequence.support.counts_T)) == (15, [5, 5, 5])
        assert max(*sequence.context_ids, *sequence.completion_ids, *sequence.support.ids) < 50
    assert not np.array_equal(first[0].context_ids, second[0].context_ids)


def test_a_group_larger_than_what_may_be_outstanding_is_still_whole() -> None:
    point = replace(BASE, context=2, completion=2, k=1, group=8, concurrency=2, support="teacher_top_k")
    sequences = list(round_of(point, np.random.default_rng(0)))
    assert len(sequences) == point.sequences_a_round == 8
    assert (point.sharing, point.tokens_a_round) == (2, 16)
    assert all(sequence.support == TeacherTopK(1) for sequence in sequences)


# ---------------------------------------------------------------- the largest request

A_TOKEN = 1000


class FakeTeacher:
    """Needs `A_TOKEN` bytes a token and a microsecond for each pair of tokens."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, tokens: int) -> Probe:
        self.asked.append(tokens)
        return Probe(tokens, A_TOKEN * tokens, 1e-6 * tokens**2)


def largest(teacher: FakeTeacher, budget_tokens: int, *, longest: int = 100_000, slowest_s: float = 1e9) -> Any:
    return largest_within(
        teacher,
        budget_bytes=budget_tokens * A_TOKEN,
        shortest_tokens=512,
        longest_tokens=longest,
        slowest_s=slowest_s,
    )


@pytest.mark.parametrize("budget_tokens", [512, 700, 5_000, 8_191, 8_192, 33_333])
def test_the_largest_keeps_the_budget_and_little_more_would_not(budget_tokens: int) -> None:
    teacher = FakeTeacher()
    found = largest(teacher, budget_tokens)
    assert found.limited_by == "memory"
    assert found.found.tokens <= budget_tokens < max(1.05 * found.found.tokens, found.found.tokens + 64)
    assert [probe.tokens for probe in found.probes] == teacher.asked
    assert len(teacher.asked) < 16


def test_a_budget_that_nothing_keeps_has_no_largest() -> None:
    found = largest(FakeTeacher(), 511)
    assert found.found is None
    assert len(found.probes) == 1


def test_the_search_ends_at_the_longest_sequence() -> None:
    found = largest(FakeTeacher(), 50_000, longest=3000)
    assert (found.limited_by, found.found.tokens) == ("length", 3000)


def test_the_search_begins_nothing_that_takes_too_long() -> None:
    teacher = FakeTeacher()
    found = largest(teacher, 50_000, slowest_s=5.0)
    assert (found.limited_by, found.found.tokens) == ("time", 2048)  # 4096 squared is 16.8 s
    assert max(teacher.asked) == 2048


def test_a_smaller_request_after_a_larger_one_gets_a_new_teacher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[Any] = []

    class Watched(WatchedTeacher):
        def forget_peak(self) -> None:
            events.append("forget")

        def peak_bytes(self) -> int:
            return 7

    @contextmanager
    def started(model: Path, log_path: Path) -> Any:
        events.append("start")
        yield Watched(0, "grpc://nowhere:1")
        events.append("end")

    async def played(url: str, point: Point, rng: object, least_s: float) -> Rounds:
        events.append((point.context, point.completion))
        return Rounds(1.0, 1, 0, 0)

    monkeypatch.setattr(scaling_memory, "watched_teacher", started)
    monkeypatch.setattr(scaling_memory, "play", played)
    with asyncio.Runner() as runner, MemoryProbe(tmp_path, tmp_path, replace(BASE, context=100), runner) as probe:
        for tokens in (200, 400, 300, 350):
            assert probe(tokens).tokens == tokens
    first, second = [(100, 100), (100, 300)], [(100, 200), (100, 250)]
    assert events == ["start", "forget", *first, "end", "start", "forget", *second, "end"]


# ---------------------------------------------------------------- models and processes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("vocab_size", [10, 100])
def test_a_copy_with_another_vocabulary_computes_alike(model: Path, tmp_path: Path, vocab_size: int) -> None:
    copy = with_vocabulary(model, tmp_path / "copy", vocab_size)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (copy, model))
    assert ours.shape[-1] == vocab_size
    shared = min(vocab_size, 40)
    torch.testing.assert_close(ours[..., :shared], theirs[..., :shared])
    torch.testing.assert_close(ours[..., 40:80], theirs if vocab_size > 40 else ours[..., 40:80])
    assert (copy / "tokenizer.json").read_text() == "{}"


def test_a_copy_that_takes_longer_sequences_has_the_same_weights(model: Path, tmp_path: Path) -> None:
    copy = with_longest_context(model, tmp_path / "copy", 4096)
    assert json.loads((copy / "config.json").read_text())["max_position_embeddings"] == 4096
    ours, theirs = (load_file(path / "model.safetensors") for path in (copy, model))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_rows_are_cut_or_begin_again() -> None:
    weight_VH = torch.arange(6).reshape(3, 2)
    assert resized_rows(weight_VH, 2).tolist() == [[0, 1], [2, 3]]
    assert resized_rows(weight_VH, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]


def test_sizes_of_a_process_are_in_bytes() -> None:
    text = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert (status_bytes(text, "VmHWM"), status_bytes(text, "VmRSS")) == (2 * 2**20, 2**20)
    with pytest.raises(KeyError, match="VmSwap"):
        status_bytes(text, "VmSwap")


# ---------------------------------------------------------------- figures


def measured(rate: float, peak_bytes: int) -> Measured:
    return Measured(2.0, 16, rate, 200.0, 202.0, peak_bytes)


def rows() -> list[dict[str, Any]]:
    """Passes at three rates about 400 / value of a variable."""
    return [
        medians(curve, point, [measured(factor * 400 / (1 + place), 10**9) for factor in (1.5, 1, 0.9)], 7 * 10**8)
        for curve in curves()
        for place, point in enumerate(curve.points)
    ]


def content() -> dict[str, Any]:
    config = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49_152,
    }
    found = {"tokens": 4096, "peak_bytes": 2**30, "seconds": 3.0}
    budget = {"context": 256, "k": 100, "budget_bytes": 5 * 2**28, "probes": [found]}
    return {
        "teacher": "demo, bfloat16",
        "model_config": config,
        "engine": {"max_batch_tokens": 16_384, "chunk_elements": 2**22},
        "base": asdict(BASE),
        "settings": {"passes": 3},
        "rows": rows(),
        "largest": [
            budget | {"group": 1, "limited_by": "time", "found": found},
            budget | {"group": 8, "limited_by": "memory", "found": None},
        ],
    }


def test_a_row_holds_the_median_of_the_passes_and_the_memory_of_the_first() -> None:
    passes = [measured(300, 5), measured(100, 9), measured(200, 9)]
    found = medians(curves()[0], curves()[0].points[2], passes, 3)
    assert (found["scored_tokens_per_s"], found["scored_tokens_per_s_passes"]) == (200, [300, 100, 200])
    assert (found["peak_bytes"], found["idle_bytes"]) == (5, 3)
    assert (found["curve"], found["value"], found["seconds_per_sequence"]) == ("context", 1024, 0.125)
    assert Point(**found["point"]) == curves()[0].points[2]


def test_growth_is_time_at_the_end_over_time_at_the_beginning() -> None:
    found = growth(rows())
    assert len(found) == len(curves())
    assert found["time a token, context 4096 over 64"] == pytest.approx(5)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "images" / "scaling.png"
    made = content()
    write_picture(made, check(made), path)
    assert path.read_bytes().startswith(b"\x89PNG")


PAGE = """# Speed
<!-- figures: one -->
old
<!-- end of figures -->
prose
<!-- figures: two -->
<!-- end of figures -->
"""


def test_a_table_replaces_its_section_and_nothing_else() -> None:
    made = filled(PAGE, {"one": "new\n"})
    assert made == PAGE.replace("old", "new")
    assert filled(made, {"one": "new\n"}) == made
    assert section_names(made) == ["one", "two"]
    with pytest.raises(ValueError, match="three"):
        filled(PAGE, {"three": ""})


def test_tables_tell_the_figures_of_their_file() -> None:
    made = performance_tables.scaling(content())
    assert "| group | 1 · 2 · 4 · 8 · 16 · 32 | 400 · 200 · 133 · 100 · 80 · 67 |" in made
    told = performance_tables.largest(content())
    assert "| 1 | 1,280 | 4,096 | 1,024 | at least; the search ended by time |" in told
    assert "| 8 | 1,280 | fewer than 4,096 |  |  |" in told
    assert "1.00" in performance_tables.check({"check": check(content()).to_json()})


def test_any_rows_become_a_table_and_bars_another() -> None:
    rows = [{"a_per_b": 1234.5, "skipped": [1]}, {"other": "x", "a_per_b": 0.5}]
    made = "| a / b | other |\n| --- | ---: |\n| 1,234 |  |\n| 0.5 | x |\n"
    assert performance_tables.rows_and_bars({"rows": rows}) == made
    bars = [{"what": "speed", "found": "9 times", "bar": ">= 10 times", "holds": False}]
    told = performance_tables.rows_and_bars({"rows": rows, "bars": bars})
    assert told.startswith(made)
    assert "| speed | 9 times | >= 10 times | **no** |" in told


def test_the_page_has_a_section_for_every_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    assert sorted(section_names(page.read_text())) == sorted(performance_tables.SECTIONS)


def test_the_command_fills_what_is_there_and_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    page.write_text(
        "".join(f"<!-- figures: {name} -->\n<!-- end of figures -->\n" for name in performance_tables.SECTIONS)
    )
    (results / "scaling.json").write_text(json.dumps(content()))
    command = ["performance_tables.py", "--page", str(page), "--results", str(results)]
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    assert performance_tables.main() == 1
    monkeypatch.setattr("sys.argv", command)
    assert performance_tables.main() == 0
    assert "| group |" in page.read_text()
    assert "teacher: left as it is" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    assert performance_tables.main() == 0
