"""From prompt rows to token ids: what the student sees, and what the teacher sees before the same completion.

Both sides are tokenised with the student's tokenizer: at the handshake its table was found equal to the teacher's.
Axes: C tokens of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vopd_client.chat_templates import ChatOptions
from vopd_client.config import Verifier
from vopd_client.errors import DataError
from vopd_client.prompt_rows import Message, PromptRow, map_rows
from vopd_client.reasoning_gym_scores import TaskItem
from vopd_client.types import NoSupport, SequenceToScore, Support
from vopd_proto.arrays import IntArray

# A teacher's template comes over the network. Jinja's sandbox keeps it from the machine; these bounds keep what
# it makes from being carried on. The longest published templates have about 20,000 characters.
MAX_TEMPLATE_CHARACTERS = 200_000
MAX_RENDERED_CHARACTERS = 4_000_000

NOTHING_MORE = ChatOptions()

# What an expression in a template can raise beside Jinja's own errors: 1 / 0, messages[7], 'a' * 10**12, ...
_TEMPLATE_ERRORS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row, ready to use. `verifier` is set whenever `answer` is."""

    index: int  # of the row, 0-based
    source: str  # "data.jsonl:12"
    student_ids: IntArray  # [C]
    teacher_ids: IntArray  # [C'], what the teacher sees instead
    answer: str | None
    verifier: Verifier | None
    kind: str | None
    text: str  # to show people
    teacher: str = ""  # the name of the one that scores it; "" in a run whose only teacher has none
    task_item: TaskItem | None = None  # what judges completions in place of a comparison with the answer
    messages: tuple[Message, ...] | None = None  # of the student's side; None: it is plain text


def render_prompts(
    rows: Sequence[PromptRow],
    *,
    tokenizer: Any,
    teacher_chat_template: str,
    max_prompt_tokens: int,
    max_new_tokens: int,
    student_max_length: int,
    teacher_max_length: int,
    teacher_begin_id: int | None = None,
    teacher_end_id: int | None = None,
    chat_options: ChatOptions = NOTHING_MORE,
) -> list[Prompt]:
    """Renders and tokenises both sides of every row, and checks that a completion of any length still fits.

    Chats go through a chat template, the student's own or the teacher's, and get no special tokens beyond it.
    Plain text gets the special tokens that the student's tokenizer adds by itself, often a begin token or none.

    Args:
        tokenizer: the student's, of transformers.
        teacher_chat_template: Jinja, as the teacher's handshake tells it; "" when it has none.
        max_prompt_tokens: of the student's side; the teacher's may be as long as the teacher can read.
        teacher_begin_id, teacher_end_id: what `bos_token` and `eos_token` mean in the teacher's template;
            None: the same as in the student's.
        chat_options: what both chat templates are told beside the messages.

    Raises: DataError, a line for each of the first few rows that cannot be used, with file, line and the numbers;
        ConfigError for an option that a template which renders a row does not read.
    """
    special_tokens = special_tokens_of_teacher(tokenizer, teacher_begin_id, teacher_end_id)

    def render(row: PromptRow) -> Prompt:
        student_ids = _student_ids(row, tokenizer, chat_options)
        teacher_ids = _teacher_ids(row, tokenizer, teacher_chat_template, special_tokens, chat_options)
        _check_lengths(
            row.source,
            num_student=len(student_ids),
            num_teacher=len(teacher_ids),
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            student_max_length=student_max_length,
            teacher_max_length=teacher_max_length,
        )
        return Prompt(
            index=row.index,
            source=row.source,
            student_ids=student_ids,
            teacher_ids=teacher_ids,
            answer=row.answer,
            verifier=row.verifier,
            kind=row.kind,
            text=_text_to_show(row),
            teacher=row.teacher or "",
            task_item=row.task_item,
            messages=row.messages,
        )

    return map_rows(render, rows)


def sequence_of_text(tokenizer: Any, context: str, completion: str, support: Support | None = None) -> SequenceToScore:
    """Two texts as token ids, to be scored: one after the other, tokenised apart, so that no token spans the border.

    The context gets the special tokens that the tokenizer adds by itself, the completion none: write its end token
    into the text if that is to be scored too. support: None asks for the sampled log-probabilities alone.

    Raises: DataError when one of them makes no tokens.
    """
    sequence = SequenceToScore(
        context_ids=tokenise(tokenizer, context, add_special_tokens=True),
        completion_ids=tokenise(tokenizer, completion, add_special_tokens=False),
        support=support or NoSupport(),
    )
    for name, ids in (("context", sequence.context_ids), ("completion", sequence.completion_ids)):
        if not len(ids):
            raise DataError(f"the {name} makes no tokens")
    return sequence


