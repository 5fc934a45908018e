"""What a request must satisfy before an engine sees it: pure functions on values.

In two steps, since admission stands between them. `check_shapes` needs the declared lengths only and costs
nothing; `check_request` looks into the arrays. `check_scores` holds the engine to its own promise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vopd_proto.arrays import IntArray
from vopd_server.errors import EngineError, InvalidRequestError, UnsupportedError
from vopd_server.types import (
    Candidates,
    EngineInfo,
    HiddenStates,
    NoSupport,
    ScoreRequest,
    Scores,
    SupportKind,
    TeacherTopK,
)

# Below it, fp32 logits divided by it are so far apart that every log-probability is 0 or overflows.
MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    max_context_length: int  # context + completion tokens of one sequence
    max_sequences_per_request: int
    max_tokens_per_request: int
    max_top_k: int
    max_message_bytes: int


@dataclass(frozen=True, slots=True)
class SequenceShape:
    """What a sequence says of itself, known before any of its arrays is unpacked."""

    field: str  # where it stands in the request, for instance "sequences[3]"
    context_length: int
    completion_length: int
    kind: SupportKind = "sampled"
    k: int = 0  # teacher_top_k only
    num_candidates: int = 0  # candidates only, over all positions

    @property
    def num_tokens(self) -> int:
        return self.context_length + self.completion_length

    @property
    def num_support(self) -> int:
        """Log-probabilities of the support in the answer."""
        return self.num_candidates if self.kind == "candidates" else self.k * self.completion_length


def check_shapes(shapes: Sequence[SequenceShape], *, info: EngineInfo, limits: Limits) -> None:
    """Refuses a request from its lengths alone.

    Raises: InvalidRequestError, UnsupportedError.
    """
    if not shapes:
        raise InvalidRequestError("sequences", "the request holds none")
    if len(shapes) > limits.max_sequences_per_request:
        raise InvalidRequestError(
            "sequences", f"{len(shapes)} sequences > max_sequences_per_request {limits.max_sequences_per_request}"
        )
    for shape in shapes:
        _check_shape(shape, info, limits)
    num_tokens = sum(shape.num_tokens for shape in shapes)
    if num_tokens > limits.max_tokens_per_request:
        raise InvalidRequestError(
            "sequences", f"{num_tokens} tokens > max_tokens_per_request {limits.max_tokens_per_request}"
        )


def check_temperature(temperature: float, info: EngineInfo) -> None:
    """Raises: InvalidRequestError for what is no temperature, UnsupportedError for one this engine cannot apply."""
    if not math.isfinite(temperature) or temperature <= 0:
        raise InvalidRequestError("temperature", f"{temperature}; it must be a finite number above 0")
    if temperature < MIN_TEMPERATURE:
        raise InvalidRequestError("temperature", f"{temperature:g} < {MIN_TEMPERATURE:g}, the least that fp32 can tell")
    if temperature != 1.0 and not info.any_temperature:
        raise UnsupportedError(f"temperature {temperature:g}: engine {info.engine} scores at temperature 1 only")


def check_request(request: ScoreRequest, *, field: str, info: EngineInfo, limits: Limits) -> None:
    """Looks into the arrays of one sequence; its lengths have been checked. Duplicate candidates are legal.

    Raises: InvalidRequestError.
    """
    _check_ids(f"{field}.context_ids", request.context_ids, info.vocab_size)
    _check_ids(f"{field}.completion_ids", request.completion_ids, info.vocab_size)
    match request.support:
        case Candidates(ids=ids, counts_T=counts_T):
            _check_counts(f"{field}.candidates.counts", counts_T, len(request.completion_ids), len(ids), limits)
            _check_ids(f"{field}.candidates.ids", ids, info.vocab_size)
        case NoSupport() | TeacherTopK() | HiddenStates():
            pass


def check_scores(request: ScoreRequest, scores: Scores, *, hidden_size: int) -> None:
    """Refuses an engine's answer that is not wholly there: a missing row or a NaN is never passed on.

    Hidden states must be finite; a log-probability may be minus infinity.

    Raises: EngineError.
    """
    num_rows = len(request.completion_ids)
    if scores.sampled_logprobs_T.shape != (num_rows,):
        raise EngineError(f"the engine returned {scores.sampled_logprobs_T.shape} scores for {num_rows} tokens")
    match request.support:
        case TeacherTopK(k=k):
            expected: tuple[int, ...] | None = (num_rows, k)
        case Candidates(ids=ids):
            expected = (len(ids),)
        case _:
            expected = None
    found = None if scores.support_logprobs is None else scores.support_logprobs.shape
    if found != expected:
        raise EngineError(f"the engine returned a support of shape {found}; {expected} was asked for")
    if isinstance(request.support, TeacherTopK) and (
        scores.support_ids_TK is None or scores.support_ids_TK.shape != expected
    ):
        raise EngineError("the engine returned a top-k support without its ids")
    _check_hidden_states(request, scores, (num_rows, hidden_size))
    for logprobs in (scores.sampled_logprobs_T, scores.support_logprobs):
        if logprobs is not None and np.isnan(logprobs).any():
            raise EngineError("the engine returned NaN: the model's logits are broken")


def hidden_states_hint(info: EngineInfo) -> str:
    """What is added where hidden states, or the head for them, are refused: how they could be had."""
    return "; whoever starts it can allow them with --allow-full-vocab" if info.engine == "transformers" else ""


def _check_hidden_states(request: ScoreRequest, scores: Scores, expected: tuple[int, int]) -> None:
    hidden_TH = scores.hidden_states_TH
    if not isinstance(request.support, HiddenStates):
        if hidden_TH is not None:
            raise EngineError("the engine returned hidden states that were not asked for")
        return
    if hidden_TH is None or hidden_TH.shape != expected:
        found = None if hidden_TH is None else hidden_TH.shape
        raise EngineError(f"the engine returned hidden states of shape {found}; {expected} was asked for")
    if not np.isfinite(hidden_TH).all():
        raise EngineError("the engine returned hidden states that are not finite")


def _check_shape(shape: SequenceShape, info: EngineInfo, limits: Limits) -> None:
    """One sequence's lengths, its kind of support and the size of that."""
    if shape.context_length == 0:
        raise InvalidRequestError(
            f"{shape.field}.context_ids", "empty; a context has at least one token (a begin token will do)"
        )
    if shape.num_tokens > limits.max_context_length:
        raise InvalidRequestError(
            shape.field,
            f"context {shape.context_length} + completion {shape.completion_length} tokens > "
            f"max_context_length {limits.max_context_length}",
        )
    if shape.kind not in info.supports:
        offered = ", ".join(sorted(info.supports))
        hint = hidden_states_hint(info) if shape.kind == "hidden_states" else ""
        raise UnsupportedError(
            f"{shape.field}: engine {info.engine} has no {shape.kind} support; it has {offered}{hint}"
        )
    if shape.kind == "teacher_top_k":
        most = min(limits.max_top_k, info.vocab_size)
        if not 1 <= shape.k <= most:
            raise InvalidRequestError(f"{shape.field}.teacher_top_k.k", f"{shape.k}; it must lie in [1, {most}]")
    if shape.kind == "candidates" and shape.num_candidates > shape.completion_length * limits.max_top_k:
        raise InvalidRequestError(
            f"{shape.field}.num_candidates",
            f"{shape.num_candidates} candidates > {shape.completion_length} positions x max_top_k {limits.max_top_k}",
        )


def _check_ids(field: str, ids: IntArray, vocab_size: int) -> None:
    """Every id has a row in the model's output head."""
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        position = int(outside[0])
        raise InvalidRequestError(field, f"id {ids[position]} at position {position} is not in [0, {vocab_size})")


def _check_counts(field: str, counts_T: IntArray, num_rows: int, num_ids: int, limits: Limits) -> None:
    """One count a completion token, none over the limit, together the ids there are."""
    if len(counts_T) != num_rows:
        raise InvalidRequestError(field, f"{len(counts_T)} counts for {num_rows} completion tokens")
    if int(counts_T.sum()) != num_ids:
        raise InvalidRequestError(field, f"they add up to {int(counts_T.sum())}; there are {num_ids} candidate ids")
    if num_rows and int(counts_T.max()) > limits.max_top_k:
        position = int(counts_T.argmax())
        raise InvalidRequestError(
            field, f"{counts_T[position]} candidates at position {position} > max_top_k {limits.max_top_k}"
        )
