"""The numbers of one step: sums that processes add up, and the row of metrics.jsonl made of them.

What teachers with names have a part in is there once more for each of them, as `teacher/NAME/...`.

Axes: B sequences, T completion tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vopd_client.batch import Batch
from vopd_client.losses import LossOutput, mean_metrics
from vopd_client.rollouts.base import Rollout
from vopd_client.student import StudentOutputs


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

    def add_microbatch(self, loss: LossOutput, student: StudentOutputs, batch: Batch, *, teacher: str) -> None:
        """teacher: the name of the one that scored all of it."""
        self._add(teacher, "loss", float(loss.loss_sum.detach()))
        for name, value in loss.sums.items():
            self._add(teacher, name, float(value))
        self._add(teacher, "num_valid_tokens", batch.num_valid_tokens)
        self.values["logprob_mismatch"] += logprob_mismatch(student.sampled_logprobs_BT, batch)

    def add_traffic(self, bytes_by_teacher: Mapping[str, int]) -> None:
        for teacher, num_bytes in bytes_by_teacher.items():
            self._add(teacher, "teacher_bytes", num_bytes)

    def _add(self, teacher: str, name: str, value: float) -> None:
        """To the sum of all, and to that of a teacher that has a name."""
        self.values[name] += value
        if teacher:
            self.values[f"teacher/{teacher}/{name}"] += value


def logprob_mismatch(sampled_logprobs_BT: torch.Tensor, batch: Batch) -> float:
    """Sum of |log pi(y) in the training forward - log pi(y) when it was sampled| over the valid tokens, in nats."""
    difference_BT = (sampled_logprobs_BT.detach() - batch.behaviour_logprobs_BT).abs()
    return float(torch.where(batch.loss_mask_BT, difference_BT, 0.0).sum())


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
        "loss": totals["loss"] * per_token,
        **mean_metrics(totals, num_valid_tokens),
        "grad_norm": grad_norm,
        "adam_moment_variance": adam_variance,
        "learning_rate": learning_rate,
        "num_valid_tokens": num_valid_tokens,
        "completion_tokens_mean": totals["num_completion_tokens"] * per_rollout,
        "ended_fraction": totals["num_ended"] * per_rollout,
        **({"task_reward_mean": totals["task_reward"] * per_rollout} if "task_reward" in totals else {}),
        "staleness": totals["staleness"] * per_rollout,
        "logprob_mismatch_nats": totals["logprob_mismatch"] * per_token,
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


def metrics_of_teacher(teacher: str, totals: Mapping[str, float], wait_s: float) -> dict[str, Any]:
    """One teacher's part of a step: its tokens, means over them where there are any, and what it took."""
    prefix = f"teacher/{teacher}/"
    sums = {name.removeprefix(prefix): value for name, value in totals.items() if name.startswith(prefix)}
    num_valid_tokens = int(sums.get("num_valid_tokens", 0))
    means = {}
    if num_valid_tokens > 0:
        means = {"loss": sums["loss"] / num_valid_tokens, **mean_metrics(sums, num_valid_tokens)}
    return {"num_valid_tokens": num_valid_tokens, **means, "bytes": int(sums["teacher_bytes"]), "wait_s": wait_s}
