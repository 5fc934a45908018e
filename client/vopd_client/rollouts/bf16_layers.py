"""Linear layers whose weights were cast to bf16 once, and laid out once, for as long as they do not change.

Autocast casts a float32 weight again in every forward, and oneDNN lays a bf16 weight out again in every product; for
the few rows of a decoding step that reads and writes the weights several times over. The products are the same, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LinearForward = Callable[[Tensor], Tensor]


def bf16_linear_forwards(model: nn.Module) -> dict[nn.Linear, LinearForward]:
    """A forward for every plain linear layer with float32 weights, from its weights as they are now.

    Subclasses and layers whose forward somebody has replaced keep theirs.
    """
    return {
        module: _bf16_forward(module)
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and module.weight.dtype == torch.float32
    }


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Linear, LinearForward]) -> Iterator[None]:
    """Within the block, the layers compute with these forwards; their weights and hooks are untouched."""
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]


def _bf16_forward(layer: nn.Linear) -> LinearForward:
    weight_OI = layer.weight.detach().to(torch.bfloat16)
    bias_O = None if layer.bias is None else layer.bias.detach().to(torch.bfloat16)
    if _can_be_laid_out(weight_OI):
        return partial(_laid_out_linear, weight=torch.ops.mkldnn._reorder_linear_weight(weight_OI), bias_O=bias_O)
    return partial(_bf16_linear, weight_OI=weight_OI, bias_O=bias_O)


def _can_be_laid_out(weight_OI: Tensor) -> bool:
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.numel() > 0
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _laid_out_linear(values: Tensor, *, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    """The operator that torch's compiler emits for a constant weight, without anything fused to it."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(values.to(torch.bfloat16), weight, bias_O, "none", [], "")
    return result


def _bf16_linear(values: Tensor, *, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return linear(values.to(torch.bfloat16), weight_OI, bias_O)
