"""vLLM started by the trainer, in its environment: an engine of this process alone, on this process's device.

vLLM computes in processes of its own; what is here adds requests and takes what is finished.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from vopd_client.errors import ConfigError, RolloutEngineError, RolloutEngineUnavailableError
from vopd_client.rollouts.vllm_facts import WORKER_EXTENSION, EngineFacts
from vopd_client.rollouts.vllm_recording import Generation
from vopd_client.rollouts.vllm_request import Generate

# Why an argument cannot be passed through.
RESERVED = {
    "model": "it is the student",
    "tokenizer": "rollouts are token ids, in and out",
    "skip_tokenizer_init": "rollouts are token ids, in and out",
    "logprobs_mode": "rollouts record the probabilities that they are drawn with",
    "max_logprobs": "it follows from top_k",
    "worker_extension_cls": "this trainer's updates the weights",
    "weight_transfer_config": "use the setting weight_sync",
    "trust_remote_code": "use the setting trust_remote_code",
    "enable_lora": "adapters are merged into the weights that the engine gets",
    "data_parallel_size": "every process of the trainer has an engine of its own",
}
# Beside a student that is trained on the same GPU. vLLM's own default takes almost all of it.
SHARED_GPU_MEMORY = 0.3
CPU_CACHE_BYTES = 1 << 30
LOOK_UP_EVERY_S = 0.5  # whether the engine is still there

# What a launcher tells the trainer's processes of one another would make vLLM's own wait for them.
_OF_THE_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"),
)
# The server's plugin for vLLM's processes (vopd_server.engines.vllm_plugin) ends them with the process of this id.
_ENDS_WITH_PID = "VOPD_VLLM_SERVER_PID"


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Raises: ConfigError where vLLM is not installed, and for an argument that is not there or not to be set."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollouts vllm needs the package vllm in the trainer's environment, or rollouts_url for a server in "
            "another one"
        )
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in engine_args:
        if name in RESERVED:
            raise ConfigError(f"rollouts_engine_args.{name} cannot be set: {RESERVED[name]}")
        if name not in known:
            nearest = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"rollouts_engine_args.{name} is not an argument of vLLM's EngineArgs{hint}")


def all_engine_args(
    engine_args: Mapping[str, Any],
    *,
    model: str,
    dtype: str,
    max_length: int,
    num_logprobs: int,
    seed: int,
    on_cpu: bool,
    transfer: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The arguments of the engine: what the run decides, and what may be set, with defaults for sharing a device.

    Args: transfer: the backend of vLLM's weight transfer; "": none.
    """
    room: dict[str, Any] = (
        {"kv_cache_memory_bytes": CPU_CACHE_BYTES} if on_cpu else {"gpu_memory_utilization": SHARED_GPU_MEMORY}
    )
    return {
        "dtype": dtype,
        "max_model_len": max_length,
        "generation_config": "vllm",  # none of the model's own defaults
        "disable_log_stats": True,
        "seed": seed,
        **room,
        **engine_args,
        "model": model,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": num_logprobs,
        "worker_extension_cls": WORKER_EXTENSION,
        "trust_remote_code": trust_remote_code,
        **({"weight_transfer_config": {"backend": transfer}} if transfer else {}),
    }


