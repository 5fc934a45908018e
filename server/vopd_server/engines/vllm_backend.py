"""vLLM itself: configuration, launch, one request, health, end. Only this module imports vLLM (10 s and more).

vLLM runs the model in processes of its own (EngineCore and its workers) and is fed from the event loop here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from vopd_server.engines.loading import directory_revision
from vopd_server.engines.tokenizer import tokenizer_info
from vopd_server.engines.vllm_arguments import check_engine_args
from vopd_server.engines.vllm_config import LaunchSettings, check_length, engine_config
from vopd_server.engines.vllm_plugin import SERVER_PID_VARIABLE
from vopd_server.engines.vllm_processes import end_remaining, interrupts_held_off, running_processes
from vopd_server.engines.vllm_scores import Answer
from vopd_server.errors import ConfigError, EngineError, InvalidRequestError
from vopd_server.types import TokenizerInfo

if TYPE_CHECKING:
    import psutil  # type: ignore[import-untyped]
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

# Read by vLLM when it is imported; an operator's own values stand.
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # forking a process that serves gRPC can deadlock the child
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for the line that announces the address
    "VLLM_NO_USAGE_STATS": "1",  # vLLM would report the model and the hardware to its authors
}

# vLLM kills an EngineCore that has not ended by then. It gives its own workers 5 s and 4 s more, and when it is
# killed first they leave shared memory behind.
EXIT_GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class BackendFacts:
    """What is known once the model runs.

    max_batch_tokens: of one step. window_tokens: see EngineInfo.
    """

    version: str
    revision: str
    dtype: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_batch_tokens: int
    window_tokens: int
    tokenizer: TokenizerInfo


class Backend(Protocol):
    """What the engine needs of a running vLLM."""

    @property
    def facts(self) -> BackendFacts: ...

    @property
    def is_dead(self) -> bool:
        """A process of it has ended, or the handling of its outputs has; there is no way back."""
        ...

    async def answer(
        self, request_id: str, prompt_ids: list[int], arguments: dict[str, Any], *, read_cache: bool, salt: str
    ) -> Answer:
        """One finished request; cancelling it aborts the request.

        Raises: InvalidRequestError for what vLLM refuses before running anything; EngineError.
        """
        ...

    async def ping(self) -> None:
        """Returns when every EngineCore has answered, which they do between two steps."""
        ...

    async def shutdown(self) -> None:
        """Ends the processes, which takes seconds."""
        ...


class VllmBackend:
    """A running AsyncLLM; implements `Backend`."""

    def __init__(self, llm: AsyncLLM, facts: BackendFacts) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._llm = llm
        self._facts = facts
        # Known by now, since workers whose EngineCore has been killed are nobody's children.
        self._processes = running_processes()
        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._refusal = VLLMClientError
        self._failures = (EngineDeadError, EngineGenerateError)  # the latter wraps whatever else goes wrong

    @property
    def facts(self) -> BackendFacts:
        return self._facts

    @property
    def is_dead(self) -> bool:
        return bool(self._llm.errored)

    async def answer(
        self, request_id: str, prompt_ids: list[int], arguments: dict[str, Any], *, read_cache: bool, salt: str
    ) -> Answer:
        try:
            params = self._sampling_params(
                **arguments,
                max_tokens=1,  # the least that vLLM takes; it comes out of the last row and costs no step
                temperature=0.0,
                detokenize=False,
                flat_logprobs=True,
                output_kind=self._final_only,
                skip_reading_prefix_cache=not read_cache,  # left out, vLLM reads none for prompt logprobs
            )
            prompt = {"prompt_token_ids": prompt_ids, **({"cache_salt": salt} if salt else {})}
            answer: Answer | None = None
            async for output in self._llm.generate(prompt, params, request_id):
                answer = output
        except self._refusal as error:
            raise InvalidRequestError("request", f"vLLM refuses it: {error}") from error
        except self._failures as error:
            raise EngineError(f"vLLM failed: {error.__cause__ or error}") from error
        if answer is None:
            raise EngineError("vLLM ended the request without an answer")
        return answer

    async def ping(self) -> None:
        await self._llm.is_paused()

    async def shutdown(self) -> None:
        handler = self._llm.output_handler
        if handler is not None:  # it would take the end of the processes for a failure
            handler.cancel()
            await asyncio.wait((handler,))
        await asyncio.to_thread(_end, self._llm, self._processes)


def launch(settings: LaunchSettings) -> VllmBackend:
    """Loads the model in vLLM's processes; blocks until it runs (a minute is usual).

    Raises: ConfigError for an argument that vLLM does not have or take, a model that it cannot load or run, and a
        KV cache that does not hold the longest request.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[SERVER_PID_VARIABLE] = str(os.getpid())
    _import_vllm()
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMError
    from vllm.v1.engine.async_llm import AsyncLLM

    check_engine_args(settings.engine_args, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
    try:
        commit = _resolve_commit(settings)
        revision = commit or directory_revision(Path(settings.model))
        tokenizer = _tokenizer(settings, commit)
        config = engine_config(settings, commit)
        wanted_length = config.model_config.max_model_len
        with interrupts_held_off():
            llm = AsyncLLM.from_vllm_config(config)
    except ConfigError:
        raise
    # Every part of vLLM checks in its own way. What it raises in its processes arrives as a RuntimeError.
    except (VLLMError, OSError, ValueError, TypeError, RuntimeError, ImportError, LookupError, AssertionError) as error:
        raise ConfigError(f"vLLM cannot serve the model {settings.model!r}: {error}") from error
    model_config = config.model_config
    try:
        check_length(settings, wanted=wanted_length, fitted=model_config.max_model_len)
    except ConfigError:
        _end(llm, running_processes())
        raise
    facts = BackendFacts(
        version=vllm.__version__,
        revision=revision,
        dtype=str(model_config.dtype).removeprefix("torch."),
        vocab_size=model_config.get_vocab_size(),
        hidden_size=model_config.get_hidden_size(),
        max_model_len=model_config.max_model_len,
        max_batch_tokens=config.scheduler_config.max_num_batched_tokens,
        window_tokens=window_tokens(
            max_batch_tokens=config.scheduler_config.max_num_batched_tokens,
            kv_cache_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
        ),
        tokenizer=tokenizer,
    )
    return VllmBackend(llm, facts)


def window_tokens(*, max_batch_tokens: int, kv_cache_tokens: int) -> int:
    """One step's worth: what is in vLLM runs first come, first served, so more would make everybody wait for it.

    Never more than the KV cache holds, or vLLM preempts. kv_cache_tokens: 0 where vLLM does not tell.
    """
    return min(max_batch_tokens, kv_cache_tokens) if kv_cache_tokens else max_batch_tokens


def _end(llm: AsyncLLM, processes: list[psutil.Process]) -> None:
    """Returns when every process of vLLM has ended, which takes seconds."""
    llm.shutdown(EXIT_GRACE_S)
    end_remaining(processes)


def _import_vllm() -> None:
    """In a thread of its own: something that vLLM imports keeps the frames of its importers for good.

    Among them would be those that hold the engine, which would then be shut down a second time, with a traceback,
    when the interpreter ends.

    Raises: ConfigError when vLLM is not installed, or something that it needs.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="vopd-vllm-import") as importer:
        error = importer.submit(importlib.import_module, "vllm.v1.engine.async_llm").exception()
    if isinstance(error, ImportError):
        raise ConfigError(f"engine vllm needs the package vllm: {error}") from error
    if error is not None:
        raise error


def _resolve_commit(settings: LaunchSettings) -> str | None:
    """The commit of a hub model, which pins weights, tokenizer and the reported revision; None for a directory."""
    if Path(settings.model).is_dir():
        return None
    commit: str | None = extract_commit_hash(
        cached_file(settings.model, "config.json", revision=settings.revision), None
    )
    return commit


def _tokenizer(settings: LaunchSettings, commit: str | None) -> TokenizerInfo:
    trusted = settings.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(settings.model, revision=commit, trust_remote_code=trusted)
    try:
        generation_config = GenerationConfig.from_pretrained(settings.model, revision=commit)
    except OSError:  # a model need not have one
        generation_config = None
    return tokenizer_info(tokenizer, generation_config)
