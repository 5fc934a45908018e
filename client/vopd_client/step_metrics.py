"""The numbers of one step: sums that processes add up, and the row of metrics.jsonl made of them.

What teachers with names have a part in is there once more for each of them, as `teacher/NAME/...`.

Axes: B sequences, T completion tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from vopd_client.batch import Batch
from vopd_client.losses import LossOutput, mean_metrics
from vopd_client.processes import LARGEST_OF
from vopd_client.rollouts.base import Rollout, turn_bounds
from vopd_client.student import StudentOutputs

LARGEST_MISMATCH = f"{LARGEST_OF}logprob_mismatch"


@dataclass(slots=True)
class StepSums:
    """What one process adds up in the course of a step. Sums, so that they add up over processes too."""

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add_rollouts(
        self, rollouts: Sequence[Rollout], task_rewards: Sequence[float] | None, *, staleness: int
    ) -> None:
        """staleness: updates between the weights that sampled them and those that learn from them."""
        self.values["num_rollouts"] += len(rollouts)
        self.values["staleness"] += staleness * len(rollouts)
        self.values["num_ended"] += sum(rollout.ended for rollout in rollouts)
        self.values["num_completion_tokens"] += sum(len(rollout.completion_ids) for rollout in rollouts)
        if task_rewards is not None:
            self.values["task_reward"] += sum(task_rewards)
        for rollout in rollouts:
            if rollout.is_sampled_T is not None:
                self.values["num_turns"] += len(turn_bounds(rollout))
                self.values["num_environment_tokens"] += int((~rollout.is_sampled_T).sum())

    def add_masked(self, num_masked: int) -> None:
        """Completions that were cut and stay out of the loss, of those that `add_rollouts` counts."""
        self.values["num_masked"] += num_masked
        self.values["num_valid_tokens"] += 0  # there may be no microbatch to add any

    def add_microbatch(self, loss: LossOutput, student: StudentOutputs, batch: Batch, *, teacher: str) -> None:
        """teacher: the name of the one that scored all of it."""
        self._add(teacher, "loss", float(loss.loss_sum.detach()))
        for name, value in loss.sums.items():
            self._add(teacher, name, float(value))
        self._add(teacher, "num_valid_tokens", batch.num_valid_tokens)
        mismatch = logprob_mismatch(student.sampled_logprobs_BT, batch)
        self.values["logprob_mismatch"] += mismatch.absolute_sum
        self.values["rollout_kl"] += mismatch.kl_sum
        self.values[LARGEST_MISMATCH] = max(self.values[LARGEST_MISMATCH], mismatch.largest)

    def add_traffic(self, bytes_by_teacher: Mapping[str, int]) -> None:
        for teacher, num_bytes in bytes_by_teacher.items():
            self._add(teacher, "teacher_bytes", num_bytes)

    def _add(self, teacher: str, name: str, value: float) -> None:
        """To the sum of all, and to that of a teacher that has a name."""
        self.values[name] += value
        if teacher:
            self.values[f"teacher/{teacher}/{name}"] += value


class Mismatch(NamedTuple):
    """How the probabilities of the training forward, pi, and those that sampled, mu, differ at the valid tokens y.

    absolute_sum: of |log pi(y) - log mu(y)|, in nats; largest: of one token.
    kl_sum: of rho - 1 - log rho, rho = pi(y) / mu(y): never negative, and its mean is unbiased for KL(mu || pi), since
        the mean of rho over mu is 1.
    """

    absolute_sum: float
    largest: float
    kl_sum: float


def logprob_mismatch(sampled_logprobs_BT: torch.Tensor, batch: Batch) -> Mismatch:
    log_ratio_BT = sampled_logprobs_BT.detach() - batch.behaviour_logprobs_BT
    log_ratio_BT = torch.where(batch.loss_mask_BT, log_ratio_BT, 0.0).cpu().double()  # not every device has float64
    return Mismatch(
        absolute_sum=float(log_ratio_BT.abs().sum()),
        largest=float(log_ratio_BT.abs().max()) if log_ratio_BT.numel() else 0.0,
        kl_sum=float((log_ratio_BT.expm1() - log_ratio_BT).sum()),
    )


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of the main process between the step's start and its end.

    rollout_s: all sampling in that time, be it of this step's rollouts or of the next one's. Waiting for the teacher
    is a part of neither the rollouts nor the update.
    teacher_wait_s_by_name: the same, by the names of teachers; "" is that of one without a name.
    """

    rollout_s: float
    update_s: float
    teacher_wait_s: float
    step_s: float
    teacher_wait_s_by_name: Mapping[str, float]


