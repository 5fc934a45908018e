"""What people do to rewards and advantages beside subtracting a baseline: all of it off by default.

Notation: pi the student, q the teacher, r = log q - log pi, y the sampled token, b the baseline.

    reward floor      r is replaced by max(r, log(lambda) / (1 - lambda)) everywhere: in the sampled term, on the
                      support, in the tail and in the baseline
    advantage clip    r - b is replaced by its value within [-c, c], in the sampled term and on the support alike
    importance cap    what was sampled from an older student is weighed by rho = min(c, pi_now(y) / pi_then(y));
                      an exact sum over the support is not a sample and carries no weight
    task reward       - sg(A_task) log pi(y) is added for every sampled token, inside the support or not; see
                      task_rewards.py

What each costs in bias, and when to take it, is told in docs/method.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vopd_client.config import Objective
from vopd_client.errors import ConfigError

DIFFERENTIATED_OBJECTIVES: frozenset[Objective] = frozenset({"topk-kl", "full-kl"})


@dataclass(frozen=True)
class Shaping:
    """None: off. reward_floor and advantage_clip in nats; importance_cap a ratio of probabilities, at least 1."""

    reward_floor: float | None = None
    advantage_clip: float | None = None
    importance_cap: float | None = None

    def clipped(self, advantage: Tensor) -> Tensor:
        """An advantage within [-advantage_clip, advantage_clip]."""
        return advantage if self.advantage_clip is None else advantage.clamp(-self.advantage_clip, self.advantage_clip)

    def importance_weights(self, sampled_logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
        """rho = min(cap, pi_now(y) / pi_then(y)), any shape; 1 where it is off. Never a gradient."""
        if self.importance_cap is None:
            return torch.ones_like(sampled_logprobs)
        log_ratio = (sampled_logprobs - behaviour_logprobs).detach()
        return log_ratio.clamp_max(math.log(self.importance_cap)).exp()


NO_SHAPING = Shaping()


def reward_floor(clip_lambda: float | None) -> float | None:
    """log(lambda) / (1 - lambda), in nats; it falls without bound as lambda goes to 0 and rises to -1 at lambda = 1."""
    return None if clip_lambda is None else math.log(clip_lambda) / (1 - clip_lambda)


def check_shaping(objective: Objective, shaping: Shaping, *, has_task_reward: bool) -> None:
    """Raises: ConfigError for what the objective has no place for, saying why."""
    if objective not in DIFFERENTIATED_OBJECTIVES:
        return
    for name, value in (("reward clipping", shaping.reward_floor), ("advantage clipping", shaping.advantage_clip)):
        if value is not None:
            raise ConfigError(f"{name} does not go with objective {objective}, which differentiates a divergence")
    if shaping.importance_cap is not None and not has_task_reward:
        raise ConfigError(
            f"importance weights do not go with objective {objective}: it has no sampled term without a task reward"
        )