class LocalEngine:
    """Implements `RolloutEngine` and `weight_sync.WeightControl`.

    Args:
        engine_args: of `all_engine_args`.
        max_in_flight: completions that vLLM is given at a time, at most.
        device_index: of the GPU that the engine is to use; None: vLLM's own choice.

    Raises: ConfigError when vLLM does not start with these arguments.
    """

    def __init__(self, engine_args: Mapping[str, Any], *, max_in_flight: int, device_index: int | None = None) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._max_in_flight = max_in_flight
        self._serial = 0
        self._finished: dict[str, Generation] = {}
        if engine_args.get("weight_transfer_config") == {"backend": "ipc"}:
            # CUDA's handles are pickled on their way to our own child. Both sides must allow it, or neither.
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        try:
            with _environment_of_the_engine(device_index), _interrupts_held_off():
                self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**engine_args), enable_multiprocessing=True)
        except (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
            raise ConfigError(f"vLLM does not start: {error}") from error
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="vopd-rollouts-watch", daemon=True).start()
        self._facts = EngineFacts(**self._workers("vopd_facts")[0])

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def generate(
        self, wanted: Sequence[Generate], *, while_waiting: Callable[[], None]
    ) -> Iterator[tuple[int, Generation]]:
        waiting = list(reversed(wanted))
        in_flight: dict[str, int] = {}
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < self._max_in_flight:
                    in_flight.update([self._add(waiting.pop())])
                for name in [name for name in in_flight if name in self._finished]:
                    yield in_flight.pop(name), self._finished.pop(name)
                while_waiting()
                if in_flight and not self._finished.keys() & in_flight.keys():
                    self._step()
        finally:
            left = [name for name in in_flight if self._finished.pop(name, None) is None]
            if left:
                with _failures_of("the end of a rollout"):
                    self._engine.abort_request(left)

    def _step(self) -> None:
        """One step of the engine. What it finishes may belong to another `generate` that is open as well."""
        with _failures_of("a rollout"):
            outputs = self._engine.step()
        for output in outputs:
            if output.finished:
                self._finished[output.request_id] = _generation(output)

    def _add(self, wanted: Generate) -> tuple[str, int]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._serial += 1
        name = f"rollout-{self._serial}"
        parameters = SamplingParams(**wanted.parameters, output_kind=RequestOutputKind.FINAL_ONLY)
        with _failures_of("a rollout"):
            self._engine.add_request(name, {"prompt_token_ids": wanted.prompt_ids.tolist()}, parameters)
        return name, wanted.index

    def close(self) -> None:
        """Ends vLLM's processes; harmless when done before."""
        self._closed.set()
        self._engine.engine_core.shutdown()

    def _watch(self) -> None:
        """Wakes whoever waits for an engine that has died.

        vLLM notices when its process is gone, killed for memory for one, and refuses further calls; the one that is
        waiting then would wait forever.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        core = self._engine.engine_core
        while not self._closed.wait(LOOK_UP_EVERY_S):
            if core.resources.engine_dead:
                if core.outputs_queue.empty():
                    core.outputs_queue.put_nowait(EngineDeadError())
                for answer in list(core.utility_results.values()):
                    if not answer.done():
                        answer.set_exception(EngineDeadError())

    # --- control of the weights. Nothing is in flight between two calls of `generate`, so there is nothing to pause.

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def can_read(self, path: str) -> bool:
        return all(answer["can_read"] for answer in self._workers("vopd_can_read", path=path))

    def reload(self, path: str) -> None:
        self._workers("vopd_reload", path=path)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._workers("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self._workers("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._workers("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._workers("finish_weight_update")
        self._workers("vopd_pack_again")

    def reset_prefix_cache(self) -> bool:
        with _failures_of("resetting its prefix cache"):
            return bool(self._engine.reset_prefix_cache())

    def set_weight_version(self, version: str) -> None:
        with _failures_of("naming its weights"):
            self._engine.set_weight_version(version)

    def _workers(self, method: str, **arguments: Any) -> list[Any]:
        with _failures_of(method):
            return list(self._engine.collective_rpc(method, kwargs=arguments))


def _generation(output: Any) -> Generation:
    """vLLM's answer to one request: flat lists, the sampled id of each position first."""
    [completion] = output.outputs
    num_tokens = len(completion.token_ids)
    logprobs = completion.logprobs
    ids_TK = np.array(logprobs.token_ids, np.int64).reshape(num_tokens, -1)
    logprobs_TK = np.array(logprobs.logprobs, np.float32).reshape(num_tokens, -1)
    return Generation(
        token_ids_T=np.array(completion.token_ids, np.int64),
        sampled_logprobs_T=logprobs_TK[:, 0].copy(),
        top_ids_TK=ids_TK[:, 1:],
        top_logprobs_TK=logprobs_TK[:, 1:],
        finish_reason=str(completion.finish_reason),
        weight_versions=tuple(span.version for span in completion.weight_versions or ()),
    )


@contextmanager
def _failures_of(what: str) -> Iterator[None]:
    """vLLM's errors as ours: a dead engine is gone for good, anything else is about this call."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise RolloutEngineUnavailableError(f"vLLM's engine died; its own log says why ({what}: {error})") from error
    except (ValueError, TypeError, RuntimeError, OSError, NotImplementedError) as error:
        if isinstance(error, RolloutEngineError | RolloutEngineUnavailableError):
            raise
        raise RolloutEngineError(f"vLLM failed on {what}: {error}") from error
    except Exception as error:  # what a worker raises arrives as a bare Exception
        if type(error) is not Exception:
            raise
        raise RolloutEngineError(f"vLLM failed on {what}: {error}") from error


@contextmanager
def _environment_of_the_engine(device_index: int | None) -> Iterator[None]:
    """The environment that vLLM's processes inherit; this one has its own again afterwards."""
    before = dict(os.environ)
    for name in _OF_THE_LAUNCHER:
        os.environ.pop(name, None)
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # this process has threads, and perhaps CUDA
    os.environ[_ENDS_WITH_PID] = str(os.getpid())
    if device_index is not None:
        visible = before.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[device_index] if visible != [""] else str(device_index)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _interrupts_held_off() -> Iterator[None]:
    """Blocks SIGINT in this thread, and for good in every process that it starts meanwhile.

    A terminal sends Ctrl-C to the whole process group; the trainer finishes or throws away its rollouts itself.
    """
    resource_tracker.ensure_running()  # takes SIGINT out of the mask when it starts its process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
