"""Gradient checkpointing: a layer keeps its input alone, and computes the rest again when its gradients are due.

transformers' own switch acts where a layer is in training mode, which turns the model's dropout on, too, while pi in
the training forward is to be the pi that sampled. So here torch's checkpointing is put around the forwards of the
layers that transformers marks as fit for it, inside a block: all modes stay as they are, and sampling with its cache,
which runs outside of the block, is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vopd_client.errors import ConfigError

InRecomputation = Callable[[], AbstractContextManager[None]]


def layers_to_checkpoint(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model whose inside is computed again, none of them inside another.

    Raises: ConfigError where transformers does not provide for it in this architecture.
    """
    layers = list(_outermost_layers(model))
    if not layers or not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing: {type(model).__name__} does not support it in this version of transformers"
        )
    return layers


def _outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost_layers(child)


@contextmanager
def checkpointing(layers: Sequence[nn.Module], in_recomputation: InRecomputation = nullcontext) -> Iterator[None]:
    """Within the block, forwards of the layers keep their inputs only.

    in_recomputation: makes a context for each second computation, which happens during backward, after the block:
        whatever the block's forwards run in beside gradient mode, autocast and random state, which torch restores.
    """
    for layer in layers:
        vars(layer)["forward"] = partial(_checkpointed, layer.forward, in_recomputation)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _checkpointed(
    forward: Callable[..., Any], in_recomputation: InRecomputation, *inputs: Any, **named_inputs: Any
) -> Any:
    """Not reentrant, so that inputs without a gradient of their own, as LoRA's first layer has, are no obstacle."""
    return checkpoint(
        partial(forward, **named_inputs),
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), in_recomputation()),
    )
