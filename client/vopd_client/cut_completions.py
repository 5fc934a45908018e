"""Completions that reached the length limit without an end token, when they are to stay out of the loss.

No teacher is asked about them and no microbatch holds them. What is left when nothing else is there: a pass that
takes part in every exchange between processes and changes nothing, and a step that leaves the weights as they are.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vopd_client.rollouts.base import Rollout


def is_masked(rollout: Rollout, cut_completions: Literal["keep", "mask"]) -> bool:
    return cut_completions == "mask" and not rollout.ended


def idle_loss(model: nn.Module, rollout: Rollout, device: torch.device) -> Tensor:
    """0, with a gradient of 0 for every weight that is trained.

    A process whose rollouts are all masked must run the model forward and backward like the others, or they would
    wait for its part of the gradients. The cheapest input does: the prompt, and one token that is scored.

    Args: model: the student's module, as accelerate wrapped it.
    """
    ids = np.append(rollout.prompt_ids, rollout.completion_ids[0])
    one_BT = torch.ones(1, 1, dtype=torch.int64, device=device)
    outputs = model(
        input_ids_BS=torch.from_numpy(ids)[None].to(device),
        attention_mask_BS=torch.ones(1, len(ids), dtype=torch.int64, device=device),
        row_index_BT=one_BT * (len(rollout.prompt_ids) - 1),
        completion_ids_BT=one_BT * int(rollout.completion_ids[0]),
        support_ids_BTK=torch.zeros(1, 1, 0, dtype=torch.int64, device=device),
        support_mask_BTK=torch.zeros(1, 1, 0, dtype=torch.bool, device=device),
        loss_mask_BT=one_BT.bool(),
        teacher_hidden_BTH=None,
    )
    loss: Tensor = 0.0 * outputs.sampled_logprobs_BT.sum()
    return loss


def skip_update(scheduler: Any) -> None:
    """The step counts and the learning rate moves on; weights and moments stay.

    AdamW moves weights by its momentum whatever the gradient is: with nothing learned, that would be a step on what
    earlier steps learned, once more.
    """
    with warnings.catch_warnings():
        # Of the first step: torch takes a schedule that moves before the optimizer for a mistake.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()
