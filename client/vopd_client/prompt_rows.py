"""One row of a prompt file: what it may hold, and what is wrong with it. Values in, values out; no files, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from vopd_client.config import AnswerForm, Verifier
from vopd_client.errors import DataError
from vopd_client.extraction import last_boxed
from vopd_client.reasoning_gym_scores import TaskItem
from vopd_client.verify import check_answer

MAX_REPORTED_ROWS = 5  # bad rows named in one error

Message = Mapping[str, Any]
T = TypeVar("T")
R = TypeVar("R")

ROW_KEYS = ("prompt", "messages", "answer", "teacher_prompt", "teacher_messages", "verifier", "kind", "teacher")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Chat templates read the last four; what is in them is between the data and the template.
_MESSAGE_KEYS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")


@dataclass(frozen=True)
class RowFormat:
    """How rows are read that were not written for this project: which columns count, and what every prompt ends with.

    With a named column the rows are somebody else's: prompt and answer are read, whatever else there is, is left out.
    `prompt_suffix` is appended to plain-text prompts as it is, and not to a `teacher_prompt` of the row's own.
    `answer_form` says where in the answer's text the answer is.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    prompt_suffix: str = ""
    answer_form: AnswerForm = "whole"

    @property
    def names_columns(self) -> bool:
        return self.prompt_column is not None or self.answer_column is not None

    def check_columns(self, columns: Iterable[object], source: str) -> None:
        """Raises: DataError that names a column that is not there, and those that are."""
        there = [str(column) for column in columns]
        for setting, column in (("prompt_column", self.prompt_column), ("answer_column", self.answer_column)):
            if column is not None and column not in there:
                raise DataError(f"{source}: no column {column!r} ({setting}); there are {', '.join(there) or 'none'}")

    def read(self, value: object, source: str) -> object:
        """The row in this project's keys, its prompt complete; what is no object is left to `parse_row`.

        Raises: DataError that starts with `source`.
        """
        if not isinstance(value, Mapping):
            return value
        row = dict(value)
        if self.names_columns:
            self.check_columns(row, source)
            answer = row.get(self.answer_column or "answer")
            row = {"prompt": row.get(self.prompt_column or "prompt"), "answer": number_as_text(answer)}
        if isinstance(row.get("answer"), str):
            row["answer"] = reference_answer(row["answer"], self.answer_form, source)
        return self.suffixed(row, source)

    def suffixed(self, row: dict[str, Any], source: str) -> dict[str, Any]:
        """The row, its prompt complete. Raises: DataError for a chat where there is a suffix."""
        if not self.prompt_suffix:
            return row
        if row.get("messages") is not None:
            raise DataError(f"{source}: prompt_suffix goes after plain text, and this row has messages")
        if isinstance(row.get("prompt"), str):
            row["prompt"] += self.prompt_suffix
        return row


def reference_answer(text: str, form: AnswerForm, source: str) -> str:
    r"""The answer that a worked solution ends with: behind its last ####, or in its last \boxed{...}.

    Raises: DataError for a solution without one.
    """
    match form:
        case "whole":
            return text
        case "hashes":
            _, found, answer = text.rpartition("####")
        case "boxed":
            found = answer = last_boxed(text) or ""
    if not found or not answer.strip():
        mark = "####" if form == "hashes" else "\\boxed{...}"
        raise DataError(f"{source}: answer: answer_form {form} looks for {mark}, and there is none: ...{text[-60:]!r}")
    return answer.strip()


def number_as_text(value: object) -> object:
    """42 and 42.0 as "42", as data sets of integer answers hold them; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value)) if float(value).is_integer() else str(value)


@dataclass(frozen=True)
class PromptRow:
    """A row as it was written: exactly one of `prompt` and `messages`, at most one of the teacher's two.

    verifier: set whenever `answer` is, to the row's own or the run's default.
    """

    index: int  # 0-based, over all rows
    source: str  # "data.jsonl:12"
    prompt: str | None
    messages: tuple[Message, ...] | None
    teacher_prompt: str | None
    teacher_messages: tuple[Message, ...] | None
    answer: str | None
    verifier: Verifier | None
    kind: str | None
    teacher: str | None  # the name of the one that scores it; None: the run's only teacher
    task_item: TaskItem | None = None  # what judges completions in place of a comparison with the answer


def parse_row(value: object, *, index: int, source: str, default_verifier: Verifier) -> PromptRow:
    """The row that `value` spells. A key whose value is null counts as absent (columns of a table hold nulls).

    Raises: DataError that starts with `source` and names the key.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: a row is an object with the key prompt or messages, not {_kind_of(value)}")
    row = {key: item for key, item in value.items() if item is not None}
    for key in row:
        if key not in ROW_KEYS:
            raise DataError(f"{source}: unknown key {key!r}{_suggestion(str(key), ROW_KEYS)}")
    if ("prompt" in row) == ("messages" in row):
        raise DataError(
            f"{source}: give either prompt or messages, not both"
            if "prompt" in row
            else f"{source}: neither prompt nor messages; one of them is what the student sees"
        )
    if "teacher_prompt" in row and "teacher_messages" in row:
        raise DataError(f"{source}: give either teacher_prompt or teacher_messages, not both")
    answer = _text(row, "answer", source)
    verifier = _verifier(row, source, default_verifier)
    if answer is not None:
        try:
            check_answer(answer, verifier)
        except ValueError as error:
            raise DataError(f"{source}: answer: {error}") from error
    elif "verifier" in row:
        raise DataError(f"{source}: a verifier without an answer to compare with")
    return PromptRow(
        index=index,
        source=source,
        prompt=_text(row, "prompt", source),
        messages=_messages(row, "messages", source),
        teacher_prompt=_text(row, "teacher_prompt", source),
        teacher_messages=_messages(row, "teacher_messages", source),
        answer=answer,
        verifier=verifier if answer is not None else None,
        kind=_text(row, "kind", source),
        teacher=_text(row, "teacher", source),
    )


