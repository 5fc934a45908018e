"""From vLLM's answer to scores, or the reason why it cannot be trusted. Pure: nothing here imports vLLM.

What a prefix-cache hit beyond row C - 1 leaves behind depends on vLLM's runner: no scores at all, fewer rows, or
rows that were never written and still hold what the memory held before, which may be another request's plausible
numbers. So an answer is not judged by its looks alone: it must also say that nothing could have gone missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vopd_proto.arrays import Float32Array, IntArray
from vopd_server.engines.vllm_requests import candidate_mask
from vopd_server.errors import EngineError
from vopd_server.types import Candidates, ScoreRequest, Scores, TeacherTopK

# A log-softmax in float32 may end a few rounding errors above 0; what lies higher is not a log-probability.
LARGEST_LOGPROB_NATS = 1e-3


class FlatLogprobs(Protocol):
    """vLLM's `flat_logprobs`: entry p (of prompt token p) holds items [start_indices[p], end_indices[p])."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


class RequestMetrics(Protocol):
    """Times are in seconds on the engine's own monotonic clock; 0 where it did not happen."""

    num_preemptions: int
    queued_ts: float
    scheduled_ts: float
    last_token_ts: float


class CompletionPart(Protocol):
    finish_reason: str | None


class Answer(Protocol):
    """What is read of vLLM's RequestOutput."""

    prompt_logprobs: Any  # FlatLogprobs | None
    prompt_token_id_logprobs: Float32Array | None  # [T, 1 + K]
    num_cached_tokens: int | None
    metrics: RequestMetrics | None
    outputs: Sequence[CompletionPart]


class UnusableAnswerError(EngineError):
    """An answer that is not wholly there; asking again with cache reads off can help."""


def read_scores(request: ScoreRequest, answer: Answer, *, read_cache: bool, vocab_size: int) -> Scores:
    """The scores of `request`, which holds at least one completion token.

    read_cache: whether the request was allowed to read the prefix cache.

    Raises: EngineError for an aborted request; UnusableAnswerError when a row is missing, was or may have been
        left unwritten, belongs to another token, or is no log-probability (NaN, above 0).
    """
    reason = answer.outputs[0].finish_reason if answer.outputs else None
    if reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended the request with finish_reason {reason!r}")
    if read_cache:
        _check_rows_were_computed(request, answer)
    if answer.prompt_token_id_logprobs is not None:
        scores = _from_token_ids(request, answer.prompt_token_id_logprobs)
    elif answer.prompt_logprobs is not None:
        scores = _from_prompt_logprobs(request, answer.prompt_logprobs, vocab_size)
    else:
        raise UnusableAnswerError("vLLM returned no scores")
    return scores


def times_s(answer: Answer) -> tuple[float, float]:
    """Seconds that the request waited in vLLM's queue, and seconds from there to its end; 0 where not known."""
    metrics = answer.metrics
    if metrics is None or not 0 < metrics.queued_ts <= metrics.scheduled_ts <= metrics.last_token_ts:
        return 0.0, 0.0
    return metrics.scheduled_ts - metrics.queued_ts, metrics.last_token_ts - metrics.scheduled_ts


def _check_rows_were_computed(request: ScoreRequest, answer: Answer) -> None:
    """Nothing at or behind row C - 1 came from the cache, neither at first nor on resuming."""
    num_cached = answer.num_cached_tokens
    if num_cached is None or num_cached >= len(request.context_ids):
        raise UnusableAnswerError(
            f"{num_cached} tokens came from the prefix cache; the context has {len(request.context_ids)}"
        )
    # num_cached_tokens is of the first scheduling: a preempted request may have resumed on a longer hit.
    if answer.metrics is None or answer.metrics.num_preemptions > 0:
        raise UnusableAnswerError("the request was preempted, or vLLM does not tell")


def _from_token_ids(request: ScoreRequest, logprobs_TN: Float32Array) -> Scores:
    """[T, 1 + K], column 0 the sampled token: vLLM aligns rows with the ids that it was given."""
    support = request.support
    num_rows = len(request.completion_ids)
    mask_TK = candidate_mask(support.counts_T if isinstance(support, Candidates) else np.zeros(num_rows, np.int64))
    expected = (num_rows, 1 + mask_TK.shape[1])
    if logprobs_TN.shape != expected:
        raise UnusableAnswerError(f"vLLM returned scores of shape {logprobs_TN.shape} instead of {expected}")
    sampled_T = _logprobs(logprobs_TN[:, 0])
    if not isinstance(support, Candidates):
        return Scores(sampled_T)
    return Scores(sampled_T, _logprobs(logprobs_TN[:, 1:][mask_TK]))


def _from_prompt_logprobs(request: ScoreRequest, flat: FlatLogprobs, vocab_size: int) -> Scores:
    """One entry a prompt token; column 0 the actual token, columns 1 to k the teacher's most likely ones.

    After a cache hit one runner leaves the hit's entries unwritten and another leaves them out, so the
    completion's entries are found from the end: entry P - 1 is always the last one.
    """
    k = request.support.k if isinstance(request.support, TeacherTopK) else 0
    num_rows, num_columns = len(request.completion_ids), k + 1
    first = len(flat.start_indices) - num_rows
    if first < 1:  # entry 0 is the first prompt token's, which has no scores
        raise UnusableAnswerError(f"vLLM returned {first + num_rows} entries for {num_rows} completion tokens")
    start, end = flat.start_indices[first], flat.end_indices[first + num_rows - 1]
    starts_T = np.asarray(flat.start_indices[first : first + num_rows])
    is_dense = np.array_equal(starts_T, start + num_columns * np.arange(num_rows))
    if not is_dense or end - start != num_rows * num_columns:
        raise UnusableAnswerError(f"vLLM's entries do not hold {num_columns} log-probabilities each")
    ids_TN = np.asarray(flat.token_ids[start:end], np.int64).reshape(num_rows, num_columns)
    if not np.array_equal(ids_TN[:, 0], request.completion_ids):
        raise UnusableAnswerError("vLLM's entries belong to other tokens than the completion's")
    logprobs_TN = _logprobs(np.asarray(flat.logprobs[start:end], np.float32).reshape(num_rows, num_columns))
    if k == 0:
        return Scores(logprobs_TN[:, 0])
    ids_TK = _top_ids(ids_TN[:, 1:], vocab_size)
    return Scores(logprobs_TN[:, 0].copy(), logprobs_TN[:, 1:].copy(), ids_TK)


def _top_ids(ids_TK: IntArray, vocab_size: int) -> IntArray:
    if ids_TK.min() < 0 or ids_TK.max() >= vocab_size:
        raise UnusableAnswerError(f"vLLM returned ids in [{ids_TK.min()}, {ids_TK.max()}], outside [0, {vocab_size})")
    return np.ascontiguousarray(ids_TK)


def _logprobs(values: Float32Array) -> Float32Array:
    """`values`, float32 and contiguous. -inf is a log-probability (of a masked id); NaN is not."""
    if values.size and not values.max() <= LARGEST_LOGPROB_NATS:  # false for NaN as well
        raise UnusableAnswerError("vLLM returned NaN, or a log-probability above 0")
    return np.ascontiguousarray(values, dtype=np.float32)
