"""The golden probe: before a teacher says that it is ready, a fixed sequence is scored and compared with itself.

Alone and in company within one start, which finds kernels, batching and caches that mix sequences up; and, where
there is a file, with what earlier starts recorded, which finds a broken card, a wrong driver and other weights under
the same revision. All of these score without an error, and a student would learn from the scores.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vopd_proto.arrays import Float32Array, IntArray
from vopd_server.concurrency import task_group
from vopd_server.engines.base import Engine
from vopd_server.errors import ConfigError, EngineError
from vopd_server.golden_record import GoldenEntry, recall_or_record
from vopd_server.types import Candidates, EngineInfo, NoSupport, ScoreRequest, Scores, Support, SupportKind, TeacherTopK
from vopd_server.validation import check_scores

logger = logging.getLogger(__name__)

# Context and completion tokens. The golden sequence; another completion of its context, which finds that in the
# prefix cache (vLLM's blocks are 16 tokens on a GPU: two of them end before the context does); a longer one; a short
# one.
_LENGTHS = ((41, 24), (41, 17), (130, 20), (5, 1))
_COPIES = 3  # of the golden sequence, in company
_GOLDEN_RATIO = 0.6180339887498949

_MAX_RECORDED_DECIMALS = 6  # what float32 holds at tens of nats


@dataclass(frozen=True, slots=True)
class Difference:
    """Between log-probabilities of the same tokens, over all of them; NaN where one of them is NaN."""

    mean_nats: float
    largest_nats: float

    def is_within(self, tolerance: Difference) -> bool:
        """False for NaN."""
        return self.mean_nats <= tolerance.mean_nats and self.largest_nats <= tolerance.largest_nats

    def __str__(self) -> str:
        return f"{self.mean_nats:.2g} nats on average and {self.largest_nats:.2g} at most"


_SAME_BITS = Difference(0.0, 0.0)
# Five times what two engines differ by in bfloat16 (0.05 and 0.5), which is more than one engine does between batches
# of other shapes or on other devices. A shifted row, another sequence's scores or other weights: nats on average.
_16_BIT_TOLERANCE = Difference(0.25, 2.5)
# 1e-5 is usual on a CPU. Accelerators may multiply in TF32, which rounds as float16 does: 0.005 and 0.04.
_FLOAT32_TOLERANCE = Difference(0.01, 0.1)


@dataclass(frozen=True, slots=True, eq=False)
class GoldenReference:
    """The golden sequence and what it scores: for whoever asks again, as the watchdog does."""

    request: ScoreRequest
    logprobs_N: Float32Array  # as `flat_logprobs` orders them
    tolerance: Difference


@dataclass(frozen=True, slots=True)
class GoldenResult:
    """A probe that found nothing wrong. description: one line in words, with figures."""

    reference: GoldenReference
    description: str
    duration_s: float


async def run_golden_probe(engine: Engine, *, record_file: Path | None) -> GoldenResult:
    """Scores the golden sequence alone twice and in company, and compares the scores; `engine` has started.

    These are the first requests of a start, so they warm the engine as well: kernels that are compiled or chosen by
    the first batch of their kind delay no client.

    record_file: compared with, or written to when it has nothing of this model, revision, dtype and engine; None:
        compared within this start only.

    Raises: ConfigError when scores differ by more than the tolerance of the dtype, cannot be had at all, or the file
        cannot be used; EngineDeadError when the engine dies.
    """
    started_s = time.monotonic()
    info = engine.info
    requests = golden_requests(
        vocab_size=info.vocab_size, max_context_length=info.max_context_length, supports=info.supports
    )
    try:
        alone = [await golden_logprobs(engine, request) for request in requests]
        again_N = await golden_logprobs(engine, requests[0])
        company = (*[0] * _COPIES, *range(1, len(requests)))
        together = await _score_together(engine, [requests[index] for index in company])
    except EngineError as error:
        raise ConfigError(f"the golden probe: {_named(info)} cannot be scored with: {error}") from error
    differences = (
        _compared_within_start(info, [again_N], alone[:1], "alone a second time"),
        _compared_within_start(info, together, [alone[index] for index in company], "in company"),
    )
    largest_nats = max(difference.largest_nats for difference in differences)
    num_runs = len(alone) + 1 + len(company)
    description = f"{num_runs} runs of {len(requests)} sequences agree within {largest_nats:.2g} nats"
    reference = GoldenReference(requests[0], alone[0], tolerance_of(info.dtype))
    if record_file is not None:
        description += await _compared_with_record(info, reference, record_file)
    duration_s = time.monotonic() - started_s
    logger.info("golden probe: %s", description, extra={"seconds": duration_s})
    return GoldenResult(reference, description, duration_s)


async def golden_logprobs(engine: Engine, request: ScoreRequest) -> Float32Array:
    """Scores `request`; [N] as `flat_logprobs` orders them. Raises: EngineError, also for an answer with holes."""
    scores = await engine.score(request)
    check_scores(request, scores, hidden_size=engine.info.hidden_size)
    return flat_logprobs(scores)


# ---------------------------------------------------------------- pure


def golden_requests(
    *, vocab_size: int, max_context_length: int, supports: Collection[SupportKind]
) -> list[ScoreRequest]:
    """The golden sequence and its company, the same ones whenever they are asked for.

    The golden one has the teacher's top 1, others a candidate a position or nothing, as far as `supports` has it:
    what is in a batch together asks for different things. One id is within every `max_top_k`.

    Raises: ConfigError for a `max_context_length` without room for a context and a completion.
    """
    if max_context_length < 2:
        raise ConfigError(f"max_context_length {max_context_length}: a context and a completion take 2 tokens")
    requests = []
    for number, (context_length, completion_length) in enumerate(_LENGTHS):
        context_length, completion_length = _fitted(context_length, completion_length, max_context_length)
        # Equal lengths give equal contexts; completions differ by their place.
        context_ids = _spread_ids(17 * context_length, context_length, vocab_size)
        completion_ids = _spread_ids(1000 + 31 * number, completion_length, vocab_size)
        support: Support = NoSupport()
        if number == 0 and "teacher_top_k" in supports:
            support = TeacherTopK(1)
        elif number == 2 and "candidates" in supports:
            ids = _spread_ids(2000, completion_length, vocab_size)
            support = Candidates(ids, np.ones(completion_length, np.int64))
        requests.append(ScoreRequest(f"golden-{number}", context_ids, completion_ids, support))
    return requests


def flat_logprobs(scores: Scores) -> Float32Array:
    """[N] the sampled log-probabilities, then the support's."""
    if scores.support_logprobs is None:
        return scores.sampled_logprobs_T
    return np.concatenate((scores.sampled_logprobs_T, scores.support_logprobs.reshape(-1)))


