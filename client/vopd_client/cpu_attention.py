"""Attention on CPUs, where torch's kernels and transformers' use of them leave the most behind.

Changed for models that attend by transformers' own `sdpa`, inside a block, and on CPUs only:
- with a mask, transformers copies keys and values for every query head that shares them; at one token a step that
  costs more than the step's matrix products. torch's CPU kernel takes shared heads as they are, with a mask too.
- the backward kernel takes two to four times as long in bf16 as in float32 while sequences are short, so a training
  forward under autocast attends to short ones in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vopd_cpu"

# Up to here float32 is faster, forward and backward together; by twice as many tokens bf16 is.
MOST_TOKENS_IN_FLOAT32 = 256


def cpu_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """The interface of transformers' attention functions.

    query: [B, query heads, S, head size]; key, value: [B, heads, columns, head size]. Returns: [B, S, query heads,
        head size], of the dtype that torch's own attention would return.
    """
    is_plain = settings.get("position_bias") is None and not settings.get("dropout")
    if is_plain and attention_mask is not None and query.shape[1] != key.shape[1]:
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=settings.get("scaling"), enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if (
        attention_mask is None
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and query.shape[2] <= MOST_TOKENS_IN_FLOAT32
    ):
        with torch.autocast("cpu", enabled=False):
            states = (query.float(), key.float(), value.float())
            attended, _ = sdpa(module, *states, None, **settings)
        return attended.to(torch.get_autocast_dtype("cpu")), None
    result: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **settings)
    return result


AttentionInterface.register(NAME, cpu_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def configs_to_switch(model: nn.Module) -> list[Any]:
    """The configurations through which `model` looks up its attention; none where another attention must stay.

    Gradient checkpointing computes parts of a forward again, later and outside of any block: it stays as it is.
    """
    if next(model.parameters()).device.type != "cpu" or getattr(model, "is_gradient_checkpointing", False):
        return []
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) != "sdpa":
            continue
        # A model file may hold functions of its own under the same names.
        own = getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        if own is not ALL_ATTENTION_FUNCTIONS:
            return []
        configs[id(config)] = config
    return list(configs.values())


@contextmanager
def attending_on_cpu(configs: Sequence[Any]) -> Iterator[None]:
    """Within the block, models of these configurations attend as above."""
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
