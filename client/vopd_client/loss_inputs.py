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

if TYPE_CHECKING:
    from vopd_client.batch import Batch
    from vopd_client.student import StudentOutputs


@dataclass(frozen=True)
class LossInputs:
    """One microbatch: upcast, finite, and 0 at positions outside the loss mask. Only log pi has a gradient."""

    sampled_logprobs_BT: Tensor
    reward_BT: Tensor
    support: SupportLogprobs  # empty outside the loss mask
    sum_pi_squared_BT: Tensor


def read_inputs(
    student: StudentOutputs, batch: Batch, support: SupportLogprobs, support_ids_BTK: Tensor | None
) -> LossInputs:
    """Takes out what is masked *before* any arithmetic (0 * inf is NaN, in a gradient too), then checks the rest.

    Args: support_ids_BTK: for the error message; None where column v of the support is id v.
    Raises: NonFiniteError for a NaN or an infinity inside the masks; names the prompt, the position and the id.
    """
    valid_BT = batch.loss_mask_BT
    dtype = _compute_dtype(student.sampled_logprobs_BT)
    sampled_BT = torch.where(valid_BT, student.sampled_logprobs_BT.to(dtype), 0.0)
    teacher_BT = torch.where(valid_BT, batch.teacher_logprobs_BT.to(dtype), 0.0)
    mask_BTK = support.mask_BTK & valid_BT[..., None]
    support = SupportLogprobs(
        torch.where(mask_BTK, support.student_BTK.to(dtype), 0.0),
        torch.where(mask_BTK, support.teacher_BTK.to(dtype), 0.0).detach(),
        mask_BTK,
    )
    sum_pi_squared_BT = torch.where(valid_BT, student.sum_pi_squared_BT.detach().to(dtype), 0.0)
    per_position = (sampled_BT, teacher_BT, sum_pi_squared_BT)
    is_finite_BT = torch.stack([values_BT.isfinite() for values_BT in per_position]).all(0)
    is_finite_BT &= (support.student_BTK.isfinite() & support.teacher_BTK.isfinite()).all(-1)
    if not bool(is_finite_BT.all()):  # the one place where the device is waited for
        raise NonFiniteError(_describe_first(~is_finite_BT, student, batch, support, support_ids_BTK))
    return LossInputs(sampled_BT, (teacher_BT - sampled_BT).detach(), support, sum_pi_squared_BT)


def _compute_dtype(logprobs: Tensor) -> torch.dtype:
    return torch.float64 if logprobs.dtype == torch.float64 else torch.float32


def _describe_first(
    is_bad_BT: Tensor,
    student: StudentOutputs,
    batch: Batch,
    support: SupportLogprobs,
    support_ids_BTK: Tensor | None,
) -> str:
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
            support_id = column if support_ids_BTK is None else int(support_ids_BTK[row, position, column])
            value = logprobs_BTK[row, position, column].item()
            return f"the {owner}'s log-probability of id {support_id} in the support at {where} is {value}"
    return f"the student's sum of squared probabilities at {where} is {student.sum_pi_squared_BT[row, position]}"