def choose_teachers(rows: Iterable[PromptRow], names: Sequence[str]) -> list[PromptRow]:
    """The rows, each with the name of its teacher: its own choice, or that of the only one there is.

    Args: names: of the run's teachers; empty: there is one, and it has no name.
    Raises: DataError, a line for each of the first few rows that name no teacher, or none of these.
    """

    def choose(row: PromptRow) -> PromptRow:
        if row.teacher is None and len(names) <= 1:
            return replace(row, teacher=names[0] if names else None)
        if row.teacher in names:
            return row
        there = (
            f"there are {', '.join(names)}"
            if names
            else "the run's only teacher has no name; the setting teacher gives it one"
        )
        if row.teacher is None:
            raise DataError(f"{row.source}: no teacher is named; {there}")
        raise DataError(f"{row.source}: no teacher {row.teacher!r}; {there}{_suggestion(row.teacher, tuple(names))}")

    return map_rows(choose, rows)


def map_rows(function: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """`function` of every value, in order.

    Raises: DataError with the messages of the first few values that raise one, a line each.
    """
    results: list[R] = []
    problems: list[str] = []
    for value in values:
        try:
            results.append(function(value))
        except DataError as error:
            problems.append(str(error))
            if len(problems) == MAX_REPORTED_ROWS:
                problems.append(f"(looked no further after {MAX_REPORTED_ROWS} bad rows)")
                break
    if problems:
        raise DataError("\n".join(problems))
    return results


def _text(row: Mapping[str, Any], key: str, source: str) -> str | None:
    if key not in row:
        return None
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{source}: {key} must be text, not {_kind_of(value)}")
    if not value.strip():
        raise DataError(f"{source}: {key} is empty")
    return value


def _verifier(row: Mapping[str, Any], source: str, default: Verifier) -> Verifier:
    known: tuple[Verifier, ...] = get_args(Verifier)
    if "verifier" not in row:
        return default
    for verifier in known:
        if row["verifier"] == verifier:
            return verifier
    shown = str(row["verifier"])
    raise DataError(f"{source}: unknown verifier {shown!r}{_suggestion(shown, known)}; there are {', '.join(known)}")


def _messages(row: Mapping[str, Any], key: str, source: str) -> tuple[Message, ...] | None:
    if key not in row:
        return None
    value = row[key]
    if not isinstance(value, list | tuple):
        raise DataError(f"{source}: {key} must be a list of messages, not {_kind_of(value)}")
    if not value:
        raise DataError(f"{source}: {key} is empty")
    messages = tuple(_message(item, f"{source}: {key}[{position}]") for position, item in enumerate(value))
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{source}: {key} ends with the assistant; the last message is what the completion replies to")
    return messages


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object with role and content, not {_kind_of(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    for key in message:
        if key not in _MESSAGE_KEYS:
            raise DataError(f"{where}: unknown key {key!r}{_suggestion(str(key), _MESSAGE_KEYS)}")
    role = message.get("role")
    if role not in _ROLES:
        shown = "no role" if role is None else f"unknown role {role!r}{_suggestion(str(role), _ROLES)}"
        raise DataError(f"{where}: {shown}; there are {', '.join(_ROLES)}")
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be text, not {_kind_of(content)}")
    if role == "user" and not content.strip():
        raise DataError(f"{where}: content is empty")
    return message


def _kind_of(value: object) -> str:
    """The type in the words of JSON."""
    names: dict[type, str] = {
        type(None): "null", bool: "true or false", int: "a number", float: "a number",
        str: "text", list: "a list", tuple: "a list", dict: "an object",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
