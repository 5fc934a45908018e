"""What chat templates are told: thinking by the name they know, other variables, and refusals of what none reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_model import tiny_tokenizer
from vopd_client.chat_templates import ChatOptions, chat_options, check_has_chats, variables_of
from vopd_client.command_config import EvalConfig
from vopd_client.errors import ConfigError
from vopd_client.prompts import Prompt, load_prompts, render_prompts
from vopd_client.train_config import TrainConfig
from vopd_settings import SettingsError, load_settings

TURNS = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
# As the families write their switches.
CLOSES = TURNS + "[reply]{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
OPENS = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}" + TURNS + (
    "[reply]{% if thinking %}<think>{% else %}</think>{% endif %}"
)  # fmt: skip
DEFAULTS = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}" + TURNS + (
    "[{{ 'think' if enable_thinking else 'no_think' }}]"
)  # fmt: skip
EFFORT = "{{ bos_token }}[{{ reasoning_effort or 'medium' }}]" + TURNS
PLAIN = "{% generation %}" + TURNS + "{% endgeneration %}{% if add_generation_prompt %}[reply]{% endif %}"
# Thoughts of turns before the last question are left out, as most families do.
HISTORY = (
    "{% set last = namespace(question=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.question = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}[{{ message.role }}]"
    "{% if message.reasoning_content and (loop.index0 > last.question or keep_thoughts) %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}{% endfor %}[reply]"
)
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def render(tmp_path: Path, row: dict[str, Any], student: str, teacher: str, options: ChatOptions) -> tuple[str, str]:
    """What both sides see."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = student
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (prompt,) = render_prompts(
        load_prompts(str(path)), tokenizer=tokenizer, teacher_chat_template=teacher, max_prompt_tokens=500,
        max_new_tokens=1, student_max_length=1000, teacher_max_length=1000, chat_options=options,
    )  # fmt: skip
    assert isinstance(prompt, Prompt)
    return tokenizer.decode(prompt.student_ids), tokenizer.decode(prompt.teacher_ids)


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (CLOSES, {"enable_thinking"}),
        (OPENS, {"thinking"}),
        (DEFAULTS, {"enable_thinking"}),
        (EFFORT, {"reasoning_effort"}),
        (HISTORY, {"keep_thoughts"}),
        (PLAIN, set()),
        ("{% for message in messages %}{% set thinking = message.thinking %}{{ thinking }}{% endfor %}", set()),
        ("{% no jinja", set()),
    ],
)
def test_a_templates_variables_are_those_that_its_caller_sets(template: str, read: set[str]) -> None:
    assert variables_of(template) == read


@pytest.mark.parametrize(
    ("template", "auto", "yes", "no"),
    [
        (CLOSES, "[user]Hi[reply]", "[user]Hi[reply]", "[user]Hi[reply]<think></think>"),
        (OPENS, "[user]Hi[reply]</think>", "[user]Hi[reply]<think>", "[user]Hi[reply]</think>"),
        (DEFAULTS, "[user]Hi[think]", "[user]Hi[think]", "[user]Hi[no_think]"),
    ],
)
def test_thinking_goes_by_the_name_that_each_template_knows(
    tmp_path: Path, template: str, auto: str, yes: str, no: str
) -> None:
    for thinking, expected in (("auto", auto), ("yes", yes), ("no", no)):
        options = ChatOptions(thinking)  # type: ignore[arg-type]
        assert render(tmp_path, CHAT, template, template, options) == (expected, expected)