def difference(found_N: Float32Array, expected_N: Float32Array) -> Difference:
    """Minus infinity (of an id that the model masks) equals itself; from a number it is infinitely far."""
    assert found_N.shape == expected_N.shape, "scores of one request"
    with np.errstate(invalid="ignore"):
        distance_N = np.where(found_N == expected_N, 0.0, np.abs(found_N.astype(np.float64) - expected_N))
    return Difference(float(distance_N.mean()), float(distance_N.max()))


def tolerance_of(dtype: str) -> Difference:
    """What log-probabilities in `dtype` may differ by where nothing is wrong."""
    return _FLOAT32_TOLERANCE if dtype in ("float32", "float64") else _16_BIT_TOLERANCE


def _fitted(context_length: int, completion_length: int, max_length: int) -> tuple[int, int]:
    """The lengths, or as long as fits in their proportion; at least one token each."""
    if context_length + completion_length <= max_length:
        return context_length, completion_length
    context_length = max(1, max_length * context_length // (context_length + completion_length))
    return context_length, max_length - context_length


def _spread_ids(start: int, length: int, vocab_size: int) -> IntArray:
    """Multiples of the golden ratio, modulo 1, are spread evenly over any vocabulary."""
    ids: IntArray = ((start + np.arange(length)) * _GOLDEN_RATIO % 1.0 * vocab_size).astype(np.int64)
    return ids


def _sequence_hash(request: ScoreRequest) -> str:
    digest = hashlib.sha256(request.support.kind.encode())
    for ids in (request.context_ids, request.completion_ids):
        digest.update(np.concatenate(([len(ids)], ids)).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- comparing


async def _score_together(engine: Engine, requests: Sequence[ScoreRequest]) -> list[Float32Array]:
    async with task_group() as group:
        tasks = [group.create_task(golden_logprobs(engine, request)) for request in requests]
    return [task.result() for task in tasks]


def _compared_within_start(
    info: EngineInfo, found: Sequence[Float32Array], alone: Sequence[Float32Array], how: str
) -> Difference:
    """Over all sequences at once: one of a single token has no average. Raises: ConfigError."""
    tolerance = _SAME_BITS if info.deterministic else tolerance_of(info.dtype)
    found_difference = difference(np.concatenate(found), np.concatenate(alone))
    if found_difference.is_within(tolerance):
        return found_difference
    reason = "it promises the same bits" if info.deterministic else f"{info.dtype} allows {tolerance}"
    raise ConfigError(
        f"the golden probe: {_named(info)} is not safe to learn from: what it scores {how} differs from the first "
        f"time, alone, by {found_difference} ({reason}). Try another device, driver or engine version"
    )


async def _compared_with_record(info: EngineInfo, reference: GoldenReference, path: Path) -> str:
    """What the description says of it. Raises: ConfigError."""
    entry = GoldenEntry(
        model=info.model_id,
        revision=info.model_revision,
        dtype=info.dtype,
        engine=info.engine,
        engine_version=info.engine_version,
        recorded_on=datetime.now(UTC).date(),
        sequence=_sequence_hash(reference.request),
        logprobs_nats=[round(float(value), _MAX_RECORDED_DECIMALS) for value in reference.logprobs_N],
    )
    earlier = await asyncio.to_thread(recall_or_record, path, entry)
    if earlier is None:
        return f"; recorded in {path} for later starts"
    if len(earlier.logprobs_nats) != len(entry.logprobs_nats):
        raise ConfigError(
            f"golden_file {path} is damaged: {len(earlier.logprobs_nats)} log-probabilities in entry "
            f"{entry.key} instead of {len(entry.logprobs_nats)}; remove the entry, and the next start records anew"
        )
    found = difference(reference.logprobs_N, np.asarray(earlier.logprobs_nats, np.float32))
    if not found.is_within(reference.tolerance):
        raise ConfigError(
            f"the golden probe: {_named(info)} scores differently from the start of {earlier.recorded_on} with "
            f"{earlier.engine} {earlier.engine_version}, by {found} ({info.dtype} allows {reference.tolerance}): a "
            "broken device, a wrong driver or engine version, or other weights under the same revision. After a "
            f"deliberate change remove entry {entry.key} from golden_file {path}, and the next start records anew"
        )
    return f"; within {found.largest_nats:.2g} nats of the start of {earlier.recorded_on}"


def _named(info: EngineInfo) -> str:
    return (
        f"model {info.model_id} (revision {info.model_revision}) in {info.dtype} by {info.engine} {info.engine_version}"
    )
