"""Do replicas agree? Each new connection scores a fixed sequence, compared with what the first one scored.

A revision is only a name. Other weights under it, another quantisation of them or a broken device answer without an
error, and a student would learn from a mixture of two teachers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
import numpy as np

from vopd_client.errors import AlignmentError, HandshakeError
from vopd_client.handshake import check_revision
from vopd_client.teacher.codec import decode_scores
from vopd_client.teacher.requests import score_request
from vopd_client.teacher.status import Failure
from vopd_client.teacher.transport import CallFailed, Transport
from vopd_client.types import SequenceToScore, TeacherInfo
from vopd_proto import MAX_MESSAGE_BYTES
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import Float32Array, IntArray

PROBE_TIMEOUT_S = 60.0
NUM_CONTEXT_TOKENS, NUM_COMPLETION_TOKENS = 8, 56
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What log-probabilities of the same tokens may differ by where nothing is wrong."""

    mean_nats: float
    largest_nats: float


# Measured with SmolLM2-135M on a CPU over the golden sequence, mean and largest. In float32 the same weights give the
# same bits alone and in company, 8-bit weights differ by 0.06 and 0.26. Accelerators may multiply in TF32, which rounds
# as float16 does: 0.005 and 0.04.
_FLOAT32_TOLERANCE = Tolerance(0.01, 0.1)
# In bfloat16 the same weights differ by 0.055 and 0.3 between batches or attention kernels, as two engines do. 8-bit
# integers (0.09 and 0.4) are too near to that to be told apart; weights in FP8 (0.32 and 1.6), 6 bits (0.34 and 2.0),
# 4 bits (1.2 and 4), or with a tenth of noise (1.4 and 4.7) are not.
_16_BIT_TOLERANCE = Tolerance(0.2, 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class GoldenScores:
    """What a replica made of the golden sequence."""

    url: str
    logprobs_T: Float32Array


def golden_sequence(*, vocab_size: int, max_context_length: int) -> SequenceToScore:
    """The same one for every replica: ids spread evenly over the vocabulary, as many as fit."""
    num_tokens = max(2, min(NUM_CONTEXT_TOKENS + NUM_COMPLETION_TOKENS, max_context_length))
    num_context = min(NUM_CONTEXT_TOKENS, num_tokens // 2)
    ids: IntArray = (np.arange(1, num_tokens + 1) * _GOLDEN_RATIO % 1.0 * vocab_size).astype(np.int64)
    return SequenceToScore(ids[:num_context], ids[num_context:])


def tolerance_of(dtype: str) -> Tolerance:
    return _FLOAT32_TOLERANCE if dtype in ("float32", "float64") else _16_BIT_TOLERANCE


def check_agreement(first: GoldenScores, other: GoldenScores, info: TeacherInfo) -> None:
    """Raises: HandshakeError naming both replicas, how far they are apart, and how far they may be."""
    distance_T = np.abs(other.logprobs_T.astype(np.float64) - first.logprobs_T)
    mean_nats, largest_nats = float(distance_T.mean()), float(distance_T.max())
    allowed = tolerance_of(info.dtype)
    if mean_nats <= allowed.mean_nats and largest_nats <= allowed.largest_nats:
        return
    raise HandshakeError(
        f"{other.url} and {first.url} both say model revision {info.model_revision!r}, but score the same "
        f"{len(distance_T)} tokens differently: by {mean_nats:.2g} nats on average and {largest_nats:.2g} at most; "
        f"{info.dtype} allows {allowed.mean_nats:g} and {allowed.largest_nats:g}. One of them has other weights, "
        "another quantisation of them, or a broken device; scores of both would be mixed"
    )


async def ask_golden(transport: Transport, info: TeacherInfo, *, url: str) -> GoldenScores:
    """What a replica makes of the golden sequence.

    Raises: CallFailed; HandshakeError, AlignmentError, NonFiniteError for an answer that cannot be used.
    """
    sequence = golden_sequence(vocab_size=info.vocab_size, max_context_length=info.max_context_length)
    request = score_request(
        [sequence],
        request_id="golden",
        temperature=1.0,
        float_type=pb.FLOAT32,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            response = await transport.score(request)
    except TimeoutError as error:
        late = f"{url} scored nothing for {PROBE_TIMEOUT_S:g} s"
        raise CallFailed(Failure(grpc.StatusCode.UNAVAILABLE, late)) from error
    check_revision(info.model_revision, response.model_revision, where=url)
    if len(response.scores) != 1:
        raise AlignmentError(f"{url} answered one sequence with {len(response.scores)}")
    scores = decode_scores(sequence, response.scores, vocab_size=info.vocab_size, hidden_size=info.hidden_size)
    return GoldenScores(url, scores.sampled_logprobs_T)