def test_both_sides_are_told_the_same_in_their_own_words(tmp_path: Path) -> None:
    student, teacher = render(tmp_path, CHAT, CLOSES, OPENS, ChatOptions("no"))
    assert student == "[user]Hi[reply]<think></think>"
    assert teacher == "[user]Hi[reply]</think>"


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (PLAIN, OPENS, "thinking no: the student's chat template reads none of {}; it reads no variables of its own"),
        (OPENS, EFFORT, "thinking no: the teacher's chat template reads none of {}; it reads reasoning_effort"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_switch_is_refused_with_what_it_reads(
    tmp_path: Path, student: str, teacher: str, message: str
) -> None:
    message = message.format("enable_thinking, thinking")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        render(tmp_path, CHAT, student, teacher, ChatOptions("no"))
    # Plain text goes through no template.
    assert render(tmp_path, {"prompt": "Hi"}, student, teacher, ChatOptions("no")) == ("Hi", "Hi")


def test_other_variables_reach_both_templates_and_one_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    low = ChatOptions("auto", {"reasoning_effort": "low"})
    assert render(tmp_path, CHAT, EFFORT, EFFORT, low) == ("<|start|>[low][user]Hi", "<|start|>[low][user]Hi")
    with pytest.raises(
        ConfigError,
        match=r"^chat_template_kwargs: the teacher's chat template reads no reasoning_effort; it reads thinking$",
    ):
        render(tmp_path, CHAT, EFFORT, OPENS, low)


def test_thoughts_in_a_history_are_the_templates_to_show(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "2.", "reasoning_content": "1+1"}
    row = {"messages": [CHAT["messages"][0], thought, {"role": "user", "content": "And 2+2?"}]}
    without, shown = "[user]Hi[assistant]2.[user]And 2+2?[reply]", "[assistant]<think>1+1</think>2."
    assert render(tmp_path, row, HISTORY, HISTORY, ChatOptions()) == (without, without)
    kept = without.replace("[assistant]2.", shown)
    assert render(tmp_path, row, HISTORY, HISTORY, ChatOptions("auto", {"keep_thoughts": True})) == (kept, kept)


def test_options_of_chats_are_refused_where_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Hi"}\n')
    rows = load_prompts(str(path))
    check_has_chats(ChatOptions(), rows)
    with pytest.raises(
        ConfigError, match=r"^thinking no has no effect: no row has messages, and plain text goes through"
    ):
        check_has_chats(ChatOptions("no"), rows)
    with pytest.raises(ConfigError, match=r"^chat_template_kwargs has no effect"):
        check_has_chats(ChatOptions("auto", {"a": 1}), rows)
    path.write_text(json.dumps({"prompt": "Hi", "teacher_messages": CHAT["messages"]}) + "\n")
    check_has_chats(ChatOptions("no"), load_prompts(str(path)))


# ---------------------------------------------------------------- settings

TRAIN = ("--student", "s", "--prompts", "p", "--teacher-url", "grpc://a:1")


def load(*flags: str) -> TrainConfig:
    return load_settings(TrainConfig, [*TRAIN, *flags], prog="train", env_prefix="VOPD_CLIENT_")


def test_settings_of_chats_are_a_word_and_a_json_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--thinking", "no", "--chat-template-kwargs", '{"reasoning_effort": "low", "depth": [1, 2]}')
    expected = ChatOptions("no", {"reasoning_effort": "low", "depth": [1, 2]})
    assert chat_options(load(*flags)) == expected
    (tmp_path / "run.yaml").write_text("thinking: no\nchat_template_kwargs: {reasoning_effort: low, depth: [1, 2]}\n")
    assert chat_options(load("--config", str(tmp_path / "run.yaml"))) == expected
    monkeypatch.setenv("VOPD_CLIENT_CHAT_TEMPLATE_KWARGS", '{"depth": 1}')
    assert chat_options(load()) == ChatOptions("auto", {"depth": 1})
    evaluation = load_settings(
        EvalConfig, ["--model", "m", "--prompts", "p", *flags], prog="eval", env_prefix="VOPD_CLIENT_"
    )
    assert chat_options(evaluation) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--chat-template-kwargs", "{low}"), "not JSON at column 2"),
        (("--chat-template-kwargs", '["low"]'), "a JSON object, with names and values in braces"),
        (("--chat-template-kwargs", '{"tokenize": true}'), "tokenize is not a variable of the template's own"),
        (("--thinking", "no", "--chat-template-kwargs", '{"thinking": true}'), "thinking no sets thinking itself"),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(*flags)


def test_reading_a_templates_variables_needs_no_torch() -> None:
    script = "import sys; from vopd_client.chat_templates import variables_of; variables_of('{{ a }}'); "
    script += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
