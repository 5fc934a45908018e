"""Rewards of whole completions beside the teacher's, as advantages that rollouts of one prompt are given."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt


def leave_one_out_advantages(rewards: Sequence[float], groups: Sequence[Hashable]) -> npt.NDArray[np.float64]:
    """Each rollout's reward less the mean of the other rollouts of its group, [number of rollouts].

    The baseline does not depend on the rollout it is subtracted from, so the policy gradient stays unbiased. A
    rollout alone in its group has nothing to compare with and keeps its reward as it is.

    Args: groups: of each rollout, its prompt.
    Source: RLOO, Ahmadian et al., arXiv 2402.14740, eq. (9).
    """
    rewards_N = np.asarray(rewards, np.float64)
    if len(rewards_N) != len(groups):
        raise ValueError(f"{len(rewards_N)} rewards for {len(groups)} rollouts")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    advantages_N = rewards_N.copy()
    for indices in members.values():
        if len(indices) > 1:
            others = (rewards_N[indices].sum() - rewards_N[indices]) / (len(indices) - 1)
            advantages_N[indices] = rewards_N[indices] - others
    return advantages_N
