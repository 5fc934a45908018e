"""What a rollout is, whoever samples it.

Axes: C prompt tokens, T completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from vopd_proto.arrays import Float32Array, IntArray


@dataclass(frozen=True, slots=True)
class RolloutKey:
    """Which draw this is: seeds and results derive from it, never from ranks or batch order."""

    step: int
    prompt_index: int  # row of the prompt file
    rollout_index: int  # 0 .. rollouts_per_prompt - 1


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled completion with what the student knew while it sampled.

    behaviour_logprobs_T: log pi(y_t) at sampling time, at the run's temperature, over the ids both sides have.
    support_ids, support_counts_T: the student's top ids, ragged per position, most likely first, fixed when
        the token was sampled; the sampled token is in it only if it is one of them.
    support_mass_T: the student's probability inside the support at sampling time.
    ended: the last token is an end token (False: cut at the length limit).
    """

    key: RolloutKey
    prompt_ids: IntArray  # [C] what the student saw
    completion_ids: IntArray  # [T], T >= 1
    behaviour_logprobs_T: Float32Array
    support_ids: IntArray  # [sum of support_counts_T]
    support_counts_T: IntArray
    support_mass_T: Float32Array
    ended: bool
