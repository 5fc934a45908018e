"""vLLM's configuration: what the model and the operator say, within the bounds that scoring needs.

Imports vLLM (10 s and more) when a function is called, not before.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vopd_server.engines.vllm_memory import LogprobsShape, MemoryPlan, leave_room
from vopd_server.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vopd_server.engines.loading import DtypeName

logger = logging.getLogger(__name__)

# The V1 runner takes about 1 GB a thousand rows of a step at 152k ids; see `vllm_memory`. vLLM's own default for a
# large GPU is 8192 rows or more.
V1_MAX_NUM_BATCHED_TOKENS = 2048
FIT_LENGTH_TO_MEMORY = -1
# By whether vLLM schedules asynchronously, which it finds out itself.
SCHEDULERS = {
    False: "vopd_server.engines.vllm_scheduler.ScoringScheduler",
    True: "vopd_server.engines.vllm_scheduler.AsyncScoringScheduler",
}
# On a CPU vLLM's own is 128 tokens, and a group shares whole blocks of its context only.
CPU_BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """max_context_length: tokens that the operator asks for; None is the model's own, as far as memory holds it.

    max_request_tokens: tokens beyond which no sequence is admitted; None: there is no such bound.
    """

    model: str
    revision: str | None
    dtype: DtypeName
    max_context_length: int | None
    max_top_k: int
    engine_args: dict[str, Any]
    trust_remote_code: bool
    max_request_tokens: int | None = None


def engine_config(settings: LaunchSettings, commit: str | None) -> VllmConfig:
    """What to launch. Raises: ConfigError, and whatever vLLM raises for what it does not take."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    own = {"block_size": CPU_BLOCK_SIZE} if current_platform.is_cpu() else {}
    args = AsyncEngineArgs(
        model=settings.model,
        revision=commit or settings.revision,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        max_logprobs=settings.max_top_k + 1,  # the sampled token has a column of its own
        **(own | settings.engine_args),
    )
    # On a copy: vLLM writes its defaults into the arguments.
    found = dataclasses.replace(args).create_engine_config()
    own_length = found.model_config.max_model_len
    args = dataclasses.replace(args, max_model_len=max_model_len(settings, own_length))
    args = _bounded(args, found, settings)
    config = args.create_engine_config()
    # What `max_model_len=-1` sets: vLLM lowers the length to what the KV cache holds instead of giving up, and
    # `check_length` decides whether that will do.
    config.model_config.original_max_model_len = FIT_LENGTH_TO_MEMORY
    scheduler = config.scheduler_config
    scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]
    return config


def max_model_len(settings: LaunchSettings, own_length: int) -> int:
    """Tokens of a sequence and the one that vLLM always generates."""
    if settings.max_context_length is not None and settings.max_context_length + 1 > own_length:
        logger.warning(
            "max_context_length %d is bounded by the model's own %d, less the token that vLLM generates",
            settings.max_context_length,
            own_length,
        )
    bounds = (settings.max_context_length, settings.max_request_tokens)
    return min([own_length, *(bound + 1 for bound in bounds if bound is not None)])


def check_length(settings: LaunchSettings, *, wanted: int, fitted: int) -> None:
    """wanted, fitted: max_model_len as asked for, and as it fits the KV cache that there is.

    Raises: ConfigError when the operator has asked for more than fits, or next to nothing does.
    """
    if fitted >= wanted:
        return
    what = f"the KV cache holds a sequence of {fitted - 1} tokens"
    if settings.max_context_length is not None or fitted < 3:
        asked = settings.max_context_length or wanted - 1
        raise ConfigError(
            f"max_context_length {asked}: {what}; lower it, or make room with more GPUs "
            "(engine_args.tensor_parallel_size), a higher engine_args.gpu_memory_utilization, a smaller dtype"
        )
    logger.warning("%s, less than the model's own %d: max_context_length is that", what, wanted - 1)


def _bounded(args: AsyncEngineArgs, found: VllmConfig, settings: LaunchSettings) -> AsyncEngineArgs:
    """`args` with room for the log-probabilities, which vLLM does not leave by itself."""
    rows = found.scheduler_config.max_num_batched_tokens
    rows_are_set = args.max_num_batched_tokens is not None
    if not found.use_v2_model_runner and not rows_are_set:
        rows = min(rows, V1_MAX_NUM_BATCHED_TOKENS)
        args = dataclasses.replace(args, max_num_batched_tokens=rows)
    device_bytes = _device_bytes()
    if device_bytes is None or settings.engine_args.get("kv_cache_memory_bytes"):  # who sets that has done the sums
        return args
    plan = MemoryPlan(
        rows=rows,
        rows_are_set=rows_are_set,
        utilization=found.cache_config.gpu_memory_utilization,
        utilization_is_set="gpu_memory_utilization" in settings.engine_args,
    )
    shape = LogprobsShape(
        runner="V2" if found.use_v2_model_runner else "V1",
        vocab_size=found.model_config.get_vocab_size(),
        k=settings.max_top_k,
        itemsize=found.model_config.dtype.itemsize,
        num_gpus=found.parallel_config.tensor_parallel_size,
        longest=args.max_model_len or found.model_config.max_model_len,
    )
    fitting = leave_room(shape, plan, device_bytes=device_bytes)
    if fitting != plan:
        logger.info(
            "to leave room for log-probabilities: gpu_memory_utilization %g, max_num_batched_tokens %d",
            fitting.utilization,
            fitting.rows,
        )
    return dataclasses.replace(args, max_num_batched_tokens=fitting.rows, gpu_memory_utilization=fitting.utilization)


def _device_bytes() -> int | None:
    """Memory of the first GPU, as NVML tells it without a context there. None on a CPU: vLLM does not fill its memory.

    What it asks of a GPU runs on no machine that tests this.
    """
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory()) if current_platform.is_cuda_alike() else None
