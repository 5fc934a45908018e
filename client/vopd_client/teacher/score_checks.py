"""Do the numbers of an answer fit their request, and can they be computed with? Pure, wherever they come from.

Axes: T completion tokens, K support size, H hidden size.
"""

from __future__ import annotations

import numpy as np

from vopd_client.errors import AlignmentError, NonFiniteError
from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK
from vopd_proto.arrays import Float32Array, IntArray


def checked_scores(
    sequence: SequenceToScore,
    *,
    sampled_logprobs_T: Float32Array,
    support_logprobs: Float32Array,
    top_k_ids: IntArray,
    hidden_states_TH: Float32Array | None,
    vocab_size: int,
    hidden_size: int,
    queue_time_s: float = 0.0,
    engine_time_s: float = 0.0,
) -> SequenceScores:
    """Scores that line up with their request and can be computed with, wherever they come from.

    support_logprobs: flat; [T * k] for the teacher's top-k, [sum of counts_T] for candidates, else empty.
    top_k_ids: flat [T * k] for the teacher's top-k, else empty.
    hidden_states_TH: None where the answer holds none.

    Raises: as `decode_scores`.
    """
    num_rows = len(sequence.completion_ids)
    if len(sampled_logprobs_T) != num_rows:
        raise AlignmentError(f"{len(sampled_logprobs_T)} rows of scores for a completion of {num_rows} tokens")
    match sequence.support:
        case TeacherTopK(k=k):
            support_ids, counts_T = top_k_ids, np.full(num_rows, k, np.int64)
            _check_ids(support_ids, vocab_size)
        case Candidates(ids=ids, counts_T=counts):
            support_ids, counts_T = ids, counts
        case NoSupport() | HiddenStates():
            support_ids, counts_T = np.empty(0, np.int64), np.zeros(num_rows, np.int64)
    num_asked = int(counts_T.sum())
    if not len(support_logprobs) == len(support_ids) == num_asked:
        raise AlignmentError(
            f"asked for a support of {num_asked} ids over {num_rows} rows, answered with "
            f"{len(support_ids)} ids and {len(support_logprobs)} log-probabilities"
        )
    _check_sampled(sampled_logprobs_T, sequence)
    _check_support(support_logprobs, support_ids, counts_T)
    wanted_H = hidden_size if isinstance(sequence.support, HiddenStates) else None
    return SequenceScores(
        sampled_logprobs_T=sampled_logprobs_T,
        support_ids=support_ids,
        support_logprobs=support_logprobs,
        counts_T=counts_T,
        hidden_states_TH=_checked_hidden_states(hidden_states_TH, num_rows=num_rows, hidden_size=wanted_H),
        queue_time_s=queue_time_s,
        engine_time_s=engine_time_s,
    )


def _check_ids(support_ids: IntArray, vocab_size: int) -> None:
    if len(support_ids) and int(support_ids.max()) >= vocab_size:
        raise AlignmentError(f"the teacher's top-k names id {int(support_ids.max())} of {vocab_size} that it has")


def _check_sampled(sampled_logprobs_T: Float32Array, sequence: SequenceToScore) -> None:
    """-inf would be a reward of minus infinity: the teacher cannot have been asked about this id in earnest.

    At a token that the student did not sample it is nobody's reward.
    """
    completion_ids, is_bad_T = sequence.completion_ids, ~np.isfinite(sampled_logprobs_T)
    if sequence.is_sampled_T is not None:
        is_bad_T &= sequence.is_sampled_T | ~np.isneginf(sampled_logprobs_T)
    bad = np.flatnonzero(is_bad_T)
    if len(bad):
        row = int(bad[0])
        raise NonFiniteError(
            f"teacher log-probability {sampled_logprobs_T[row]} of token {int(completion_ids[row])} "
            f"at position {row} of the completion ({len(bad)} such rows of {len(sampled_logprobs_T)})"
        )


def _check_support(support_logprobs: Float32Array, support_ids: IntArray, counts_T: IntArray) -> None:
    """-inf is a fact here (an id that the teacher masks); NaN and +inf are not."""
    bad = np.flatnonzero(np.isnan(support_logprobs) | np.isposinf(support_logprobs))
    if len(bad):
        at = int(bad[0])
        row = int(np.searchsorted(np.cumsum(counts_T), at, side="right"))
        raise NonFiniteError(
            f"teacher log-probability {support_logprobs[at]} of support id {int(support_ids[at])} "
            f"at position {row} of the completion ({len(bad)} such values)"
        )


def _checked_hidden_states(
    hidden_TH: Float32Array | None, *, num_rows: int, hidden_size: int | None
) -> Float32Array | None:
    """The same array, or [0, H] for an empty completion. hidden_size: None where none were asked for."""
    if hidden_size is None:
        if hidden_TH is not None:
            raise AlignmentError(f"asked for no hidden states, answered with {_shape(hidden_TH)} of them")
        return None
    if hidden_TH is None and num_rows == 0:
        return np.empty((0, hidden_size), np.float32)
    if hidden_TH is None or hidden_TH.shape != (num_rows, hidden_size):
        answered = "none" if hidden_TH is None else _shape(hidden_TH)
        raise AlignmentError(f"asked for {num_rows} x {hidden_size} hidden states, answered with {answered}")
    is_finite_TH = np.isfinite(hidden_TH)
    if not is_finite_TH.all():
        row, dimension = (int(index) for index in np.argwhere(~is_finite_TH)[0])
        raise NonFiniteError(
            f"teacher hidden state {hidden_TH[row, dimension]} in dimension {dimension} at position {row} "
            f"of the completion ({is_finite_TH.size - int(is_finite_TH.sum())} such values)"
        )
    return hidden_TH


def _shape(hidden_TH: Float32Array) -> str:
    return " x ".join(map(str, hidden_TH.shape))
