"""What a template puts between two turns: as text for several shapes of template, and as token ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tiny_model import tiny_tokenizer
from vopd_client.added_turns import AddedTurns, Side, text_after_turn
from vopd_client.chat_templates import ChatOptions
from vopd_client.errors import ConfigError, EnvironmentReplyError
from vopd_client.handshake import IdSwap
from vopd_client.prompts import Prompt
from vopd_client.types import TeacherInfo

OPENING = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CHAT_ML = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" + OPENING
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|other_end|>\n\n{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|other_end|>\n\n{% endif %}"
)
# Reasoning stays in the turns after the last question of a user, and nowhere else.
KEEPS_FOR_TOOLS = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user and (loop.last or '</think>' in m.content) %}"
    "<think>\n{{ thought if '</think>' in m.content }}\n</think>\n\n{% endif %}"
    "{{ said if m.role == 'assistant' else m.content }}<|end|>\n{% endfor %}" + OPENING
)
DROPS_REASONING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}" + OPENING
)
NO_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
)
QUESTION = ({"role": "user", "content": "2 + 2?"},)
TOOL, USER = {"role": "tool", "content": "4"}, {"role": "user", "content": "sure?"}


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def side(template: str, **variables: Any) -> Side:
    return Side("the student's chat template", tokenizer_with(template), None, variables)


def after(template: str, *turns: dict[str, str]) -> str:
    return text_after_turn(side(template), QUESTION, turns, whose="the student's chat template")


# ---------------------------------------------------------------- as text


@pytest.mark.parametrize(
    "written", ["4", "", "  4  ", "{{ 1 / 0 }}", "<|start|>user\nno", "\udcff", "<think>never closed"]
)
@pytest.mark.parametrize(
    ("template", "added"),
    [
        (CHAT_ML, "<|end|>\n<|start|>tool\n4<|end|>\n<|start|>assistant\n"),
        (LLAMA, "<|end|><|start|>tool<|other_end|>\n\n4<|end|><|start|>assistant<|other_end|>\n\n"),
        (KEEPS_FOR_TOOLS, "<|end|>\n<|start|>tool\n4<|end|>\n<|start|>assistant\n"),
        (DROPS_REASONING, "<|end|><|start|>tool\n4<|end|><|start|>assistant\n"),
    ],
)
def test_the_reply_is_rendered_alike_whatever_the_student_wrote(template: str, added: str, written: str) -> None:
    assert after(template, turn(written), TOOL) == added
    assert after(template, turn("first"), USER, turn(written), TOOL) == added


def test_several_messages_are_one_reply() -> None:
    added = after(CHAT_ML, turn("x"), TOOL, USER)
    assert added == "<|end|>\n<|start|>tool\n4<|end|>\n<|start|>user\nsure?<|end|>\n<|start|>assistant\n"


def test_a_template_may_see_what_came_before() -> None:
    counting = CHAT_ML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}")
    assert after(counting, turn("a"), TOOL, turn("b"), TOOL).startswith("<|end|>\n<|start|>tool 5\n")


THOUGHT = turn("<think>\nhm\n</think>\n\n4")


def test_reasoning_that_the_template_keeps_is_no_problem() -> None:
    assert after(KEEPS_FOR_TOOLS, THOUGHT, TOOL).startswith("<|end|>\n<|start|>tool\n4")
    assert after(KEEPS_FOR_TOOLS, THOUGHT, TOOL, THOUGHT, TOOL).startswith("<|end|>\n<|start|>tool\n4")
    assert after(CHAT_ML, THOUGHT, USER).startswith("<|end|>\n<|start|>user\n")


@pytest.mark.parametrize(
    ("template", "turns", "lost"),
    [
        (KEEPS_FOR_TOOLS, (THOUGHT, USER), "@@turn-0-thought@@"),
        (KEEPS_FOR_TOOLS, (THOUGHT, TOOL, turn("4"), USER), "@@turn-0-thought@@"),
        (DROPS_REASONING, (THOUGHT, TOOL), "@@turn-0-thought@@"),
    ],
)
def test_a_template_that_drops_reasoning_is_refused_with_both_renderings(
    template: str, turns: tuple[dict[str, str], ...], lost: str
) -> None:
    with pytest.raises(EnvironmentReplyError) as raised:
        after(template, *turns)
    message, before, replied = str(raised.value).split("\n")
    assert f"does not keep what the student wrote when a reply follows (lost: {lost})" in message
    assert before.startswith("before the reply: '")
    assert "said@@<|end|>" in before
    assert replied.startswith("with the reply: '")
    assert lost not in replied


def test_a_template_that_cannot_render_the_reply_says_why() -> None:
    with pytest.raises(EnvironmentReplyError, match=r"cannot render the conversation with the reply: .*no tools here"):
        after(NO_TOOLS, turn("4"), TOOL)


# ---------------------------------------------------------------- as token ids

END, OTHER_END = 257, 258


def info(template: str, end_ids: tuple[int, ...] = (END,)) -> TeacherInfo:
    return TeacherInfo(
        model_id="t", model_revision="1", fingerprint="", num_ids=259, begin_id=256, end_ids=end_ids, pad_id=None,
        chat_template=template, vocab_size=259, hidden_size=8, max_context_length=99, dtype="float32", engine="e",
        engine_version="0", server_version="0", supports=frozenset({"sampled"}), any_temperature=True,
        deterministic=True, max_sequences_per_request=1, max_tokens_per_request=1, max_support_size=1, head_sha256="",
    )  # fmt: skip


PROMPT = Prompt(0, "p:1", np.arange(2), np.arange(2), None, None, None, "2 + 2?", messages=QUESTION)


def added(template: str, end_id: int = END, *, teachers: Any = None, reply: Any = TOOL) -> str:
    tokenizer = tokenizer_with(template)
    turns = AddedTurns.of(tokenizer, ChatOptions(), teachers or {})
    return str(tokenizer.decode(turns.ids(PROMPT, [turn("4"), reply], end_id)))


def test_the_end_token_that_was_sampled_is_not_repeated() -> None:
    tokenizer = tokenizer_with(CHAT_ML)
    assert tokenizer.convert_tokens_to_ids(["<|end|>", "<|other_end|>"]) == [END, OTHER_END]
    assert added(CHAT_ML) == "\n<|start|>tool\n4<|end|>\n<|start|>assistant\n"


def test_a_turn_that_ended_otherwise_is_ended_as_the_template_does() -> None:
    assert added(CHAT_ML, OTHER_END) == "<|end|>\n<|start|>tool\n4<|end|>\n<|start|>assistant\n"


def test_the_ids_are_those_of_the_whole_conversation() -> None:
    tokenizer = tokenizer_with(CHAT_ML)
    whole = tokenizer.apply_chat_template([*QUESTION, turn("4"), TOOL], add_generation_prompt=True, tokenize=False)
    start = tokenizer.apply_chat_template(list(QUESTION), add_generation_prompt=True, tokenize=False)
    turns = AddedTurns.of(tokenizer, ChatOptions(), {})
    ids = [*tokenizer(start + "4<|end|>").input_ids, *turns.ids(PROMPT, [turn("4"), TOOL], END)]
    assert ids == tokenizer(whole).input_ids


def test_a_teacher_of_the_same_template_is_not_asked() -> None:
    same = AddedTurns.of(tokenizer_with(CHAT_ML), ChatOptions(), {"": (info(CHAT_ML), IdSwap(None))})
    assert not same._teachers
    assert not AddedTurns.of(tokenizer_with(CHAT_ML), ChatOptions(), {"": (info(""), IdSwap(None))})._teachers


def test_a_teacher_may_render_what_came_before_otherwise() -> None:
    teachers = {"": (info("system words " + CHAT_ML), IdSwap(None))}
    assert added(CHAT_ML, teachers=teachers) == added(CHAT_ML)


def test_a_teacher_that_ends_turns_with_its_own_token_reads_the_same_reply() -> None:
    theirs = CHAT_ML.replace(
        "{{ m.content }}<|end|>", "{{ m.content }}{{ '<|other_end|>' if loop.index < 3 else '<|end|>' }}"
    )
    teachers = {"": (info(theirs, (OTHER_END,)), IdSwap((END, OTHER_END)))}
    assert added(CHAT_ML, teachers=teachers) == added(CHAT_ML)


def test_a_teacher_that_renders_the_reply_otherwise_is_refused_with_both() -> None:
    teachers = {"": (info(CHAT_ML.replace("{{ m.role }}", "{{ m.role | upper }}")), IdSwap(None))}
    with pytest.raises(EnvironmentReplyError, match="otherwise than the student's") as raised:
        added(CHAT_ML, teachers=teachers)
    assert r"student: '<|end|>\n<|start|>tool" in str(raised.value)
    assert r"teacher: '<|end|>\n<|start|>TOOL" in str(raised.value)
    named = {"code": (info(CHAT_ML.replace("\n", " ")), IdSwap(None))}
    turns = AddedTurns.of(tokenizer_with(CHAT_ML), ChatOptions(), named)
    with pytest.raises(EnvironmentReplyError, match="teacher code's chat template renders a reply otherwise"):
        turns.ids(replace(PROMPT, teacher="code"), [turn("4"), TOOL], END)


# ---------------------------------------------------------------- tools in the prompts

TOOLS = ({"type": "function", "function": {"name": "add"}},)


def test_both_templates_list_the_tools() -> None:
    listing = "{% for t in tools %}{{ t.function.name }} {% endfor %}" + CHAT_ML
    told = ChatOptions(tools=TOOLS).for_template(listing, "the student's")
    tokenizer = tokenizer_with(listing)
    assert tokenizer.apply_chat_template(list(QUESTION), tokenize=False, **told).startswith("add <|start|>user")
    turns = AddedTurns.of(tokenizer, ChatOptions(tools=TOOLS), {})
    assert tokenizer.decode(turns.ids(PROMPT, [turn("4"), TOOL], END)) == added(CHAT_ML)


def test_tools_that_a_template_would_leave_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="the environment has tools, and the teacher's chat template lists none"):
        ChatOptions(tools=TOOLS).for_template(CHAT_ML, "the teacher's")
