"""What a rollout is, whoever samples it.

Axes: C prompt tokens, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vopd_client.types import BoolArray as BoolArray
from vopd_proto.arrays import Float32Array, IntArray


@dataclass(frozen=True, slots=True)
class RolloutKey:
    """Which draw this is: seeds and results derive from it, never from ranks or batch order."""

    step: int
    prompt_index: int  # row of the prompt file
    rollout_index: int  # 0 .. rollouts_per_prompt - 1
    turn: int = 0  # while one trajectory of several turns is sampled: the earlier turns of the student


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled completion with what the student knew while it sampled.

    behaviour_logprobs_T: log pi(y_t) at sampling time, at the run's temperature, over the ids both sides have.
    support_ids, support_counts_T: the student's top ids, ragged per position, most likely first, fixed when
        the token was sampled; the sampled token is in it only if it is one of them.
    support_mass_T: the student's probability inside the support at sampling time.
    ended: the last token is an end token (False: cut at the length limit, or a reply had no room within it).
    is_sampled_T: False at tokens that are not the student's own, such as a tool's output; None: all are. Those tokens
        have no support, 0 as log-probability and mass, and no place in the loss or in a mean over tokens.
    task_reward: what an environment gave for the whole; None: the row's verifier says.
    """

    key: RolloutKey
    prompt_ids: IntArray  # [C] what the student saw
    completion_ids: IntArray  # [T], T >= 1
    behaviour_logprobs_T: Float32Array
    support_ids: IntArray  # [sum of support_counts_T]
    support_counts_T: IntArray
    support_mass_T: Float32Array
    ended: bool
    is_sampled_T: BoolArray | None = None
    task_reward: float | None = None


def is_sampled(rollout: Rollout) -> BoolArray:
    """[T] bool, True at the student's own tokens."""
    return np.ones(len(rollout.completion_ids), np.bool_) if rollout.is_sampled_T is None else rollout.is_sampled_T


def turn_bounds(rollout: Rollout) -> list[tuple[int, int]]:
    """(first token, one past the last) of each of the student's turns, in order."""
    edges = np.flatnonzero(np.diff(is_sampled(rollout).astype(np.int8), prepend=0, append=0))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def last_turn_ids(rollout: Rollout) -> IntArray:
    """What the student wrote last, end token included: what a verifier judges."""
    first, end = turn_bounds(rollout)[-1]
    return rollout.completion_ids[first:end]


RolloutRequest = tuple[RolloutKey, IntArray]  # the draw, and the ids that the student sees


class Sampler(Protocol):
    """What samples rollouts of the student as it is, whichever engine computes them."""

    def sample(self, requests: Sequence[RolloutRequest], *, limits: Sequence[int] | None = None) -> Iterator[Rollout]:
        """Yields one rollout a request, each as soon as it ends, so in no particular order.

        Every draw is a function of (seed, key, index of the token); a limit only cuts.

        Args: limits: tokens of each request's completion, at most; None: the sampler's own limit for all.
        """
        ...
