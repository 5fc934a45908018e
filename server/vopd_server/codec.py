"""From the wire to the service: protobuf messages to values. `answer_codec` is the way back.

Nothing here knows of a transport. Bytes that make no message, fields that nobody knows and lengths that
disagree with their arrays are InvalidRequestError, which names the field.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from vopd_proto import MAX_NAME_LENGTH
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import ArrayError, IntArray, num_uints, unpack_uints
from vopd_server.errors import InvalidRequestError
from vopd_server.types import (
    Candidates,
    HiddenStates,
    NoSupport,
    ScoreRequest,
    Support,
    SupportKind,
    TeacherTopK,
)
from vopd_server.validation import SequenceShape

MAX_NUMBERS_NAMED = 8  # unknown fields in an error message, which travels in a header of limited size

M = TypeVar("M", bound=Message)
SUPPORT_KINDS: dict[str | None, SupportKind] = {
    None: "sampled",
    "teacher_top_k": "teacher_top_k",
    "candidates": "candidates",
    "hidden_states": "hidden_states",
}


def parse(message_type: type[M], data: bytes) -> M:
    """The message that `data` holds.

    Raises: InvalidRequestError for bytes that are no such message.
    """
    message = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        name = message_type.DESCRIPTOR.name
        raise InvalidRequestError(name, f"{len(data)} bytes that are no {name} message") from error
    return message


def check_no_unknown_fields(message: Message, field: str = "") -> None:
    """A field that this version does not know would otherwise be ignored, and the answer be to another question.

    Raises: InvalidRequestError naming the field numbers.
    """
    unknown_fields: Iterable[Any] = UnknownFieldSet(message)  # type: ignore[assignment]  # the stubs lack it
    numbers = sorted({unknown.field_number for unknown in unknown_fields})
    if numbers:
        named = ", ".join(map(str, numbers[:MAX_NUMBERS_NAMED]))
        more = f" and {len(numbers) - MAX_NUMBERS_NAMED} more" if len(numbers) > MAX_NUMBERS_NAMED else ""
        name = message.DESCRIPTOR.name
        raise InvalidRequestError(field or name, f"unknown fields in {name}, by number: {named}{more}")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        path = f"{field}.{descriptor.name}" if field else descriptor.name
        if isinstance(value, Message):
            check_no_unknown_fields(value, path)
        else:
            for index, item in enumerate(value):
                check_no_unknown_fields(item, f"{path}[{index}]")


def check_name(field: str, name: str) -> None:
    """Raises: InvalidRequestError for an id too long to be echoed and logged."""
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidRequestError(field, f"{len(name)} characters > {MAX_NAME_LENGTH}")


def request_id_of(message: pb.ScoreRequest | pb.StreamSettings) -> str:
    """The client's own id, or a new one. Raises: InvalidRequestError."""
    check_name("request_id", message.request_id)
    return message.request_id or uuid.uuid4().hex


def check_float_type(float_type: int) -> None:
    """Raises: InvalidRequestError for a float type this version does not know."""
    if float_type not in pb.FloatType.values():
        known = ", ".join(name for name in pb.FloatType.keys() if name != "FLOAT_TYPE_UNSPECIFIED")  # noqa: SIM118
        raise InvalidRequestError("float_type", f"{float_type} is not known; {known} are")


def temperature_of(message: pb.ScoreRequest | pb.StreamSettings) -> float:
    """1 where it is not set."""
    return message.temperature if message.HasField("temperature") else 1.0


def shape_of(sequence: pb.Sequence, *, field: str, num_context_ids: int) -> SequenceShape:
    """The lengths of a sequence, from the message alone: no array is unpacked.

    Raises: InvalidRequestError when the declared lengths disagree with the arrays.
    """
    check_name(f"{field}.sequence_id", sequence.sequence_id)
    kind = SUPPORT_KINDS[sequence.WhichOneof("support")]
    _check_declared(f"{field}.context_length", sequence.context_length, num_context_ids)
    _check_declared(f"{field}.completion_length", sequence.completion_length, num_uints(sequence.completion_ids))
    _check_declared(f"{field}.num_candidates", sequence.num_candidates, num_uints(sequence.candidates.ids))
    return SequenceShape(
        field=field,
        context_length=sequence.context_length,
        completion_length=sequence.completion_length,
        kind=kind,
        k=sequence.teacher_top_k.k,
        num_candidates=sequence.num_candidates,
    )


def shapes_of_request(request: pb.ScoreRequest) -> list[SequenceShape]:
    """The lengths of all sequences of a unary request. Raises: InvalidRequestError."""
    shapes = []
    for index, sequence in enumerate(request.sequences):
        field = f"sequences[{index}]"
        if sequence.context_index >= len(request.contexts):
            raise InvalidRequestError(
                f"{field}.context_index",
                f"{sequence.context_index}; the request holds {len(request.contexts)} contexts",
            )
        num_context_ids = num_uints(request.contexts[sequence.context_index])
        shapes.append(shape_of(sequence, field=field, num_context_ids=num_context_ids))
    return shapes


def unpack_request(request: pb.ScoreRequest, request_id: str) -> list[ScoreRequest]:
    """The sequences of a unary request, whose shapes have been checked; equal contexts are one array.

    Raises: InvalidRequestError.
    """
    used = sorted({sequence.context_index for sequence in request.sequences})
    contexts = {index: unpack_ids(request.contexts[index], f"contexts[{index}]") for index in used}
    return [
        unpack_sequence(
            sequence,
            field=f"sequences[{index}]",
            context_ids=contexts[sequence.context_index],
            request_id=request_id,
            temperature=temperature_of(request),
        )
        for index, sequence in enumerate(request.sequences)
    ]


def unpack_ids(array: pb.UIntArray, field: str) -> IntArray:
    """[N] int64. Raises: InvalidRequestError for bytes that are no whole number of items."""
    try:
        return unpack_uints(array)
    except ArrayError as error:
        raise InvalidRequestError(field, str(error)) from error


def unpack_sequence(
    sequence: pb.Sequence, *, field: str, context_ids: IntArray, request_id: str, temperature: float
) -> ScoreRequest:
    """The sequence as the service speaks of it. Raises: InvalidRequestError."""
    return ScoreRequest(
        request_id=request_id,
        context_ids=context_ids,
        completion_ids=unpack_ids(sequence.completion_ids, f"{field}.completion_ids"),
        support=_unpack_support(sequence, field),
        temperature=temperature,
    )


def _unpack_support(sequence: pb.Sequence, field: str) -> Support:
    match SUPPORT_KINDS[sequence.WhichOneof("support")]:
        case "sampled":
            return NoSupport()
        case "teacher_top_k":
            return TeacherTopK(sequence.teacher_top_k.k)
        case "candidates":
            return Candidates(
                unpack_ids(sequence.candidates.ids, f"{field}.candidates.ids"),
                unpack_ids(sequence.candidates.counts, f"{field}.candidates.counts"),
            )
        case "hidden_states":
            return HiddenStates()


def _check_declared(field: str, declared: int, found: int) -> None:
    if declared != found:
        raise InvalidRequestError(field, f"declared {declared}; the message holds {found}")
