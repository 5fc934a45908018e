"""What a chat template puts between two turns of the student: the end of the one, the replies, the start of the next.

The student's tokens are kept as they were sampled and never tokenised again, so the template is asked for the part
after them alone: it renders the conversation with stand-ins for what the student wrote, and the part begins behind the
last of them. A template that drops something which the student wrote and saw, such as its earlier reasoning, would
have the student learn from contexts that it never meets when it is used; it is refused.

No model and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vopd_client.chat_templates import ChatOptions
from vopd_client.errors import DataError, EnvironmentReplyError
from vopd_client.handshake import IdSwap
from vopd_client.prompt_rows import Message
from vopd_client.render import Prompt, chat_text, own_chat_template, special_tokens_of_teacher, tokenise
from vopd_client.types import TeacherInfo
from vopd_proto.arrays import IntArray

_SHOWN_CHARACTERS = 600  # of a rendering in an error: its end


class Render(Protocol):
    """A conversation as one side reads it. Raises: DataError."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True)
class Side:
    """A chat template with what it is told. chat_template None: the tokenizer's own."""

    whose: str  # "the student's chat template"
    tokenizer: Any
    chat_template: str | None
    variables: dict[str, Any]

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return chat_text(
            self.tokenizer,
            messages,
            self.chat_template,
            self.variables,
            self.whose,
            add_generation_prompt=add_generation_prompt,
        )


def text_after_turn(render: Render, messages: Sequence[Message], turns: Sequence[Message], *, whose: str) -> str:
    """The template's text from the end of the student's last turn to where its next one begins.

    Args:
        messages: of the prompt.
        turns: the student's, of role assistant, each with the replies to it; the last reply is what is added.

    Raises: EnvironmentReplyError for a template that cannot render it, or that drops a part of an earlier turn; the
        latter with the rendering before the reply and after it.
    """
    marked, marks = _with_marks(turns)
    rendered = _rendered(render, [*messages, *marked], whose)
    places = [rendered.find(mark) for mark in marks]
    if -1 not in places and places == sorted(places) and all(rendered.count(mark) == 1 for mark in marks):
        return rendered[places[-1] + len(marks[-1]) :]
    last_turn = max(index for index, turn in enumerate(marked) if turn["role"] == "assistant")
    before = _rendered(render, [*messages, *marked[: last_turn + 1]], whose, add_generation_prompt=False)
    lost = ", ".join(mark for mark, place in zip(marks, places, strict=True) if place == -1) or "their order"
    raise EnvironmentReplyError(
        f"{whose} does not keep what the student wrote when a reply follows (lost: {lost}). A trajectory is one "
        "growing text, so this template does not go with this reply: one that keeps earlier reasoning does, and some "
        "keep it when the reply has the role tool.\n"
        f"before the reply: {before[-_SHOWN_CHARACTERS:]!r}\n"
        f"with the reply: {rendered[-_SHOWN_CHARACTERS:]!r}"
    )


def _with_marks(turns: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """The turns with stand-ins for what the student wrote, reasoning apart from the rest, and the stand-ins.

    Whatever a student writes, the template reads something well-formed.
    """
    marked: list[Message] = []
    marks: list[str] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            marked.append(turn)
            continue
        thought, said = f"@@turn-{index}-thought@@", f"@@turn-{index}-said@@"
        thinks = "</think>" in turn["content"]
        marks += [thought, said] if thinks else [said]
        content = f"<think>\n{thought}\n</think>\n\n{said}" if thinks else said
        marked.append({**turn, "content": content})
    return marked, marks


def _rendered(render: Render, messages: Sequence[Message], whose: str, *, add_generation_prompt: bool = True) -> str:
    try:
        return render(messages, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise EnvironmentReplyError(f"{whose} cannot render the conversation with the reply: {error}") from error


class AddedTurns:
    """Token ids of what comes between two turns, by the student's template; the teacher's must read the same.

    teachers: by name, those whose templates may render otherwise than the student's; with the exchange of end tokens.
    """

    def __init__(self, student: Side, teachers: Mapping[str, tuple[Side, IdSwap]]) -> None:
        self._student = student
        self._teachers = teachers

    @classmethod
    def of(cls, tokenizer: Any, options: ChatOptions, teachers: Mapping[str, tuple[TeacherInfo, IdSwap]]) -> AddedTurns:
        """Raises: ConfigError for an option that a template does not read."""
        own_template = own_chat_template(tokenizer)
        variables = options.for_template(own_template, "the student's") if own_template else {}
        student = Side("the student's chat template", tokenizer, None, variables)
        sides = {}
        for name, (info, swap) in teachers.items():
            if not info.chat_template:
                continue  # its contexts are plain text: there is nothing that could say otherwise
            whose = f"teacher {name}'s chat template" if name else "the teacher's chat template"
            special = special_tokens_of_teacher(tokenizer, info.begin_id, info.end_ids[0] if info.end_ids else None)
            if info.chat_template == own_template and all(
                getattr(tokenizer, token) == text for token, text in special.items()
            ):
                continue  # the same by construction
            told = special | options.for_template(info.chat_template, "the teacher's")
            sides[name] = (Side(whose, tokenizer, info.chat_template, told), swap)
        return cls(student, sides)

    def ids(self, prompt: Prompt, turns: Sequence[Message], end_id: int) -> IntArray:
        """What is added to a turn that ended with `end_id`, which is not a part of it again.

        Where the template ends turns with another token, that one comes after the student's own.

        Args: turns: as in `text_after_turn`.

        Raises: EnvironmentReplyError as `text_after_turn`, and for a teacher whose template says something else.
        """
        assert prompt.messages is not None, "an environment replies to chats"
        tokenizer = self._student.tokenizer
        text = text_after_turn(self._student, prompt.messages, turns, whose=self._student.whose)
        end_text = tokenizer.decode([end_id])
        if prompt.teacher in self._teachers:
            side, swap = self._teachers[prompt.teacher]
            theirs = text_after_turn(side, prompt.messages, turns, whose=side.whose)
            their_end = tokenizer.decode(swap.ids(np.array([end_id])).tolist())
            if text != theirs and text.removeprefix(end_text) != theirs.removeprefix(their_end):
                raise EnvironmentReplyError(
                    f"{side.whose} renders a reply otherwise than the student's, and both read the same tokens:\n"
                    f"student: {text!r}\nteacher: {theirs!r}"
                )
        rest = text.removeprefix(end_text)
        # Tokenised behind the end token, as it stands in the text: some tokenizers treat the start of a text apart.
        ids = tokenise(tokenizer, end_text + rest, add_special_tokens=False)
        return ids[1:] if len(ids) and ids[0] == end_id else tokenise(tokenizer, rest, add_special_tokens=False)
