"""Checkpoints of a sharded run: the same files as those of any other, so that each kind goes on from the other's.

Every tensor is gathered by itself and written by the main process; every process reads the files and keeps its part
of each tensor. Nothing in them says how many processes there were.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vopd_client.sharding import let_go

# accelerate's names for them.
WEIGHTS_FILE, OPTIMIZER_FILE, SCHEDULER_FILE = "model.safetensors", "optimizer.bin", "scheduler.bin"


class ShardedState:
    """Stands in for accelerate's Accelerator where state is saved and loaded; every method is collective."""

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizer: Any, scheduler: Any) -> None:
        self._accelerator = accelerator
        self._module = module
        self._optimizer = optimizer
        self._scheduler = scheduler

    @property
    def is_main_process(self) -> bool:
        return bool(self._accelerator.is_main_process)

    def wait_for_everyone(self) -> None:
        self._accelerator.wait_for_everyone()

    def save_state(self, output_dir: str) -> None:
        """Raises: OSError, RuntimeError and SafetensorError of the main process when it cannot write."""
        let_go(self._module)  # a step may have been broken off
        weights = {name: _gathered(tensor, self.is_main_process) for name, tensor in self._module.named_parameters()}
        optimizer = _map_tensors(self._optimizer.state_dict(), lambda value: _gathered(value, self.is_main_process))
        if not self.is_main_process:
            return
        directory = Path(output_dir)
        weights |= {name: buffer.cpu().contiguous() for name, buffer in _kept_buffers(self._module)}
        save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        torch.save(optimizer, directory / OPTIMIZER_FILE)
        torch.save(self._scheduler.state_dict(), directory / SCHEDULER_FILE)

    @torch.no_grad()
    def load_state(self, input_dir: str) -> None:
        """Raises: OSError, KeyError, ValueError, RuntimeError, UnpicklingError and SafetensorError for files that are
        of something else."""
        directory = Path(input_dir)
        names: dict[int, list[str]] = {}  # of one weight; under which of them it was saved is the writer's choice
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            there = set(file.keys())
            for name, parameter in self._module.named_parameters():
                saved_as = next((other for other in names[id(parameter)] if other in there), name)
                own_part = _part_of(file.get_tensor(saved_as), parameter)
                _local(parameter).copy_(_local(own_part))
            for name, buffer in _kept_buffers(self._module):
                buffer.copy_(file.get_tensor(name))
        self._optimizer.load_state_dict(self._own_parts(_read(directory / OPTIMIZER_FILE)))
        self._scheduler.load_state_dict(_read(directory / SCHEDULER_FILE))

    def _own_parts(self, whole: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict of whole tensors as one of this process's parts."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {
                name: _part_of(value, parameters[index]) if _is_like(value, parameters[index]) else value
                for name, value in values.items()
            }
            for index, values in whole["state"].items()
        }
        return {"state": state, "param_groups": whole["param_groups"]}


def _gathered(value: Any, keep: bool) -> Any:
    """A part of a tensor as the whole, on the CPU; `keep` says where it is wanted. Anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().to("cpu", copy=True) if keep else None


def _part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Raises: ValueError when `whole` is of another shape."""
    if whole.shape != like.shape:
        raise ValueError(f"a tensor of shape {tuple(whole.shape)} where {tuple(like.shape)} is wanted")
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0


def _map_tensors(value: Any, change: Any) -> Any:
    """`value` with every tensor in its dicts and lists changed, in order."""
    match value:
        case dict():
            return {name: _map_tensors(item, change) for name, item in value.items()}
        case list() | tuple():
            return type(value)(_map_tensors(item, change) for item in value)
        case _:
            return change(value)


def _kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that belong to the state."""
    in_state = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in in_state)


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
