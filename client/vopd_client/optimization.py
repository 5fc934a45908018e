"""AdamW, its schedule, and the one place where gradients are scaled, clipped and checked."""

from __future__ import annotations

import math
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from vopd_client.errors import NonFiniteError
from vopd_client.schedule import learning_rate_factor


def make_optimizer(module: nn.Module, *, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW over what is trained; biases and norms (everything but matrices) do not decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate)


def make_scheduler(
    optimizer: AdamW, *, schedule: Literal["cosine", "constant"], warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Sets the learning rate of the step to come, from its number alone."""

    def factor(steps_taken: int) -> float:
        return learning_rate_factor(
            steps_taken + 1, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps
        )

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def scale_and_clip(
    accelerator: Accelerator, module: nn.Module, *, num_valid_tokens: float, max_grad_norm: float
) -> float:
    """Turns gradients of summed losses into those of the mean over all processes' tokens, and clips them.

    Data parallelism has averaged the processes' gradients, hence the factor. Returns the norm before clipping.

    Raises: NonFiniteError when the norm is not finite; on every process then, since the gradients are the same.
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, accelerator.num_processes / max(num_valid_tokens, 1.0))
    norm = float(accelerator.clip_grad_norm_(module.parameters(), max_grad_norm))
    check_finite(norm, "norm of the gradient")
    return norm


def check_finite(value: float, what: str) -> None:
    """Raises NonFiniteError for NaN and infinities."""
    if not math.isfinite(value):
        raise NonFiniteError(f"the {what} is {value}")
