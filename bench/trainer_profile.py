"""Where the time of a piece of work goes: torch's profiler, its operations put into a handful of groups."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

Group = Literal[
    "matrix products",
    "weight layout",
    "attention",
    "head and softmax",
    "sampling",
    "casts",
    "copies",
    "elementwise and norms",
    "optimizer",
    "python and the rest",
]

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "mkldnn::_linear_pointwise")
_BATCHED = ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data")
_COPIES = (
    "aten::copy_",
    "aten::cat",
    "aten::index",
    "aten::index_select",
    "aten::index_put_",
    "aten::_index_put_impl_",
)
_CASTS = ("aten::_to_copy", "aten::to")
_OPTIMIZER = ("aten::_fused_adamw_", "aten::_foreach_mul_", "aten::_foreach_norm")


def group_of(name: str, shapes: Iterable[Any], parents: Iterable[str], *, vocab_size: int, is_sampling: bool) -> Group:
    """Of one operation: by its name, by whether its arrays are as wide as the vocabulary, and by what called it.

    is_sampling: the work draws tokens, so what is done to logits beside the product that makes them is sampling.
    """
    if name.startswith("mkldnn::_reorder"):
        return "weight layout"
    if "scaled_dot_product" in name or name in _BATCHED:
        return "attention"
    wide = any(_is_wide(shape, vocab_size) for shape in shapes)
    if wide and name not in _OPTIMIZER:
        return "head and softmax" if name in _PRODUCTS or not is_sampling else "sampling"
    if name in _PRODUCTS:
        return "matrix products"
    if name in _OPTIMIZER:
        return "optimizer"
    if name in _CASTS or (name == "aten::copy_" and any(parent in _CASTS for parent in parents)):
        return "casts"
    return "copies" if name in _COPIES else "elementwise and norms"


def _is_wide(shape: Any, vocab_size: int) -> bool:
    """An array of logits, or the head's weight: a matrix with the vocabulary on one side."""
    return isinstance(shape, list) and len(shape) >= 2 and vocab_size in shape


def profile_of(work: Callable[[], object], *, vocab_size: int, is_sampling: bool) -> dict[str, Any]:
    """Runs `work` once under the profiler.

    Returns: seconds by group, and the ten largest operations with their seconds and calls. The profiler itself takes
        time, most where operations are many and small: shares are what to read, and "python and the rest" is the
        part of the wall time in no operation.
    """
    # The teacher's engine computes in a thread of its own.
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=every_thread) as profiler:
        began = time.perf_counter()
        work()
        wall_s = time.perf_counter() - began
    groups: dict[str, float] = defaultdict(float)
    operations: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        self_s = event.self_cpu_time_total / 1e6
        if not _is_operation(event.name):
            continue
        parents = _parents(event)
        group = group_of(event.name, event.input_shapes or [], parents, vocab_size=vocab_size, is_sampling=is_sampling)
        groups[group] += self_s
        operations[event.name][0] += self_s
        operations[event.name][1] += 1
    groups["python and the rest"] = max(0.0, wall_s - sum(groups.values()))
    largest = sorted(operations.items(), key=lambda item: -item[1][0])[:10]
    return {
        "wall_s": wall_s,
        "shares": {name: seconds / wall_s for name, seconds in sorted(groups.items(), key=lambda item: -item[1])},
        "operations": [{"name": name, "self_s": seconds, "calls": int(calls)} for name, (seconds, calls) in largest],
    }


def _is_operation(name: str) -> bool:
    """Autograd's own frames and the profiler's marks take the rest's time."""
    return "::" in name and not name.startswith(("autograd::", "torch::"))


def _parents(event: Any) -> list[str]:
    names, parent = [], event.cpu_parent
    while parent is not None and len(names) < 2:
        names.append(parent.name)
        parent = parent.cpu_parent
    return names
