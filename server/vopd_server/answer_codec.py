"""From the service to the wire: scores as messages, whole or in row chunks. `codec` is the way in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vopd_proto import SEQUENCE_OVERHEAD_BYTES
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import pack_floats, pack_uints
from vopd_server.errors import InvalidRequestError
from vopd_server.types import Candidates, EngineInfo, ScoreRequest, Scores, TeacherTopK, TokenizerInfo
from vopd_server.validation import Limits, SequenceShape

CHUNK_BYTES = 2**20  # a chunk of a streamed answer, at most, unless one row alone is larger


def pack_scores(
    sequence_id: str,
    request: ScoreRequest,
    scores: Scores,
    float_type: pb.FloatType,
    rows: slice = slice(None),
) -> pb.SequenceScores:
    """The answer to one sequence, or those of its rows that one chunk holds."""
    sampled_T = scores.sampled_logprobs_T[rows]
    packed = pb.SequenceScores(
        sequence_id=sequence_id,
        num_rows=len(sampled_T),
        sampled_logprobs=pack_floats(sampled_T, float_type),
        queue_time_s=scores.queue_time_s,
        engine_time_s=scores.engine_time_s,
    )
    if scores.support_logprobs is None:
        return packed
    if isinstance(request.support, Candidates):
        first_row, last_row, _ = rows.indices(len(scores.sampled_logprobs_T))
        start = int(request.support.counts_T[:first_row].sum())
        stop = start + int(request.support.counts_T[first_row:last_row].sum())
        packed.support_logprobs.CopyFrom(pack_floats(scores.support_logprobs[start:stop], float_type))
    else:
        packed.k = scores.support_logprobs.shape[1]
        packed.support_logprobs.CopyFrom(pack_floats(scores.support_logprobs[rows], float_type))
    if scores.support_ids_TK is not None:
        packed.support_ids.CopyFrom(pack_uints(scores.support_ids_TK[rows]))
    return packed


def pack_response(
    request: pb.ScoreRequest, request_id: str, model_revision: str, scored: Sequence[tuple[ScoreRequest, Scores]]
) -> pb.ScoreResponse:
    """The answer to a unary request, in its order."""
    return pb.ScoreResponse(
        request_id=request_id,
        model_revision=model_revision,
        scores=[
            pack_scores(sequence.sequence_id, asked, scores, request.float_type)
            for sequence, (asked, scores) in zip(request.sequences, scored, strict=True)
        ],
    )


def pack_chunks(
    sequence_id: str,
    request: ScoreRequest,
    scores: Scores,
    float_type: pb.FloatType,
    *,
    max_bytes: int = CHUNK_BYTES,
) -> Iterator[pb.ScoreChunk]:
    """The answer to one sequence as row chunks, in row order; one chunk without rows for an empty completion."""
    chunks = plan_chunks(_row_bytes(request, float_bytes(float_type)), max_bytes=max_bytes)
    for index, rows in enumerate(chunks):
        yield pb.ScoreChunk(
            scores=pack_scores(sequence_id, request, scores, float_type, rows),
            first_row=rows.start,
            is_last=index == len(chunks) - 1,
        )


def plan_chunks(row_bytes_T: npt.NDArray[np.int64], *, max_bytes: int) -> list[slice]:
    """Cuts rows into runs of at most `max_bytes`, each as long as it can be; a larger row stands alone.

    At least one run, which is empty when there are no rows.
    """
    ends = np.cumsum(row_bytes_T)
    chunks: list[slice] = []
    first_row = 0
    while first_row < len(ends):
        before = int(ends[first_row - 1]) if first_row else 0
        stop = max(int(np.searchsorted(ends, before + max_bytes, side="right")), first_row + 1)
        chunks.append(slice(first_row, stop))
        first_row = stop
    return chunks or [slice(0, 0)]


def answer_bytes(shape: SequenceShape, float_type: int) -> int:
    """An upper bound on the bytes of a sequence's answer."""
    id_bytes = 4 * shape.num_support if shape.kind == "teacher_top_k" else 0
    return SEQUENCE_OVERHEAD_BYTES + id_bytes + float_bytes(float_type) * (shape.completion_length + shape.num_support)


def check_answer_fits(
    shapes: Sequence[SequenceShape], float_type: int, max_bytes: int, *, limit: str = "max_message_bytes"
) -> None:
    """Refuses, before any work, a unary request whose answer could not be sent. limit: what `max_bytes` is called.

    Raises: InvalidRequestError.
    """
    needed = sum(answer_bytes(shape, float_type) for shape in shapes)
    if needed > max_bytes:
        raise InvalidRequestError(
            "sequences",
            f"an answer of up to {needed} bytes > {limit} {max_bytes}: send fewer sequences or a smaller support, "
            "or use ScoreStream",
        )


def float_bytes(float_type: int) -> int:
    return 2 if float_type in (pb.FLOAT16, pb.BFLOAT16) else 4


def _row_bytes(request: ScoreRequest, bytes_per_float: int) -> npt.NDArray[np.int64]:
    """[T] upper bounds on what each row takes on the wire."""
    num_rows = len(request.completion_ids)
    match request.support:
        case TeacherTopK(k=k):
            return np.full(num_rows, bytes_per_float * (1 + k) + 4 * k, np.int64)
        case Candidates(counts_T=counts_T):
            return bytes_per_float * (1 + counts_T)
        case _:
            return np.full(num_rows, bytes_per_float, np.int64)


def pack_info(info: EngineInfo, tokenizer: TokenizerInfo, limits: Limits, server_version: str) -> pb.GetInfoResponse:
    """What this teacher is, for the handshake."""
    return pb.GetInfoResponse(
        model_id=info.model_id,
        model_revision=info.model_revision,
        tokenizer=pb.TokenizerInfo(
            fingerprint=tokenizer.fingerprint,
            num_ids=len(tokenizer.tokens),
            begin_id=tokenizer.begin_id,
            end_ids=tokenizer.end_ids,
            pad_id=tokenizer.pad_id,
        ),
        chat_template=tokenizer.chat_template,
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        max_context_length=limits.max_context_length,
        dtype=info.dtype,
        engine=info.engine,
        engine_version=info.engine_version,
        supports=pb.Supports(**dict.fromkeys(info.supports, True)),
        any_temperature=info.any_temperature,
        deterministic=info.deterministic,
        limits=pb.Limits(
            max_sequences_per_request=limits.max_sequences_per_request,
            max_tokens_per_request=limits.max_tokens_per_request,
            max_support_size=min(limits.max_top_k, info.vocab_size),
            max_message_bytes=limits.max_message_bytes,
        ),
        server_version=server_version,
    )


def pack_tokenizer(tokenizer: TokenizerInfo) -> pb.GetTokenizerResponse:
    return pb.GetTokenizerResponse(tokens=tokenizer.tokens, tokenizer_json=tokenizer.tokenizer_json)
