"""A student whose weights are others than at the start, without a training."""

from __future__ import annotations

import torch

from vopd_client.student import LoadedStudent


@torch.no_grad()
def moved(loaded: LoadedStudent) -> LoadedStudent:
    """Moves every trainable weight, as training does; the same way every time."""
    torch.manual_seed(1)
    for parameter in loaded.module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return loaded
