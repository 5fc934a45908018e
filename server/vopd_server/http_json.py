"""The messages of teacher.proto as JSON for people: numbers and lists, the same names.

A JSON request becomes the protobuf message that says the same, so that both are checked and answered in one way.
Minus infinity, which JSON has no number for, is the string "-Infinity", as in protobuf's own JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vopd_proto import MAX_NAME_LENGTH
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import Float32Array, pack_uints, unpack_floats, unpack_uints
from vopd_server.errors import InvalidRequestError

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
Logprob = float | Literal["-Infinity"]

# Told in the schema; refused where protobuf's empty lists are, in the same words.
NOT_EMPTY = Field(json_schema_extra={"minItems": 1})

MAX_PROBLEMS_NAMED = 4
FLOAT32_DIGITS = 9  # significant decimal digits that tell every float32 from every other


class _Body(BaseModel):
    """Unknown fields are errors, and `"5"` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# ---------------------------------------------------------------- requests


class SequenceBody(_Body):
    """One completion to score, after the context of that index. At most one kind of support."""

    sequence_id: Name = Field("", description="Echoed; need not be unique.")
    context_index: int = Field(0, ge=0, lt=2**32, description="Index into contexts.")
    completion_ids: list[TokenId]
    teacher_top_k: int | None = Field(None, ge=0, lt=2**32, description="The teacher's own k most likely ids a row.")
    candidates: list[list[TokenId]] | None = Field(None, description="Ids to score, a list a completion token.")
    hidden_states: bool = Field(False, description="Final hidden states, for the output head of /v1/head.")


class ScoreBody(_Body):
    """A small batch: answered in its order, all or nothing."""

    request_id: Name = Field("", description="For the logs; made by the teacher when empty.")
    temperature: float | None = Field(
        None,
        json_schema_extra={"exclusiveMinimum": 0},
        description="Logits are divided by it before the softmax; unset: 1.",
    )
    contexts: list[Annotated[list[TokenId], NOT_EMPTY]] = Field(
        description="Token ids; a context shared by several sequences stands once."
    )
    sequences: Annotated[list[SequenceBody], NOT_EMPTY]


def parse_score_body(body: bytes) -> pb.ScoreRequest:
    """The protobuf message that a JSON body says.

    Raises: InvalidRequestError naming the first wrong fields.
    """
    try:
        parsed = ScoreBody.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error, whole="ScoreRequest") from error
    try:
        return pb.ScoreRequest(
            request_id=parsed.request_id,
            temperature=parsed.temperature,
            contexts=[_ids(context) for context in parsed.contexts],
            sequences=[_sequence(sequence, parsed.contexts, index) for index, sequence in enumerate(parsed.sequences)],
        )
    except UnicodeEncodeError as error:  # half of a surrogate pair is JSON and no text
        raise InvalidRequestError("ScoreRequest", f"text that is not Unicode: {error.reason}") from error


def _sequence(body: SequenceBody, contexts: Sequence[Sequence[int]], index: int) -> pb.Sequence:
    kinds = {
        "teacher_top_k": body.teacher_top_k is not None,
        "candidates": body.candidates is not None,
        "hidden_states": body.hidden_states,
    }
    asked = [kind for kind, is_asked in kinds.items() if is_asked]
    if len(asked) > 1:
        raise InvalidRequestError(f"sequences[{index}]", f"{' and '.join(asked)}: a sequence has one support")
    message = pb.Sequence(
        sequence_id=body.sequence_id,
        context_index=body.context_index,
        context_length=len(contexts[body.context_index]) if body.context_index < len(contexts) else 0,
        completion_length=len(body.completion_ids),
        completion_ids=_ids(body.completion_ids),
    )
    if body.teacher_top_k is not None:
        message.teacher_top_k.k = body.teacher_top_k
    elif body.candidates is not None:
        flat = [candidate for row in body.candidates for candidate in row]
        message.num_candidates = len(flat)
        message.candidates.ids.CopyFrom(_ids(flat))
        message.candidates.counts.CopyFrom(_ids([len(row) for row in body.candidates]))
    elif body.hidden_states:
        message.hidden_states.SetInParent()
    return message


