"""Bringing the student's weights to the engine that samples: in what order, on what way, and when.

    pause -> the label says that the weights are in part -> deliver -> reset the prefix cache -> label -> resume

What was read with old weights must not be found in the prefix cache. Every rollout names the label of the weights that
sampled it, and the sampler accepts that of the last push only.

Ways to deliver, the setting weight_sync:

    disk   safetensors files in a directory that the engine can read; everywhere, and all there is on a CPU
    nccl   a broadcast from this GPU to those of a server; vLLM's own weight transfer
    ipc    the memory of this GPU, which an engine on the same one maps; vLLM's own weight transfer
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from vopd_client.errors import ConfigError, RolloutEngineError, RolloutEngineUnavailableError, VopdError
from vopd_client.processes import Problem, agree

Way = Literal["disk", "nccl", "ipc"]
SHARD_BYTES = 1 << 30  # what is held in the engine's type beside the weights themselves
IN_PART = "in part: "


class WeightControl(Protocol):
    """What vLLM offers for updates of its weights, in this process or over HTTP."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def can_read(self, path: str) -> bool: ...

    def reload(self, path: str) -> None: ...

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def reset_prefix_cache(self) -> bool: ...

    def set_weight_version(self, version: str) -> None: ...


def push(control: WeightControl, deliver: Callable[[], None], version: str) -> None:
    """One update of an engine's weights, after which everything it samples is labelled `version`.

    An update that fails leaves the label that says so; requests are taken again, and their rollouts refused.

    Raises: what `deliver` and the control raise; RolloutEngineError when the prefix cache cannot be emptied.
    """
    control.pause()
    try:
        control.set_weight_version(IN_PART + version)
        deliver()
        if not control.reset_prefix_cache():
            raise RolloutEngineError("the rollout engine did not empty its prefix cache: requests of others still run")
        control.set_weight_version(version)
    except BaseException:
        with suppress(VopdError):
            control.resume()
        raise
    control.resume()


def choose_way(
    asked: Literal["auto", "disk", "nccl", "ipc"], *, transfer: str, on_server: bool, trainer_on_gpu: bool
) -> Way:
    """auto: what the engine was started for, where the trainer's weights are on a GPU; else the disk.

    Args: transfer: the backend of vLLM's weight transfer that the engine has; "": none.
    Raises: ConfigError for a way that there is not.
    """
    fits: Way = "nccl" if on_server else "ipc"
    if asked == "auto":
        return fits if transfer == fits and trainer_on_gpu else "disk"
    if asked == "disk":
        return asked
    if asked != fits:
        raise ConfigError(
            f"weight_sync {asked} is for {'an engine in the trainer' if on_server else 'a server'}: "
            f"a {'server has' if on_server else 'trainer with its own engine has'} disk and {fits}"
        )
    if not trainer_on_gpu:
        raise ConfigError(f"weight_sync {asked} moves weights between GPUs, and the student is on none: use disk")
    if transfer != asked:
        raise ConfigError(
            f"weight_sync {asked} needs a server that was started with "
            f'--weight-transfer-config \'{{"backend": "{asked}"}}\' (it has {transfer or "none"})'
        )
    return asked


def weights_directory(run_directory: Path, *, num_bytes: int, same_machine: bool, memory: Path) -> Path:
    """Where weights wait for the engine: in memory where engine and trainer share it and there is room for two copies.

    Args: memory: a directory of a file system in memory, /dev/shm where there is one.
    """
    if same_machine and memory.is_dir() and shutil.disk_usage(memory).free > 2 * num_bytes:
        path = hashlib.sha256(str(run_directory.absolute()).encode()).hexdigest()[:12]
        return memory / f"vopd-weights-{run_directory.name}-{path}"
    return run_directory / "rollout-weights"


