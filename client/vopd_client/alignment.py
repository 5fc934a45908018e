"""One rollout and its scores, checked against each other and laid out by position.

Axes: C prompt tokens, T completion tokens, K support size, V vocabulary. Row t belongs to completion token t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from vopd_client.errors import AlignmentError
from vopd_client.rollouts.base import BoolArray as BoolArray
from vopd_client.rollouts.base import Rollout
from vopd_client.types import SequenceScores
from vopd_proto.arrays import Float32Array, IntArray

Scalar = TypeVar("Scalar", bound=np.generic)
# "vocabulary": no support, but hidden states, which tell the teacher's log-probability of every id.
SupportOwner = Literal["student", "teacher", "none", "vocabulary"]


@dataclass(frozen=True, slots=True, eq=False)
class AlignedSequence:
    """What the loss reads of one completion; 0 at rows outside the loss and at columns outside the support."""

    in_loss_T: BoolArray
    completion_ids_T: IntArray
    behaviour_logprobs_T: Float32Array
    teacher_logprobs_T: Float32Array
    support_ids_TK: IntArray
    support_mask_TK: BoolArray
    teacher_support_logprobs_TK: Float32Array


def align(
    rollout: Rollout,
    scores: SequenceScores,
    *,
    prompt_name: str,
    support: SupportOwner,
    num_shared_ids: int,
    max_support: int | None,
    drop_end_ids: frozenset[int],
    loss_mask_T: BoolArray | None = None,
) -> AlignedSequence:
    """Lays out one rollout and its scores; the arguments and errors are those of `batch.collate`."""
    _check_lengths(rollout, scores, loss_mask_T, prompt_name)
    in_loss_T = rows_in_loss(rollout, drop_end_ids)
    if loss_mask_T is not None:
        in_loss_T = in_loss_T & loss_mask_T
    _check_sampled_ids(rollout.completion_ids, in_loss_T, num_shared_ids, prompt_name)

    ids, logprobs, counts_T = _ragged_support(rollout, scores, support, prompt_name)
    if max_support is not None and counts_T.size and counts_T.max() > max_support:
        position = int(counts_T.argmax())
        raise AlignmentError(
            f"completion token {position} of {prompt_name} has {counts_T[position]} ids in its support; "
            f"at most {max_support} were asked for"
        )
    rows = np.repeat(np.arange(len(counts_T)), counts_T)  # the position that each flat entry belongs to
    _check_distinct(ids, rows, prompt_name)
    # An id that one side does not have leaves S: its log-ratio is infinite, and it would reach V, b* and rb.
    is_kept = (ids >= 0) & (ids < num_shared_ids) & ~np.isneginf(logprobs) & in_loss_T[rows]
    # Rows that end are left out, so the others are draws from pi given that it goes on: its end has no place in S.
    is_kept &= ~np.isin(ids, list(drop_end_ids))
    mask_TK = _row_mask(np.bincount(rows[is_kept], minlength=len(counts_T)))
    return AlignedSequence(
        in_loss_T=in_loss_T,
        completion_ids_T=np.where(in_loss_T, rollout.completion_ids, 0),
        behaviour_logprobs_T=np.where(in_loss_T, rollout.behaviour_logprobs_T, np.float32(0)),
        teacher_logprobs_T=np.where(in_loss_T, scores.sampled_logprobs_T, np.float32(0)),
        support_ids_TK=_scatter(ids[is_kept], mask_TK),
        support_mask_TK=mask_TK,
        teacher_support_logprobs_TK=_scatter(logprobs[is_kept], mask_TK),
    )


def _check_lengths(rollout: Rollout, scores: SequenceScores, loss_mask_T: BoolArray | None, prompt_name: str) -> None:
    """Every array of T rows has T rows, and row C-1, which predicts the first token, exists."""
    num_tokens = len(rollout.completion_ids)
    if len(rollout.prompt_ids) == 0:
        raise AlignmentError(f"{prompt_name} has an empty prompt: nothing predicts its first completion token")
    lengths = {
        "sampled log-probabilities from the teacher": len(scores.sampled_logprobs_T),
        "support counts from the teacher": len(scores.counts_T),
        "recorded log-probabilities": len(rollout.behaviour_logprobs_T),
        "recorded support counts": len(rollout.support_counts_T),
    }
    for what, mask_T in (("marks of what was sampled", rollout.is_sampled_T), ("loss mask entries", loss_mask_T)):
        if mask_T is not None:
            lengths[what] = len(mask_T)
    for what, length in lengths.items():
        if length != num_tokens:
            raise AlignmentError(f"{length} {what} for the {num_tokens} completion tokens of {prompt_name}")
    for owner, counts_T, ids in (
        ("recorded", rollout.support_counts_T, rollout.support_ids),
        ("teacher's", scores.counts_T, scores.support_ids),
        ("teacher's", scores.counts_T, scores.support_logprobs),
    ):
        if int(counts_T.sum()) != len(ids):
            raise AlignmentError(
                f"the {owner} support counts of {prompt_name} add up to {int(counts_T.sum())}, for {len(ids)} entries"
            )


def rows_in_loss(rollout: Rollout, drop_end_ids: frozenset[int]) -> BoolArray:
    """Every token that the student sampled, but for end tokens that are to be dropped, [T] bool.

    Sampling stops at an end token, so in a trajectory of several turns each one that was sampled ends a turn.
    """
    if rollout.is_sampled_T is not None:
        dropped_T = np.isin(rollout.completion_ids, list(drop_end_ids))
        return rollout.is_sampled_T & ~dropped_T
    in_loss_T = np.ones(len(rollout.completion_ids), np.bool_)
    if rollout.ended and int(rollout.completion_ids[-1]) in drop_end_ids:
        in_loss_T[-1] = False
    return in_loss_T


def _check_sampled_ids(completion_ids: IntArray, in_loss_T: BoolArray, num_shared_ids: int, prompt_name: str) -> None:
    """A sampled token that one side does not have was never in pi, and has no reward."""
    is_foreign_T = in_loss_T & ((completion_ids < 0) | (completion_ids >= num_shared_ids))
    if is_foreign_T.any():
        position = int(is_foreign_T.argmax())
        raise AlignmentError(
            f"completion token {position} of {prompt_name} is id {completion_ids[position]}; "
            f"student and teacher share the ids below {num_shared_ids}"
        )


def _ragged_support(
    rollout: Rollout, scores: SequenceScores, support: SupportOwner, prompt_name: str
) -> tuple[IntArray, Float32Array, IntArray]:
    """Ids, the teacher's log-probabilities of them, and how many belong to each position."""
    if support in ("none", "vocabulary"):
        counts_T = np.zeros(len(rollout.completion_ids), np.int64)
        return np.empty(0, np.int64), np.empty(0, np.float32), counts_T
    if support == "teacher":
        return scores.support_ids, scores.support_logprobs, scores.counts_T
    differs_T = rollout.support_counts_T != scores.counts_T
    if differs_T.any():
        position = int(differs_T.argmax())
        raise AlignmentError(
            f"the teacher scored {scores.counts_T[position]} support ids at completion token {position} of "
            f"{prompt_name}; {rollout.support_counts_T[position]} were recorded"
        )
    # The student's own ids: what the teacher was asked for may have had an end token mapped to the teacher's.
    return rollout.support_ids, scores.support_logprobs, rollout.support_counts_T


def _check_distinct(ids: IntArray, rows: IntArray, prompt_name: str) -> None:
    """An id twice in one support would count its probability twice."""
    order = np.lexsort((ids, rows))
    is_repeated = (np.diff(rows[order]) == 0) & (np.diff(ids[order]) == 0)
    if is_repeated.any():
        first = order[int(is_repeated.argmax())]
        raise AlignmentError(
            f"id {ids[first]} occurs twice in the support of completion token {rows[first]} of {prompt_name}"
        )


def _row_mask(counts_T: IntArray) -> BoolArray:
    """[T, K]: the first counts_T[t] columns of row t; K the largest count."""
    width = int(counts_T.max(initial=0))
    mask_TK: BoolArray = np.arange(width) < counts_T[:, None]
    return mask_TK


def _scatter(values: npt.NDArray[Scalar], mask_TK: BoolArray) -> npt.NDArray[Scalar]:
    """Flat values, row by row, at the True places of the mask; 0 elsewhere."""
    padded = np.zeros(mask_TK.shape, values.dtype)
    padded[mask_TK] = values
    return padded
