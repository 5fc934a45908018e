"""From the service to the wire: scores as messages, whole or in row chunks. `codec` is the way in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vopd_proto import SEQUENCE_OVERHEAD_BYTES
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import Float32Array, pack_floats, pack_uints
from vopd_server.errors import InvalidRequestError
from vopd_server.types import Candidates, EngineInfo, HiddenStates, ScoreRequest, Scores, TeacherTopK, TokenizerInfo
from vopd_server.validation import Limits, SequenceShape

CHUNK_BYTES = 2**20  # a chunk of a streamed answer, at most, unless one row alone is larger


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the floats of answers travel, and how many there are in a hidden state."""

    logprob_type: pb.FloatType
    hidden_type: pb.FloatType
    hidden_size: int

    @property
    def logprob_bytes(self) -> int:
        return float_bytes(self.logprob_type)

    @property
    def hidden_row_bytes(self) -> int:
        return float_bytes(self.hidden_type) * self.hidden_size


def answer_format_of(info: EngineInfo, float_type: pb.FloatType) -> AnswerFormat:
    """Hidden states keep their bits where the model has 16 of them, whatever type the client asked for."""
    own_types: dict[str, pb.FloatType] = {"bfloat16": pb.BFLOAT16, "float16": pb.FLOAT16}
    return AnswerFormat(float_type, own_types.get(info.dtype, float_type), info.hidden_size)


def json_format(info: EngineInfo) -> AnswerFormat:
    """For bounding an answer that is going to be JSON, whose numbers are as wide as float32."""
    return AnswerFormat(pb.FLOAT32, pb.FLOAT32, info.hidden_size)


def pack_scores(
    sequence_id: str,
    request: ScoreRequest,
    scores: Scores,
    answer_format: AnswerFormat,
    rows: slice = slice(None),
) -> pb.SequenceScores:
    """The answer to one sequence, or those of its rows that one chunk holds."""
    sampled_T = scores.sampled_logprobs_T[rows]
    packed = pb.SequenceScores(
        sequence_id=sequence_id,
        num_rows=len(sampled_T),
        sampled_logprobs=pack_floats(sampled_T, answer_format.logprob_type),
        queue_time_s=scores.queue_time_s,
        engine_time_s=scores.engine_time_s,
    )
    if scores.hidden_states_TH is not None:
        packed.hidden_states.CopyFrom(_pack_hidden(scores.hidden_states_TH[rows], answer_format.hidden_type))
    if scores.support_logprobs is None:
        return packed
    if isinstance(request.support, Candidates):
        first_row, last_row, _ = rows.indices(len(scores.sampled_logprobs_T))
        start = int(request.support.counts_T[:first_row].sum())
        stop = start + int(request.support.counts_T[first_row:last_row].sum())
        packed.support_logprobs.CopyFrom(pack_floats(scores.support_logprobs[start:stop], answer_format.logprob_type))
    else:
        packed.k = scores.support_logprobs.shape[1]
        packed.support_logprobs.CopyFrom(pack_floats(scores.support_logprobs[rows], answer_format.logprob_type))
    if scores.support_ids_TK is not None:
        packed.support_ids.CopyFrom(pack_uints(scores.support_ids_TK[rows]))
    return packed


def _pack_hidden(hidden_TH: Float32Array, float_type: pb.FloatType) -> pb.FloatArray:
    """As `pack_floats`; what came from bfloat16 has nothing to round, which takes most of the time."""
    if float_type == pb.BFLOAT16:
        halves = np.ascontiguousarray(hidden_TH, "<f4").reshape(-1).view("<u2")
        if not halves[::2].any():  # the lower halves
            return pb.FloatArray(type=pb.BFLOAT16, data=halves[1::2].tobytes())
    return pack_floats(hidden_TH, float_type)


def pack_response(
    request: pb.ScoreRequest, request_id: str, info: EngineInfo, scored: Sequence[tuple[ScoreRequest, Scores]]
) -> pb.ScoreResponse:
    """The answer to a unary request, in its order."""
    answer_format = answer_format_of(info, request.float_type)
    return pb.ScoreResponse(
        request_id=request_id,
        model_revision=info.model_revision,
        scores=[
            pack_scores(sequence.sequence_id, asked, scores, answer_format)
            for sequence, (asked, scores) in zip(request.sequences, scored, strict=True)
        ],
    )


def pack_chunks(
    sequence_id: str,
    request: ScoreRequest,
    scores: Scores,
    answer_format: AnswerFormat,
    *,
    max_bytes: int = CHUNK_BYTES,
) -> Iterator[pb.ScoreChunk]:
    """The answer to one sequence as row chunks, in row order; one chunk without rows for an empty completion."""
    chunks = plan_chunks(_row_bytes(request, answer_format), max_bytes=max_bytes)
    for index, rows in enumerate(chunks):
        yield pb.ScoreChunk(
            scores=pack_scores(sequence_id, request, scores, answer_format, rows),
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


def answer_bytes(shape: SequenceShape, answer_format: AnswerFormat) -> int:
    """An upper bound on the bytes of a sequence's answer."""
    id_bytes = 4 * shape.num_support if shape.kind == "teacher_top_k" else 0
    hidden_bytes = answer_format.hidden_row_bytes * shape.completion_length if shape.kind == "hidden_states" else 0
    logprob_bytes = answer_format.logprob_bytes * (shape.completion_length + shape.num_support)
    return SEQUENCE_OVERHEAD_BYTES + id_bytes + hidden_bytes + logprob_bytes


def check_answer_fits(
    shapes: Sequence[SequenceShape], answer_format: AnswerFormat, max_bytes: int, *, limit: str = "max_message_bytes"
) -> None:
    """Refuses, before any work, a unary request whose answer could not be sent. limit: what `max_bytes` is called.

    Raises: InvalidRequestError.
    """
    needed = sum(answer_bytes(shape, answer_format) for shape in shapes)
    if needed > max_bytes:
        raise InvalidRequestError(
            "sequences",
            f"an answer of up to {needed} bytes > {limit} {max_bytes}: send fewer sequences or a smaller support, "
            "or use ScoreStream",
        )


def float_bytes(float_type: int) -> int:
    return 2 if float_type in (pb.FLOAT16, pb.BFLOAT16) else 4


def _row_bytes(request: ScoreRequest, answer_format: AnswerFormat) -> npt.NDArray[np.int64]:
    """[T] upper bounds on what each row takes on the wire."""
    num_rows = len(request.completion_ids)
    bytes_per_float = answer_format.logprob_bytes
    match request.support:
        case TeacherTopK(k=k):
            return np.full(num_rows, bytes_per_float * (1 + k) + 4 * k, np.int64)
        case Candidates(counts_T=counts_T):
            return bytes_per_float * (1 + counts_T)
        case HiddenStates():
            return np.full(num_rows, bytes_per_float + answer_format.hidden_row_bytes, np.int64)
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
        head_sha256="" if info.head is None else info.head.sha256,
    )


def pack_tokenizer(tokenizer: TokenizerInfo) -> pb.GetTokenizerResponse:
    return pb.GetTokenizerResponse(tokens=tokenizer.tokens, tokenizer_json=tokenizer.tokenizer_json)
