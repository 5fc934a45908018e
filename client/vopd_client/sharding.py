"""FSDP2: each process keeps a part of every weight, of its gradient and of AdamW's moments.

torch's `fully_shard` gathers a layer's weights before it computes and lets them go after; the gradients are averaged
and handed out in parts. So a forward and a backward of the sharded model are exchanges that all processes take part
in, the same number of times. Sampling and evaluation are not: how many forwards they take differs from process to
process, and they run inside `whole_weights`. `lockstep` keeps a process with a problem from leaving the others in an
exchange.

accelerate carries the processes and not the shards: its own FSDP2 is left out on CPUs without a word, it wants the
optimizer made before the model is sharded, and its checkpoints fit one number of processes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vopd_client.errors import ConfigError
from vopd_client.model_files import merged_state_dict
from vopd_client.student import StudentForTraining

_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def shard(module: StudentForTraining, accelerator: Accelerator) -> None:
    """Shards `module` in place over all processes, before there is an optimizer; collective.

    Each decoder layer is gathered by itself. What is left, above all embedding and output head, is gathered with the
    module as a whole, from the beginning of its forward to the end of its backward: its forward uses the head's
    weight outside of the head's own forward, and an embedding may share it.

    Raises: ConfigError with one process, or a model whose layers transformers does not name.
    """
    if accelerator.num_processes == 1:
        raise ConfigError(
            "sharding fsdp shares the model among processes, and there is one: start several with torchrun or "
            "accelerate launch, or leave sharding at none"
        )
    layers = _decoder_layers(module.causal_lm)
    if not layers:
        raise ConfigError(f"sharding fsdp: transformers names no layers of {type(module.causal_lm).__name__} to gather")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for part in (*layers, module):
        fully_shard(part, mesh=mesh)
    _take_first_forward(module, accelerator.device)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Within the block, every process has all weights, and forwards of `module` or of its parts exchange nothing.

    All processes enter it, which gathers the weights; leaving it frees them, without an exchange. For forwards
    without gradients. Without shards there is nothing to do.
    """
    parts = _sharded_parts(module)
    for part in parts.values():
        part.unshard()
    try:
        with _without_forward_hooks(parts):
            yield
    finally:
        _let_go(parts)


def gathered_state_dict(module: StudentForTraining, *, is_main_process: bool) -> dict[str, Tensor]:
    """The student's weights under plain transformers' names, with LoRA merged in; on the main process's CPU.

    All processes call it; the others get an empty one. Gathered are the weights of one layer at a time. Without shards
    the main process gets them where they are.
    """
    model = module.causal_lm
    if not is_sharded(module):
        return merged_state_dict(model) if is_main_process else {}
    names_in_module = {id(part): name for name, part in module.named_modules()}
    prefix = f"{names_in_module[id(model)]}."
    gathered: dict[str, Tensor] = {}
    for state in _one_part_at_a_time(module, prefix):
        if is_main_process:
            gathered |= _on_cpu(merged_state_dict(model, state))
    return {name: gathered[name] for name in _in_order(model, gathered)}


def gathered_adapters(module: StudentForTraining, *, is_main_process: bool) -> dict[str, Tensor]:
    """LoRA's own weights under the names of PEFT's state dict, as `gathered_state_dict` gives the student's."""
    if not is_sharded(module):
        state = module.model.state_dict() if is_main_process else {}
        return {name: tensor for name, tensor in state.items() if "lora_" in name}
    gathered: dict[str, Tensor] = {}
    for state in _one_part_at_a_time(module, "model."):
        if is_main_process:
            gathered |= _on_cpu({name: tensor for name, tensor in state.items() if "lora_" in name})
    return gathered


def let_go(module: nn.Module) -> None:
    """Frees gathered weights that a step which was broken off has left behind; without an exchange."""
    _let_go(_sharded_parts(module))


def _decoder_layers(model: Any) -> list[nn.Module]:
    """The modules that transformers does not split, none of them inside another."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ in names and id(module) not in inside:
            found.append(module)
            inside.update(id(part) for part in module.modules())
    return found


@torch.no_grad()
def _take_first_forward(module: StudentForTraining, device: torch.device) -> None:
    """A forward of one token. FSDP takes the module whose forward comes first for the root of all."""
    one_BT = torch.ones(1, 1, dtype=torch.int64, device=device)
    module(
        input_ids_BS=one_BT,
        attention_mask_BS=one_BT,
        row_index_BT=0 * one_BT,
        completion_ids_BT=0 * one_BT,
        support_ids_BTK=torch.zeros(1, 1, 0, dtype=torch.int64, device=device),
        support_mask_BTK=torch.zeros(1, 1, 0, dtype=torch.bool, device=device),
        loss_mask_BT=one_BT.bool(),
    )
    _let_go(_sharded_parts(module))


def _sharded_parts(module: nn.Module) -> dict[str, FSDPModule]:
    """What is gathered by itself, by name, in the same order in every process."""
    return {name: part for name, part in module.named_modules() if isinstance(part, FSDPModule)}


def _let_go(parts: Mapping[str, FSDPModule]) -> None:
    for part in parts.values():
        part.reshard()


@contextmanager
def _without_forward_hooks(parts: Mapping[str, Any]) -> Iterator[None]:
    """Forwards pass FSDP by.

    Its hooks note the order of forwards, and gather weights ahead in that order during the next backward. Forwards
    that one process takes and another does not would make them gather different ones, and wait forever.
    """
    saved = [(part, name, getattr(part, name)) for part in parts.values() for name in _FORWARD_HOOKS]
    for part, name, _ in saved:
        setattr(part, name, OrderedDict())
    try:
        yield
    finally:
        for part, name, hooks in saved:
            setattr(part, name, hooks)


def _one_part_at_a_time(module: nn.Module, prefix: str) -> Iterator[dict[str, Tensor]]:
    """The weights and buffers of every part while they are whole, under their names behind `prefix`."""
    parts = _sharded_parts(module)
    in_state = module.state_dict().keys()
    yield {name.removeprefix(prefix): buffer for name, buffer in module.named_buffers() if name in in_state}
    for own_name, part in parts.items():
        inner = [name for name in parts if name != own_name and name.startswith(f"{own_name}." if own_name else "")]
        part.unshard()
        yield {
            name.removeprefix(prefix): parameter.detach()
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if name.startswith(f"{own_name}." if own_name else "")
            and not any(name.startswith(f"{other}.") for other in inner)
        }
        part.reshard()


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies; a weight under two names stays one tensor."""
    copies = {tensor.data_ptr(): tensor.detach().to("cpu", copy=True) for tensor in state.values()}
    return {name: copies[tensor.data_ptr()] for name, tensor in state.items()}


def _in_order(model: nn.Module, gathered: Mapping[str, Tensor]) -> list[str]:
    """The names as a state dict has them."""
    plain = (name.replace(".base_layer.", ".") for name in model.state_dict())
    return [name for name in plain if name in gathered]
