"""The vLLM of a run: which one, checked against the run before anything expensive, started, and fed with weights."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from vopd_client.errors import ConfigError
from vopd_client.model_files import merged_state_dict
from vopd_client.processes import from_main_process
from vopd_client.rollouts.vllm import VllmSampler
from vopd_client.rollouts.vllm_engine import LocalEngine, all_engine_args, check_engine_args
from vopd_client.rollouts.vllm_facts import EngineFacts, StudentShape, check_settings, check_student
from vopd_client.rollouts.vllm_request import DrawSettings
from vopd_client.rollouts.vllm_server import ServerEngine
from vopd_client.sharding import gathered_state_dict, is_sharded
from vopd_client.student import LoadedStudent
from vopd_client.train_config import TrainConfig
from vopd_client.weight_sync import (
    Way,
    WeightSync,
    check_can_read,
    choose_way,
    weights_directory,
    write_weights,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY = Path("/dev/shm")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Engine = LocalEngine | ServerEngine


@dataclass(frozen=True)
class VllmRollouts:
    """What a run samples with. `refresh` before sampling, in all processes."""

    sampler: VllmSampler
    facts: EngineFacts
    way: Way
    sync: WeightSync
    where: str

    def refresh(self, num_updates: int) -> None:
        """The engine has the weights after `num_updates` updates; a collective. Raises: as `WeightSync.refresh`."""
        self.sampler.weight_version = self.sync.refresh(num_updates)


@dataclass
class EngineStart:
    """A server that was found, or an engine that is still to be started; `close` ends whatever is there by then."""

    config: TrainConfig
    tell: Callable[[str], None]
    engine: Engine | None = None
    _closers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"the rollout server at {self.config.rollouts_url}" if self.config.rollouts_url else "the rollout engine"

    def connect(self) -> None:
        """Finds the server, where there is to be one, and checks how it was started. Raises: ConfigError."""
        if self.config.rollouts_url is None:
            return
        self.engine = ServerEngine(
            self.config.rollouts_url,
            max_in_flight=self.config.rollout_batch_size,
            timeout_s=self.config.rollouts_timeout_s,
            tell=self.tell,
        )
        # One more than is asked of an engine in this process, see `ServerEngine`.
        check_settings(self.engine.facts, num_logprobs=self.config.top_k + 1, max_length=1, where=self.where)

    def prepare(self, student: LoadedStudent, accelerator: Accelerator, run_directory: Path) -> VllmRollouts:
        """Starts this process's own engine where there is no server, and finds the way for the weights.

        Raises: ConfigError, RolloutEngineUnavailableError.
        """
        config = self.config
        shape = shape_of(student)
        max_length = min(config.max_prompt_tokens + config.max_new_tokens, student.max_length)
        num_logprobs = min(config.top_k, student.module.num_shared_ids)
        if self.engine is None:
            self.engine = self._start(accelerator, max_length, num_logprobs, sharded=is_sharded(student.module))
        facts = self.engine.facts
        check_settings(facts, num_logprobs=num_logprobs, max_length=max_length, where=self.where)
        check_student(facts, shape, where=self.where)
        way = self._way(accelerator, facts)
        settings = DrawSettings(
            num_shared_ids=student.module.num_shared_ids,
            vocab_size=facts.vocab_size,
            end_ids=student.end_ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=config.seed,
        )
        return VllmRollouts(
            sampler=VllmSampler(self.engine, settings, support_mass=config.support_mass),
            facts=facts,
            way=way,
            sync=self._sync(way, student, accelerator, run_directory),
            where=self.where,
        )

    def close(self) -> None:
        for close in self._closers:
            close()
        if self.engine is not None:
            self.engine.close()

    def _start(self, accelerator: Accelerator, max_length: int, num_logprobs: int, *, sharded: bool) -> LocalEngine:
        config = self.config
        on_gpu = accelerator.device.type == "cuda"
        on_one_device = config.rollouts_engine_args.get("tensor_parallel_size", 1) == 1
        by_memory = on_gpu and on_one_device and not sharded and config.weight_sync in ("auto", "ipc")
        engine_args = all_engine_args(
            config.rollouts_engine_args,
            model=config.student,
            dtype="bfloat16" if config.mixed_precision == "bf16" else "float32",
            max_length=max_length,
            num_logprobs=num_logprobs,
            seed=config.seed,
            on_cpu=not on_gpu,
            transfer="ipc" if by_memory else "",
            trust_remote_code=config.trust_remote_code,
        )
        self.tell("starting vLLM for the rollouts")
        return LocalEngine(
            engine_args,
            max_in_flight=config.rollout_batch_size,
            device_index=accelerator.device.index if on_gpu and on_one_device else None,
        )

    def _way(self, accelerator: Accelerator, facts: EngineFacts) -> Way:
        has_vllm = importlib.util.find_spec("vllm") is not None
        if self.config.weight_sync in ("nccl", "ipc") and not has_vllm:
            raise ConfigError(
                f"weight_sync {self.config.weight_sync} is vLLM's own transfer: it must be installed in the trainer's "
                "environment too"
            )
        return choose_way(
            self.config.weight_sync,
            transfer=facts.weight_transfer if has_vllm else "",
            on_server=self.config.rollouts_url is not None,
            trainer_on_gpu=accelerator.device.type == "cuda",
        )

    def _sync(self, way: Way, student: LoadedStudent, accelerator: Accelerator, run_directory: Path) -> WeightSync:
        assert self.engine is not None
        module, facts = student.module, self.engine.facts
        dtype = DTYPES[facts.dtype]
        is_main_process: bool = accelerator.is_main_process
        # Every process has an engine of its own, or all have one server, which the main process updates.
        control = self.engine if self.config.rollouts_url is None or is_main_process else None
        in_every_process = way == "ipc"

        def gather() -> Mapping[str, Tensor]:
            state = (
                merged_state_dict(module.causal_lm)
                if in_every_process
                else gathered_state_dict(module, is_main_process=is_main_process)
            )
            return checkpoint_weights(module.causal_lm, state) if state else {}

        make = partial(
            WeightSync,
            control=control,
            gather=gather,
            is_main_process=is_main_process,
            run_label=from_main_process(f"{run_directory.name}-{secrets.token_hex(4)}"),
        )
        if way != "disk":
            deliver = self._transfer(way, accelerator, dtype) if control is not None else _nothing
            return make(deliver=deliver, write=None, clear=lambda: None)
        num_bytes = sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
        directory: Path = from_main_process(
            weights_directory(
                run_directory,
                num_bytes=num_bytes,
                same_machine=self._shares_a_machine(accelerator),
                memory=MEMORY,
            )
        )
        if control is not None:
            check_can_read(control, directory)
        self._closers.append(partial(shutil.rmtree, directory, ignore_errors=True))

        def reload(_weights: Mapping[str, Tensor]) -> None:
            assert self.engine is not None
            self.engine.reload(str(directory))

        return make(
            deliver=reload,
            write=lambda weights: write_weights(directory, iter(weights.items()), dtype=dtype),
            clear=partial(shutil.rmtree, directory, ignore_errors=True),
        )

    def _transfer(
        self, way: Way, accelerator: Accelerator, dtype: torch.dtype
    ) -> Callable[[Mapping[str, Tensor]], None]:
        from vopd_client.weight_transfer import Transfer, ipc_init_info, nccl_init_info

        assert self.engine is not None
        init_info: Any = (
            ipc_init_info()
            if way == "ipc"
            else nccl_init_info(str(self.config.rollouts_url), num_workers=self.engine.facts.world_size)
        )
        transfer = Transfer(self.engine, init_info, device=accelerator.device, dtype=dtype)
        self._closers.append(transfer.close)
        return transfer.deliver

    def _shares_a_machine(self, accelerator: Accelerator) -> bool:
        if self.config.rollouts_url is not None:
            return (urlsplit(self.config.rollouts_url).hostname or "") in LOOPBACK
        num_processes: int = accelerator.num_processes
        return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)) == num_processes


@contextmanager
def rollout_engine(config: TrainConfig, tell: Callable[[str], None]) -> Iterator[EngineStart | None]:
    """None for rollouts of transformers. With a server it is found here; an engine of this process's own starts when
    the rest of the run is there. All of it ends with the block.

    Raises: ConfigError; RolloutEngineUnavailableError when no server answers.
    """
    if config.rollouts == "transformers":
        yield None
        return
    if config.rollouts_url is None:
        check_engine_args(config.rollouts_engine_args)
    start = EngineStart(config, tell)
    try:
        start.connect()
        yield start
    finally:
        start.close()


def shape_of(student: LoadedStudent) -> StudentShape:
    config = student.module.causal_lm.config
    text = config.get_text_config()
    return StudentShape(
        architecture=type(student.module.causal_lm).__name__.removeprefix("FSDP"),
        vocab_size=int(text.vocab_size),
        hidden_size=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
    )


def checkpoint_weights(causal_lm: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that checkpoints have, each once: what vLLM's loaders read.

    An output head that is tied to the embedding is left out; vLLM ties them as well.
    """
    tied = getattr(causal_lm, "all_tied_weights_keys", None) or {}
    once = {name: tensor.detach() for name, tensor in state.items() if name not in tied}
    return dict(revert_weight_conversion(causal_lm, once))


def introduce_rollouts(rollouts: VllmRollouts | None, *, importance_cap: float | None, is_weighed: bool) -> list[str]:
    """What samples, and what is done about its probabilities, which are not quite the trainer's."""
    if rollouts is None:
        return []
    facts = rollouts.facts
    weighed = (
        f"sampled terms are weighed by min({importance_cap:g}, pi_trainer / pi_engine), see "
        "importance_truncated_fraction"
        if is_weighed and importance_cap is not None
        else "the objective has no sampled terms to weigh"
    )
    return [
        f"rollouts from vLLM {facts.vllm_version} ({facts.dtype} on {facts.device}), {rollouts.where}; weights reach "
        f"it by {rollouts.way} before each step's rollouts",
        f"its log-probabilities differ from the trainer's, logprob_mismatch_nats says by how much; {weighed}",
    ]


def _nothing(_weights: Mapping[str, Tensor]) -> None:
    """A process whose rollouts come from an engine that another one updates."""
