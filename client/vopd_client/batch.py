"""Rollouts and their scores as padded tensors.

Axes: B sequences, S input tokens (prompt + completion, right-padded), T completion tokens, K support size,
V vocabulary. Row t of every [B, T] array belongs to completion token t, which the model predicts from input
position `row_index_BT[b, t]` = C_b - 1 + t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One microbatch. Padding is False in the masks and holds harmless finite numbers everywhere else."""

    input_ids_BS: Tensor  # int64
    attention_mask_BS: Tensor  # int64, 1 at real tokens
    row_index_BT: Tensor  # int64, 0 at padding
    completion_ids_BT: Tensor  # int64
    loss_mask_BT: Tensor  # bool
    support_ids_BTK: Tensor  # int64
    support_mask_BTK: Tensor  # bool
    behaviour_logprobs_BT: Tensor  # float32
    teacher_logprobs_BT: Tensor  # float32
    teacher_support_logprobs_BTK: Tensor  # float32
    teacher_full_logprobs_BTV: Tensor | None  # float32, only with a teacher in this process
    prompt_names: tuple[str, ...]  # file:line of each sequence's prompt, for error messages

    @property
    def num_valid_tokens(self) -> int:
        return int(self.loss_mask_BT.sum())

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)