def metrics_row(
    step: int,
    totals: Mapping[str, float],
    times: StepTimes,
    *,
    grad_norm: float,
    adam_variance: float,
    learning_rate: float,
) -> dict[str, Any]:
    """One row of metrics.jsonl: means over the step's valid tokens (or rollouts) of all processes."""
    num_valid_tokens = int(totals["num_valid_tokens"])
    per_token = 1.0 / max(num_valid_tokens, 1)
    per_rollout = 1.0 / max(totals["num_rollouts"], 1.0)
    return {
        "step": step,
        **means_over_tokens(totals, num_valid_tokens),
        "grad_norm": grad_norm,
        "adam_moment_variance": adam_variance,
        "learning_rate": learning_rate,
        "num_valid_tokens": num_valid_tokens,
        "completion_tokens_mean": totals["num_completion_tokens"] * per_rollout,
        "ended_fraction": totals["num_ended"] * per_rollout,
        **({"cut_masked_fraction": totals["num_masked"] * per_rollout} if "num_masked" in totals else {}),
        **({"task_reward_mean": totals["task_reward"] * per_rollout} if "task_reward" in totals else {}),
        **({"turns_mean": totals["num_turns"] * per_rollout} if "num_turns" in totals else {}),
        **(
            {"environment_tokens_mean": totals["num_environment_tokens"] * per_rollout}
            if "num_environment_tokens" in totals
            else {}
        ),
        "staleness": totals["staleness"] * per_rollout,
        "logprob_mismatch_nats": totals["logprob_mismatch"] * per_token if num_valid_tokens else math.nan,
        "logprob_mismatch_max_nats": totals[LARGEST_MISMATCH] if num_valid_tokens else math.nan,
        "rollout_kl_nats": totals["rollout_kl"] * per_token if num_valid_tokens else math.nan,
        "teacher_bytes_per_token": totals["teacher_bytes"] * per_token,
        "teacher_wait_s": times.teacher_wait_s,
        "rollout_s": times.rollout_s,
        "update_s": times.update_s,
        "step_s": times.step_s,
        "tokens_per_s": num_valid_tokens / max(times.step_s, 1e-9),
        **{
            f"teacher/{teacher}/{name}": value
            for teacher, wait_s in times.teacher_wait_s_by_name.items()
            if teacher
            for name, value in metrics_of_teacher(teacher, totals, wait_s).items()
        },
    }


# What every loss adds up, see `LossOutput`.
_SUMS = (
    *("reverse_kl", "reward", "baseline", "advantage", "advantage_squared"),
    *("left_out_mass", "support_size", "variance", "opd_variance"),
)


def means_over_tokens(totals: Mapping[str, float], num_valid_tokens: int) -> dict[str, float | None]:
    """The loss and what it was made of; NaN where there was no token to learn from."""
    if num_valid_tokens == 0:
        return {"loss": math.nan, **mean_metrics(dict.fromkeys(_SUMS, math.nan), 1)}
    return {"loss": totals["loss"] / num_valid_tokens, **mean_metrics(totals, num_valid_tokens)}


def metrics_of_teacher(teacher: str, totals: Mapping[str, float], wait_s: float) -> dict[str, Any]:
    """One teacher's part of a step: its tokens, means over them where there are any, and what it took."""
    prefix = f"teacher/{teacher}/"
    sums = {name.removeprefix(prefix): value for name, value in totals.items() if name.startswith(prefix)}
    num_valid_tokens = int(sums.get("num_valid_tokens", 0))
    means = {}
    if num_valid_tokens > 0:
        means = {"loss": sums["loss"] / num_valid_tokens, **mean_metrics(sums, num_valid_tokens)}
    return {"num_valid_tokens": num_valid_tokens, **means, "bytes": int(sums["teacher_bytes"]), "wait_s": wait_s}
