"""How a list of sequences becomes Score requests: pure, within the teacher's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vopd_client.errors import TeacherRequestError
from vopd_client.teacher.codec import pack_ids, sequence_message
from vopd_client.types import Candidates, HiddenStates, SequenceToScore, TeacherTopK
from vopd_proto import SEQUENCE_OVERHEAD_BYTES
from vopd_proto import teacher_pb2 as pb


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one Score request may hold; 0 means that the teacher names no limit."""

    max_sequences: int
    max_tokens: int  # context + completion, over all sequences
    max_message_bytes: int
    hidden_size: int  # of the teacher's hidden states, which are as large as answers get


@dataclass(frozen=True, slots=True)
class _Size:
    """Of one sequence or of a request so far. Bytes are upper bounds: 4 an integer and 4 a float."""

    sequences: int = 0
    tokens: int = 0
    request_bytes: int = 0
    answer_bytes: int = 0

    def plus(self, other: _Size) -> _Size:
        return _Size(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.request_bytes + other.request_bytes,
            self.answer_bytes + other.answer_bytes,
        )

    def fits(self, limits: RequestLimits) -> bool:
        return (
            self.sequences <= (limits.max_sequences or self.sequences)
            and self.tokens <= (limits.max_tokens or self.tokens)
            and max(self.request_bytes, self.answer_bytes) <= limits.max_message_bytes
        )


def _size_of(sequence: SequenceToScore, *, hidden_size: int) -> _Size:
    num_rows = len(sequence.completion_ids)
    num_tokens = len(sequence.context_ids) + num_rows
    request_bytes, answer_bytes = 4 * num_tokens, 4 * num_rows
    match sequence.support:
        case TeacherTopK(k=k):
            answer_bytes += 8 * num_rows * k
        case Candidates(ids=ids):
            request_bytes += 4 * (num_rows + len(ids))
            answer_bytes += 4 * len(ids)
        case HiddenStates():
            answer_bytes += 4 * num_rows * hidden_size
    return _Size(1, num_tokens, request_bytes + SEQUENCE_OVERHEAD_BYTES, answer_bytes + SEQUENCE_OVERHEAD_BYTES)


def plan_requests(sequences: Sequence[SequenceToScore], limits: RequestLimits) -> list[list[int]]:
    """Which sequences travel together: indices into `sequences`, each exactly once.

    Sequences of one context go side by side, so that the context is sent and computed once. A sequence
    that exceeds the limits by itself gets a request of its own, for the teacher to answer.
    """
    order_of_context: dict[bytes, int] = {}
    for sequence in sequences:
        order_of_context.setdefault(sequence.context_ids.tobytes(), len(order_of_context))
    by_context = sorted(
        range(len(sequences)), key=lambda index: order_of_context[sequences[index].context_ids.tobytes()]
    )
    plan: list[list[int]] = []
    filled = _Size()
    for index in by_context:
        size = _size_of(sequences[index], hidden_size=limits.hidden_size)
        if plan and filled.plus(size).fits(limits):
            plan[-1].append(index)
            filled = filled.plus(size)
        else:
            plan.append([index])
            filled = size
    return plan


def score_request(
    sequences: Sequence[SequenceToScore],
    *,
    request_id: str,
    temperature: float,
    float_type: pb.FloatType,
    max_message_bytes: int,
) -> pb.ScoreRequest:
    """The request for `sequences`, answered in their order; equal contexts are sent once.

    Raises: AlignmentError, TeacherRequestError for sequences that cannot be sent as they are.
    """
    request = pb.ScoreRequest(request_id=request_id, temperature=temperature, float_type=float_type)
    context_indices: dict[bytes, int] = {}
    for position, sequence in enumerate(sequences):
        key = sequence.context_ids.tobytes()
        if key not in context_indices:
            context_indices[key] = len(request.contexts)
            request.contexts.append(pack_ids("context_ids", sequence.context_ids))
        request.sequences.append(
            sequence_message(sequence, sequence_id=str(position), context_index=context_indices[key])
        )
    check_message_size(request, max_message_bytes)
    return request


def check_message_size(message: pb.ScoreRequest | pb.Sequence | pb.UIntArray, max_message_bytes: int) -> None:
    """A message that is too large fails here: on the wire it would look like a full queue.

    Raises: TeacherRequestError with both sizes.
    """
    size = message.ByteSize()
    if size > max_message_bytes:
        raise TeacherRequestError(
            f"a message of {size} bytes exceeds the teacher's limit of {max_message_bytes}: "
            "score fewer tokens at once, or fewer candidates a position"
        )
