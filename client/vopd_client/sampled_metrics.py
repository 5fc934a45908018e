"""avg@n, pass@n and maj@n of sampled completions, each prompt's and their means with a 95 % interval. No torch.

Axes: P prompts, N samples of a prompt, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
T = TypeVar("T")

INTERVAL_METHOD = "95 % percentile bootstrap over prompts, 10,000 resamples"
_NUM_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


def avg_at_n(correct_PN: BoolArray) -> Float64Array:
    """avg@n of each prompt, [P]: the share of its samples that are right."""
    return np.asarray(correct_PN.mean(axis=1), np.float64)


def pass_at_n(correct_PN: BoolArray) -> Float64Array:
    """pass@n of each prompt, [P]: 1 where any of its samples is right."""
    return np.asarray(correct_PN.any(axis=1), np.float64)


def maj_at_n(correct_PN: BoolArray, chosen_P: Sequence[int | None]) -> Float64Array:
    """maj@n of each prompt, [P]: 1 where the sample that speaks for the majority is right.

    Args: chosen_P: `majority` of each prompt's answers; None counts as wrong.
    """
    rows = zip(correct_PN, chosen_P, strict=True)
    return np.array([chosen is not None and bool(correct_N[chosen]) for correct_N, chosen in rows], np.float64)


def majority(answers_N: Sequence[T | None], same: Callable[[T, T], bool]) -> int | None:
    """The first sample of the most common answer; None when no sample answers anything.

    Samples without an answer do not vote. An answer joins the first group whose first member is the same as it, so
    that the groups are well defined where `same` is not transitive. Of equally common answers, the one that was
    given first wins.
    """
    groups: list[list[int]] = []
    representatives: list[T] = []
    for sample, answer in enumerate(answers_N):
        if answer is None:
            continue
        for group, representative in zip(groups, representatives, strict=True):
            if same(representative, answer):
                group.append(sample)
                break
        else:
            groups.append([sample])
            representatives.append(answer)
    return max(groups, key=len)[0] if groups else None  # max: the first of the largest


def estimate(values_P: Float64Array) -> Estimate:
    """The mean over prompts and its 95 % percentile bootstrap interval.

    Prompts are what is resampled: the samples of one prompt are not independent of each other. The generator's seed
    is fixed, so the interval is a function of the values alone. The interval says how far the mean would move with
    other prompts of the same kind; where all prompts have one value it has no width, which for few prompts says
    nothing.

    Args: values_P: one value in [0, 1] a prompt, at least one prompt.
    """
    assert len(values_P) > 0, "a mean needs a prompt"
    distinct, counts = np.unique(values_P, return_counts=True)
    # Drawing prompts with replacement draws counts of the few distinct values: the same distribution, in less memory.
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    drawn = generator.multinomial(len(values_P), counts / len(values_P), size=_NUM_RESAMPLES)
    means_R = drawn @ distinct / len(values_P)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return Estimate(float(values_P.mean()), float(low), float(high))
