"""Do two contestants say the same of the same sequences? Nobody shall be fast by being wrong. Pure.

Axes: T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vopd_client.types import SequenceScores

# Two engines in bfloat16 differ by 0.05 nats on average; a shifted row, or another sequence's, by nats.
MOST_MEAN_NATS = 0.3


@dataclass(frozen=True)
class Agreement:
    """Absolute differences in nats, of the sampled tokens and of the ids that both supports hold.

    common: ids a position that both hold.
    """

    who: str
    sampled_mean_nats: float
    sampled_largest_nats: float
    support_mean_nats: float
    common: float

    @property
    def holds(self) -> bool:
        """False for NaN, and where the supports have nothing in common."""
        return self.sampled_mean_nats <= MOST_MEAN_NATS and self.support_mean_nats <= MOST_MEAN_NATS


def agreement(who: str, ours: Sequence[SequenceScores], theirs: Sequence[SequenceScores]) -> Agreement:
    """Raises: ValueError for scores of different sequences."""
    sampled = [_difference(one.sampled_logprobs_T, other.sampled_logprobs_T) for one, other in _pairs(ours, theirs)]
    support = [_support_difference(one, other) for one, other in _pairs(ours, theirs)]
    differences, common = np.concatenate(sampled), np.concatenate(support)
    return Agreement(
        who,
        float(differences.mean()),
        float(differences.max()),
        float(common.mean()) if len(common) else float("nan"),
        len(common) / len(differences),
    )


def _pairs(
    ours: Sequence[SequenceScores], theirs: Sequence[SequenceScores]
) -> list[tuple[SequenceScores, SequenceScores]]:
    return list(zip(ours, theirs, strict=True))


def _difference(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    if one.shape != other.shape:
        raise ValueError(f"scores of {one.shape} and {other.shape} tokens")
    difference: npt.NDArray[np.float64] = np.abs(one.astype(np.float64) - other)
    return difference


def _support_difference(one: SequenceScores, other: SequenceScores) -> npt.NDArray[np.float64]:
    """Of every id that both have at a position."""
    _, of_one, of_other = np.intersect1d(_keys(one), _keys(other), return_indices=True)
    return _difference(one.support_logprobs[of_one], other.support_logprobs[of_other])


def _keys(scores: SequenceScores) -> npt.NDArray[np.int64]:
    """A number for each position and id."""
    row = np.repeat(np.arange(len(scores.counts_T), dtype=np.int64), scores.counts_T)
    keys: npt.NDArray[np.int64] = (row << 32) + scores.support_ids.astype(np.int64)
    return keys