def special_tokens_of_teacher(tokenizer: Any, begin_id: int | None, end_id: int | None) -> dict[str, str]:
    """What `bos_token` and `eos_token` mean in the teacher's template, as far as its handshake tells."""
    return {
        name: tokenizer.convert_ids_to_tokens(index)
        for name, index in (("bos_token", begin_id), ("eos_token", end_id))
        if index is not None
    }


def _student_ids(row: PromptRow, tokenizer: Any, options: ChatOptions) -> IntArray:
    if row.messages is None:
        return tokenise(tokenizer, row.prompt, add_special_tokens=True)
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.source}: messages need a chat template, and the student's tokenizer has none; "
            "give plain text as prompt instead"
        )
    variables = options.for_template(own_chat_template(tokenizer), "the student's")
    return _chat_ids(tokenizer, row.messages, None, variables, f"{row.source}: the student's chat template")


def own_chat_template(tokenizer: Any) -> str:
    """The tokenizer's own; of several with names the one called default; "" when there is none."""
    template = tokenizer.chat_template or ""
    return str(template.get("default", "") if isinstance(template, dict) else template)


def _teacher_ids(
    row: PromptRow, tokenizer: Any, chat_template: str, special_tokens: dict[str, str], options: ChatOptions
) -> IntArray:
    if row.teacher_prompt is not None:
        return tokenise(tokenizer, row.teacher_prompt, add_special_tokens=True)
    messages = row.teacher_messages or row.messages
    if messages is None:
        return tokenise(tokenizer, row.prompt, add_special_tokens=True)
    if not chat_template:
        key = "messages" if row.teacher_messages is None else "teacher_messages"
        raise DataError(
            f"{row.source}: {key} need a chat template, and the teacher has none; give plain text as teacher_prompt"
        )
    if len(chat_template) > MAX_TEMPLATE_CHARACTERS:
        raise DataError(
            f"{row.source}: the teacher's chat template has {len(chat_template)} characters, "
            f"more than {MAX_TEMPLATE_CHARACTERS}"
        )
    variables = special_tokens | options.for_template(chat_template, "the teacher's")
    return _chat_ids(tokenizer, messages, chat_template, variables, f"{row.source}: the teacher's chat template")


def _chat_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    chat_template: str | None,
    variables: dict[str, Any],
    where: str,
) -> IntArray:
    text = chat_text(tokenizer, messages, chat_template, variables, where)
    return tokenise(tokenizer, text, add_special_tokens=False)


def chat_text(
    tokenizer: Any,
    messages: Sequence[Message],
    chat_template: str | None,
    variables: dict[str, Any],
    where: str,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The chat up to where the reply begins, or to its end; `chat_template` None: the tokenizer's own.

    Raises: DataError that starts with `where`.
    """
    import jinja2

    try:
        # Compiled by transformers in jinja2's ImmutableSandboxedEnvironment.
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **variables,
        )
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        raise DataError(f"{where} cannot render this row: {error}") from error
    if len(rendered) > MAX_RENDERED_CHARACTERS:
        raise DataError(f"{where} renders {len(rendered)} characters, more than {MAX_RENDERED_CHARACTERS}")
    return str(rendered)


def tokenise(tokenizer: Any, text: str | None, *, add_special_tokens: bool) -> IntArray:
    """Token ids, [C] int64."""
    assert text is not None  # a row has a prompt or messages
    # verbose=False: lengths are checked here, against the models' own limits.
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return np.asarray(ids, dtype=np.int64)


def _check_lengths(
    source: str,
    *,
    num_student: int,
    num_teacher: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    student_max_length: int,
    teacher_max_length: int,
) -> None:
    if num_student == 0 or num_teacher == 0:
        raise DataError(f"{source}: the {'student' if num_student == 0 else 'teacher'} would see no tokens at all")
    if num_student > max_prompt_tokens:
        raise DataError(f"{source}: prompt {num_student} tokens > max_prompt_tokens {max_prompt_tokens}")
    for who, num_context, max_length in (
        ("student", num_student, student_max_length),
        ("teacher", num_teacher, teacher_max_length),
    ):
        if num_context + max_new_tokens > max_length:
            raise DataError(
                f"{source}: {who}'s context {num_context} + completion {max_new_tokens} tokens "
                f"> the {who}'s maximum {max_length}"
            )


def _text_to_show(row: PromptRow) -> str:
    if row.prompt is not None:
        return row.prompt
    assert row.messages is not None
    asked = [message["content"] for message in row.messages if message["role"] == "user"]
    return str(asked[-1] if asked else row.messages[-1]["content"])