def _ids(values: Sequence[int]) -> pb.UIntArray:
    return pack_uints(np.asarray(values, np.int64))


def invalid_body(error: ValidationError, *, whole: str) -> InvalidRequestError:
    """`sequences[0].completion_ids[3]: Input should be a valid integer`. whole: what a body is called as a whole."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    field = _path(problems[0]["loc"])
    told = [f"{_path(problem['loc'])}: {problem['msg']}".removeprefix(": ") for problem in problems]
    if len(told) > MAX_PROBLEMS_NAMED:
        told[MAX_PROBLEMS_NAMED:] = [f"and {len(told) - MAX_PROBLEMS_NAMED} more"]
    message = "; ".join(told)
    return InvalidRequestError(field or whole, message.removeprefix(f"{field}: ") if field else message)


def _path(loc: Sequence[int | str]) -> str:
    """("sequences", 0, "completion_ids") as sequences[0].completion_ids."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


# ---------------------------------------------------------------- answers


class SequenceAnswer(BaseModel):
    """The scores of one sequence; entry t of every list belongs to completion token t. Natural logarithm."""

    sequence_id: str
    sampled_logprobs: list[Logprob]
    support_logprobs: list[list[Logprob]] | None = Field(
        description="teacher_top_k: most likely first. candidates: as they were asked for. Otherwise null."
    )
    support_ids: list[list[int]] | None = Field(description="teacher_top_k only.")
    hidden_states: list[list[float]] | None = Field(
        description="hidden_states only: what the output head of /v1/head turns into the whole distribution."
    )
    queue_time_s: float
    engine_time_s: float = Field(description="Of the engine batch that this sequence was part of.")


class ScoreAnswer(BaseModel):
    """One entry a sequence, in the order of the request."""

    request_id: str
    model_revision: str
    scores: list[SequenceAnswer]


def score_answer(request: pb.ScoreRequest, response: pb.ScoreResponse) -> bytes:
    """`response` as the JSON of a ScoreAnswer."""
    scores = [
        _sequence_answer(sequence, answered)
        for sequence, answered in zip(request.sequences, response.scores, strict=True)
    ]
    answer = {"request_id": response.request_id, "model_revision": response.model_revision, "scores": scores}
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()


def _sequence_answer(asked: pb.Sequence, answered: pb.SequenceScores) -> dict[str, Any]:
    support_logprobs = support_ids = hidden_states = None
    match asked.WhichOneof("support"):
        case "teacher_top_k":
            shape = (answered.num_rows, answered.k)
            support_logprobs = _rows(unpack_floats(answered.support_logprobs), [answered.k] * answered.num_rows)
            support_ids = unpack_uints(answered.support_ids).reshape(shape).tolist()
        case "candidates":
            counts = unpack_uints(asked.candidates.counts).tolist()
            support_logprobs = _rows(unpack_floats(answered.support_logprobs), counts)
        case "hidden_states":
            flat = unpack_floats(answered.hidden_states)
            hidden_size = len(flat) // max(answered.num_rows, 1)
            hidden_states = _rows(flat, [hidden_size] * answered.num_rows)
    return {
        "sequence_id": answered.sequence_id,
        "sampled_logprobs": _numbers(unpack_floats(answered.sampled_logprobs)),
        "support_logprobs": support_logprobs,
        "support_ids": support_ids,
        "hidden_states": hidden_states,
        "queue_time_s": _number(answered.queue_time_s),
        "engine_time_s": _number(answered.engine_time_s),
    }


def _rows(flat: Float32Array, counts: Sequence[int]) -> list[list[Logprob]]:
    """[sum of counts] values, a list a row."""
    numbers = _numbers(flat)
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return [numbers[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _numbers(values: Float32Array) -> list[Logprob]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> Logprob:
    """The shortest usual decimal that reads back as the same float32."""
    return "-Infinity" if value == -math.inf else float(f"{value:.{FLOAT32_DIGITS}g}")
