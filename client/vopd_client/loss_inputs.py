"""What a loss may look at: one microbatch, with everything that is masked taken out and everything else finite.

Axes: B sequences, T completion tokens, K support size. Row t belongs to completion token t. Natural log, nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vopd_client.baselines import SupportLogprobs
from vopd_client.errors import NonFiniteError
from vopd_client.whole_vocabulary import RewardMoments

if TYPE_CHECKING:
    from vopd_client.batch import Batch
    from vopd_client.student import StudentOutputs


@dataclass(frozen=True)
class LossInputs:
    """One microbatch: upcast, finite, and 0 at positions outside the loss mask. Only log pi has a gradient.

    reward_BT is that of the models as they are; a floor is the support's, and the moments', own affair.
    sampled_inside_BT: 1[y in S]; True everywhere with the whole vocabulary at hand.
    """

    sampled_logprobs_BT: Tensor
    behaviour_logprobs_BT: Tensor
    reward_BT: Tensor
    support: SupportLogprobs  # empty outside the loss mask
    sampled_inside_BT: Tensor
    sum_pi_squared_BT: Tensor
    whole_BT: RewardMoments | None
    task_advantages_BT: Tensor


def read_inputs(student: StudentOutputs, batch: Batch, reward_floor: float | None) -> LossInputs:
    """Takes out what is masked *before* any arithmetic (0 * inf is NaN, in a gradient too), then checks the rest.

    Raises: NonFiniteError for a NaN or an infinity inside the masks; names the prompt, the position and the id.
    """
    valid_BT = batch.loss_mask_BT
    dtype = _compute_dtype(student.sampled_logprobs_BT)

    def valid(values_BT: Tensor) -> Tensor:
        return torch.where(valid_BT, values_BT.to(dtype), 0.0)

    sampled_BT = valid(student.sampled_logprobs_BT)
    teacher_BT = valid(batch.teacher_logprobs_BT)
    mask_BTK = batch.support_mask_BTK & valid_BT[..., None]
    support = SupportLogprobs(
        torch.where(mask_BTK, student.support_logprobs_BTK.to(dtype), 0.0),
        torch.where(mask_BTK, batch.teacher_support_logprobs_BTK.to(dtype), 0.0).detach(),
        mask_BTK,
        reward_floor,
    )
    sum_pi_squared_BT = valid(student.sum_pi_squared_BT.detach())
    whole_BT = None
    if student.whole_BT is not None:
        whole_BT = RewardMoments(*(valid(values_BT.detach()) for values_BT in student.whole_BT))
    per_position = (sampled_BT, teacher_BT, sum_pi_squared_BT, *(whole_BT or ()))
    is_finite_BT = torch.stack([values_BT.isfinite() for values_BT in per_position]).all(0)
    is_finite_BT &= (support.student_BTK.isfinite() & support.teacher_BTK.isfinite()).all(-1)
    if not bool(is_finite_BT.all()):  # the one place where the device is waited for
        raise NonFiniteError(_describe_first(~is_finite_BT, student, batch, support))
    return LossInputs(
        sampled_logprobs_BT=sampled_BT,
        behaviour_logprobs_BT=valid(batch.behaviour_logprobs_BT),
        reward_BT=(teacher_BT - sampled_BT).detach(),
        support=support,
        sampled_inside_BT=torch.ones_like(valid_BT)
        if whole_BT is not None
        else sampled_token_in_support(batch.completion_ids_BT, batch.support_ids_BTK, mask_BTK),
        sum_pi_squared_BT=sum_pi_squared_BT,
        whole_BT=whole_BT,
        task_advantages_BT=valid(batch.task_advantages_BT),
    )


def sampled_token_in_support(completion_ids_BT: Tensor, support_ids_BTK: Tensor, support_mask_BTK: Tensor) -> Tensor:
    """1[y in S] by id, [B, T] bool. S itself never depends on y."""
    return ((support_ids_BTK == completion_ids_BT[..., None]) & support_mask_BTK).any(-1)


def _compute_dtype(logprobs: Tensor) -> torch.dtype:
    return torch.float64 if logprobs.dtype == torch.float64 else torch.float32


def _describe_first(is_bad_BT: Tensor, student: StudentOutputs, batch: Batch, support: SupportLogprobs) -> str:
    """Which value is not finite at the first bad position, and where that is."""
    row, position = (int(index) for index in is_bad_BT.nonzero()[0])
    token_id = int(batch.completion_ids_BT[row, position])
    where = f"completion token {position} (id {token_id}) of {batch.prompt_names[row]}"
    sampled = {"student": student.sampled_logprobs_BT, "teacher": batch.teacher_logprobs_BT}
    for owner, logprobs_BT in sampled.items():
        value = logprobs_BT[row, position].item()
        if not math.isfinite(value):
            return f"the {owner}'s log-probability of {where} is {value}"
    for owner, logprobs_BTK in {"student": support.student_BTK, "teacher": support.teacher_BTK}.items():
        bad_columns = (~logprobs_BTK[row, position].isfinite()).nonzero()
        if bad_columns.numel():
            column = int(bad_columns[0])
            support_id = int(batch.support_ids_BTK[row, position, column])
            value = logprobs_BTK[row, position, column].item()
            return f"the {owner}'s log-probability of id {support_id} in the support at {where} is {value}"
    if student.whole_BT is not None and not math.isfinite(value := float(student.whole_BT.reverse_kl[row, position])):
        return (
            f"KL(student || teacher) over the whole vocabulary at {where} is {value}: "
            "the teacher gives no probability to an id that the student does"
        )
    return f"the student's sum of squared probabilities at {where} is {student.sum_pi_squared_BT[row, position]}"
