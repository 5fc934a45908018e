"""Training processes that go on together or stop together.

A process that meets a problem in the middle of a step must not leave the others waiting in a gradient exchange.
So each keeps its problem to itself until `agree`, which every process reaches once a step, before the exchange.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vopd_client.errors import ConfigError, VopdError
from vopd_client.interruption import Interrupted
from vopd_client.train_config import TrainConfig


class Wrapped(NamedTuple):
    """A model, its optimizer and its schedule, as accelerate wrapped them."""

    model: nn.Module
    optimizer: Any
    scheduler: Any


Problem = Interrupted | VopdError
LARGEST_OF = "largest/"  # begins the names of numbers that processes do not add up
Report = tuple[Problem | None, dict[str, float]]
Exchange = Callable[[list[Report]], list[Report]]

# Set by `accelerate launch` where its settings ask for shards; on CPUs it goes on without them and says nothing.
_ASKED_FOR_SHARDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_UNSHARDED = {
    *(DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU),
    *(DistributedType.MULTI_NPU, DistributedType.MULTI_MLU, DistributedType.MULTI_HPU),
}


def make_deterministic() -> None:
    """The same numbers in the same order give the same bits, in this process and from now on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA reads it once, when it starts
    torch.use_deterministic_algorithms(True)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices and processes, as `accelerate launch` or its absence set them up.

    Raises: ConfigError when the device is not there, accelerate is to shard the model, or there are more processes
        than prompts a step.
    """
    for variable, what in _ASKED_FOR_SHARDS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise _sharded_by_accelerate(what)
    # Of a weight that two layers share, one copy is saved and both are loaded; accelerate warns every time.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    # One process may wait for the teacher or evaluate while the others wait for it.
    patience = timedelta(seconds=7200 + 2 * config.teacher_timeout_s)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.device == "cpu",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the trainer does it, on sums
            step_scheduler_with_optimizer=False,  # one step of ours is one step of the schedule
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=patience),
            ],
        )
    except ValueError as error:
        raise ConfigError(f"accelerate cannot start: {error}") from error
    if config.device is not None and accelerator.device.type != config.device:
        raise ConfigError(f"device {config.device} was asked for; what there is here is {accelerator.device.type}")
    if accelerator.distributed_type not in _UNSHARDED:
        raise _sharded_by_accelerate(accelerator.distributed_type.value)
    if accelerator.num_processes > config.prompts_per_step:
        raise ConfigError(
            f"{accelerator.num_processes} processes share prompts_per_step {config.prompts_per_step}: "
            "each needs at least one"
        )
    return accelerator


def _sharded_by_accelerate(what: str) -> ConfigError:
    return ConfigError(
        f"accelerate's settings ask for {what}; rollouts need the whole model now and then, so its shards are made "
        "here: take that setting (--use_fsdp and the like) out of accelerate's, and give --sharding fsdp for FSDP2"
    )


def wrap(accelerator: Accelerator, module: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> Wrapped:
    """What accelerate makes of them, with no exchange hidden in a forward, and checkpoints that any number of
    processes can read. A model that is sharded already gets the autocast alone."""
    if isinstance(module, FSDPModule):
        return Wrapped(
            accelerator.prepare_model(module, evaluation_mode=True), *accelerator.prepare(optimizer, scheduler)
        )
    wrapped = Wrapped(*accelerator.prepare(module, optimizer, scheduler))
    if isinstance(wrapped.model, DistributedDataParallel):
        wrapped.model.broadcast_buffers = False  # they are constants; its argument has another name in each torch
    accelerator.register_save_state_pre_hook(partial(_save_unwrapped, accelerator))
    accelerator.register_load_state_pre_hook(partial(_load_unwrapped, accelerator))
    return wrapped


def _save_unwrapped(accelerator: Accelerator, models: list[Any], weights: list[Any], directory: str) -> None:
    weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models]


def _load_unwrapped(accelerator: Accelerator, models: list[Any], directory: str) -> None:
    models[:] = [accelerator.unwrap_model(model) for model in models]


def from_main_process(value: Any) -> Any:
    """The main process's value, in every process."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def agree(
    problem: Problem | None, sums: Mapping[str, float], *, exchange: Exchange = gather_object
) -> dict[str, float]:
    """Adds up `sums` over all processes; every process calls it, once a step.

    Raises: this process's `problem`, else that of the first process that has one.
    """
    reports = exchange([(problem, dict(sums))])
    if problem is not None:
        raise problem
    for other, _ in reports:
        if other is not None:
            raise other
    return add_up([other_sums for _, other_sums in reports])


def add_up(all_sums: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sum of each number over the processes that have it: some have no rollouts of one of several teachers.

    Of a name that begins with LARGEST_OF, the largest; such numbers are never negative.
    """
    names = dict.fromkeys(name for sums in all_sums for name in sums)
    return {
        name: (max if name.startswith(LARGEST_OF) else sum)(sums.get(name, 0.0) for sums in all_sums) for name in names
    }