def write_weights(directory: Path, tensors: Iterator[tuple[str, Tensor]], *, dtype: torch.dtype) -> None:
    """Safetensors files in `directory`, which appears complete or not at all. One file's tensors are held at a time.

    Raises: RolloutEngineError when they cannot be written.
    """
    temporary = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        shard: dict[str, Tensor] = {}
        num_shards = num_bytes = 0

        def flush() -> None:
            save_file(shard, temporary / f"model-{num_shards:05d}.safetensors", metadata={"format": "pt"})
            shard.clear()

        for name, tensor in tensors:
            held = in_dtype(tensor, dtype).cpu().contiguous()
            if shard and num_bytes + held.nbytes > SHARD_BYTES:
                flush()
                num_shards, num_bytes = num_shards + 1, 0
            shard[name] = held
            num_bytes += held.nbytes
        flush()
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RolloutEngineError(f"cannot write the weights for the rollout engine to {directory}: {error}") from error


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class WeightSync:
    """The weights of one run's engines, and the label of those that they have.

    Every process makes one and calls `refresh` at the same points.

    Args:
        control: of this process's engine; None in a process whose rollouts come from an engine that another updates.
        gather: the student's weights by the names of its checkpoints. A collective.
        deliver: brings them to the engine, once written or sent; called where there is a control.
        write: before that, in the main process: puts them where the engines of all processes read them; None: nowhere.
        clear: after that, in the main process.
        run_label: what labels of this run begin with.
    """

    def __init__(
        self,
        *,
        control: WeightControl | None,
        gather: Callable[[], Mapping[str, Tensor]],
        deliver: Callable[[Mapping[str, Tensor]], None],
        write: Callable[[Mapping[str, Tensor]], None] | None,
        clear: Callable[[], None],
        is_main_process: bool,
        run_label: str,
    ) -> None:
        self._control = control
        self._gather = gather
        self._deliver = deliver
        self._write = write
        self._clear = clear
        self._is_main_process = is_main_process
        self._run_label = run_label
        self.version = ""

    def refresh(self, num_updates: int) -> str:
        """Pushes the weights after `num_updates` updates, unless the engines have them. A collective.

        All processes wait for one another, and all raise when one has a problem.

        Returns: the label of the weights. Raises: RolloutEngineError, RolloutEngineUnavailableError.
        """
        version = f"{self._run_label}/{num_updates}"
        if version == self.version:
            return version
        self.version = ""
        weights = self._gather()

        def write() -> None:
            if self._write is not None and self._is_main_process:
                self._write(weights)

        def deliver() -> None:
            if self._control is not None:
                push(self._control, lambda: self._deliver(weights), version)

        try:
            together(write)
            together(deliver)
        finally:
            if self._is_main_process:
                self._clear()
        self.version = version
        return version


def together(work: Callable[[], None]) -> None:
    """Does this process's part, and goes on when all have. Raises: its own problem, else the first process's."""
    problem: Problem | None = None
    try:
        work()
    except VopdError as error:
        problem = error
    except (RuntimeError, ValueError, OSError) as error:
        problem = RolloutEngineError(f"the weights do not reach the rollout engine: {error}")
        problem.__cause__ = error
    agree(problem, {})


def check_can_read(control: WeightControl, directory: Path) -> None:
    """Whether the engine sees what the trainer writes. Raises: ConfigError."""
    marker = directory.with_name(f"{directory.name}.can-you-read-this")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        can_read = control.can_read(str(marker))
    except OSError as error:
        raise ConfigError(f"cannot write to {directory.parent}, where weights wait for the engine: {error}") from error
    except (RolloutEngineError, RolloutEngineUnavailableError) as error:
        raise ConfigError(f"the rollout engine cannot be asked what it reads: {error}") from error
    finally:
        marker.unlink(missing_ok=True)
    if not can_read:
        raise ConfigError(
            f"weight_sync disk: the rollout server does not see {directory.parent} of the trainer; give both a "
            "directory that they share as output_dir, or use weight_sync nccl"
        )
