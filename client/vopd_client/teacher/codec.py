"""Between this package's types and the wire's messages. Every answer is checked against its request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from vopd_client.errors import AlignmentError, TeacherRequestError
from vopd_client.teacher.score_checks import checked_scores
from vopd_client.types import (
    Candidates,
    HiddenStates,
    NoSupport,
    SequenceScores,
    SequenceToScore,
    SupportKind,
    TeacherInfo,
    TeacherTopK,
)
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import ArrayError, Float32Array, IntArray, pack_uints, unpack_floats, unpack_uints

FloatTypeName = Literal["float32", "float16", "bfloat16"]

FLOAT_TYPES: dict[FloatTypeName, pb.FloatType] = {
    "float32": pb.FLOAT32,
    "float16": pb.FLOAT16,
    "bfloat16": pb.BFLOAT16,
}


def teacher_info(response: pb.GetInfoResponse) -> TeacherInfo:
    """What the teacher said of itself."""
    tokenizer, limits = response.tokenizer, response.limits
    offered: dict[SupportKind, bool] = {
        "sampled": response.supports.sampled,
        "teacher_top_k": response.supports.teacher_top_k,
        "candidates": response.supports.candidates,
        "hidden_states": response.supports.hidden_states,
    }
    return TeacherInfo(
        model_id=response.model_id,
        model_revision=response.model_revision,
        fingerprint=tokenizer.fingerprint,
        num_ids=tokenizer.num_ids,
        begin_id=tokenizer.begin_id if tokenizer.HasField("begin_id") else None,
        end_ids=tuple(tokenizer.end_ids),
        pad_id=tokenizer.pad_id if tokenizer.HasField("pad_id") else None,
        chat_template=response.chat_template,
        vocab_size=response.vocab_size,
        hidden_size=response.hidden_size,
        max_context_length=response.max_context_length,
        dtype=response.dtype,
        engine=response.engine,
        engine_version=response.engine_version,
        server_version=response.server_version,
        supports=frozenset(kind for kind, is_offered in offered.items() if is_offered),
        any_temperature=response.any_temperature,
        deterministic=response.deterministic,
        max_sequences_per_request=limits.max_sequences_per_request,
        max_tokens_per_request=limits.max_tokens_per_request,
        max_support_size=limits.max_support_size,
        head_sha256=response.head_sha256,
    )


def pack_ids(name: str, ids: npt.NDArray[np.integer]) -> pb.UIntArray:
    """Token ids for the wire.

    Raises: TeacherRequestError for an id that no vocabulary has.
    """
    try:
        return pack_uints(ids)
    except ArrayError as error:
        raise TeacherRequestError(f"{name}: {error}") from error


def sequence_message(sequence: SequenceToScore, *, sequence_id: str, context_index: int = 0) -> pb.Sequence:
    """One completion as a message; its context travels apart.

    Raises: AlignmentError for ragged candidates that do not add up, TeacherRequestError for impossible ids.
    """
    message = pb.Sequence(
        sequence_id=sequence_id,
        context_length=len(sequence.context_ids),
        completion_length=len(sequence.completion_ids),
        context_index=context_index,
        completion_ids=pack_ids("completion_ids", sequence.completion_ids),
    )
    match sequence.support:
        case TeacherTopK(k=k):
            if k < 1:
                raise TeacherRequestError(f"teacher_top_k.k is {k}; it must be at least 1")
            message.teacher_top_k.k = k
        case Candidates(ids=ids, counts_T=counts_T):
            _check_ragged(ids, counts_T, num_rows=len(sequence.completion_ids))
            message.num_candidates = len(ids)
            message.candidates.ids.CopyFrom(pack_ids("candidates.ids", ids))
            message.candidates.counts.CopyFrom(pack_ids("candidates.counts", counts_T))
        case HiddenStates():
            message.hidden_states.SetInParent()
        case NoSupport():
            pass
    return message


def _check_ragged(ids: IntArray, counts_T: IntArray, *, num_rows: int) -> None:
    if len(counts_T) != num_rows:
        raise AlignmentError(f"candidates have {len(counts_T)} counts for a completion of {num_rows} tokens")
    if int(counts_T.sum()) != len(ids):
        raise AlignmentError(f"candidate counts add up to {int(counts_T.sum())}, but there are {len(ids)} ids")


def decode_scores(
    sequence: SequenceToScore, chunks: Sequence[pb.SequenceScores], *, vocab_size: int, hidden_size: int
) -> SequenceScores:
    """The answer to `sequence`, from its row chunks in row order.

    Raises: AlignmentError for shapes or ids that do not fit the request, NonFiniteError for NaN and +inf
        anywhere, for a hidden state of -inf and for a sampled token with log-probability -inf.
    """
    for chunk in chunks:
        _check_chunk(sequence, chunk)
    sampled = _joined_floats([chunk.sampled_logprobs for chunk in chunks])
    support_logprobs = _joined_floats([chunk.support_logprobs for chunk in chunks])
    try:
        support_ids = unpack_uints(*(chunk.support_ids for chunk in chunks))
    except ArrayError as error:
        raise AlignmentError(f"support ids: {error}") from error
    return checked_scores(
        sequence,
        sampled_logprobs_T=sampled,
        support_logprobs=support_logprobs,
        top_k_ids=support_ids,
        hidden_states_TH=_joined_hidden_states(chunks, hidden_size=hidden_size),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        queue_time_s=max((chunk.queue_time_s for chunk in chunks), default=0.0),
        engine_time_s=max((chunk.engine_time_s for chunk in chunks), default=0.0),
    )


def _check_chunk(sequence: SequenceToScore, chunk: pb.SequenceScores) -> None:
    sampled = _joined_floats([chunk.sampled_logprobs])
    if len(sampled) != chunk.num_rows:
        raise AlignmentError(f"an answer of {chunk.num_rows} rows holds {len(sampled)} sampled log-probabilities")
    if isinstance(sequence.support, TeacherTopK) and chunk.num_rows and chunk.k != sequence.support.k:
        raise AlignmentError(f"asked for the teacher's top {sequence.support.k}, answered with its top {chunk.k}")


def _joined_hidden_states(chunks: Sequence[pb.SequenceScores], *, hidden_size: int) -> Float32Array | None:
    """[rows of all chunks, H], or None where no chunk holds any. Widened chunk by chunk: they are large."""
    if not any(chunk.hidden_states.data for chunk in chunks):
        return None
    joined_TH = np.empty((sum(chunk.num_rows for chunk in chunks), hidden_size), np.float32)
    first_row = 0
    for chunk in chunks:
        hidden = _joined_floats([chunk.hidden_states])
        if len(hidden) != chunk.num_rows * hidden_size:
            raise AlignmentError(
                f"an answer of {chunk.num_rows} rows holds {len(hidden)} numbers of hidden states, "
                f"not {chunk.num_rows} x {hidden_size}"
            )
        joined_TH[first_row : first_row + chunk.num_rows] = hidden.reshape(chunk.num_rows, hidden_size)
        first_row += chunk.num_rows
    return joined_TH


def _joined_floats(arrays: Sequence[pb.FloatArray]) -> Float32Array:
    try:
        return unpack_floats(*arrays)
    except ArrayError as error:
        raise AlignmentError(f"scores: {error}") from error
