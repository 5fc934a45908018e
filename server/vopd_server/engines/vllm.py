"""The production engine: vLLM in this process's event loop, its model in processes of its own.

Reads the prefix cache for contexts (rollouts of one prompt share theirs) and no further; see `vllm_scheduler`. Accepts
only answers that a cache hit cannot have spoiled all the same; see `vllm_scores`. There is no restart: an engine that
is dead or hung says so through `wait_until_dead`, and the process is to end and be started again by its supervisor.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vopd_server.engines.vllm_probe import has_token_ids
from vopd_server.engines.vllm_requests import scoring_arguments
from vopd_server.engines.vllm_scores import UnusableAnswerError, read_scores, times_s
from vopd_server.errors import EngineDeadError, EngineError, InvalidRequestError, UnavailableError
from vopd_server.status import EngineCounters
from vopd_server.types import (
    EngineInfo,
    ScoreRequest,
    Scores,
    SupportKind,
    TeacherTopK,
    TokenizerInfo,
    empty_scores,
)

if TYPE_CHECKING:
    from vopd_server.engines.loading import DtypeName
    from vopd_server.engines.vllm_backend import Backend

logger = logging.getLogger(__name__)

# A process that dies while it is asked whether it lives never answers.
_DEATH_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class VllmStats:
    """Requests since the start. vLLM's own metrics (`vllm:*`) are in Prometheus's global registry."""

    requests: int = 0
    asked_again: int = 0  # refused at first: a preemption, or a hit past the context, may have spoiled the answer
    tokens_reused: int = 0  # found in the prefix cache


class VllmEngine:
    """Scores with vLLM; implements `vopd_server.engines.base.Engine`, temperature 1 only.

    model: a directory or a hub id. revision: a hub branch, tag or commit.
    dtype: "auto" is the checkpoint's own.
    max_context_length: context + completion tokens of one request; the model's own limit less 1 bounds it, since
        vLLM always generates a token. When it is left out, what the KV cache holds bounds it too; when it is
        given and the KV cache holds less, `start` refuses.
    max_request_tokens: tokens beyond which no sequence is admitted, so that no room is needed for them.
    max_top_k: ids in the support of one position, at most.
    engine_args: vLLM's own AsyncEngineArgs, passed through: tensor_parallel_size, gpu_memory_utilization,
        max_num_batched_tokens, distributed_executor_backend, ... Those that a setting here covers are refused.
    trust_remote_code: run model code that comes with the weights.
    hang_timeout_s: an engine that does not answer for so long between two of its steps is given up.
    launch: starts vLLM and blocks until the model runs; for tests.

    `info.supports` holds candidates where the runner has them (on GPUs), which `start` finds out by asking.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        dtype: DtypeName = "auto",
        max_context_length: int | None = None,
        max_request_tokens: int | None = None,
        max_top_k: int = 1024,
        engine_args: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        hang_timeout_s: float = 120.0,
        launch: Callable[[], Backend] | None = None,
    ) -> None:

        def launch_vllm() -> Backend:
            from vopd_server.engines.vllm_backend import launch as launch_backend
            from vopd_server.engines.vllm_config import LaunchSettings

            return launch_backend(
                LaunchSettings(
                    model=model,
                    revision=revision,
                    dtype=dtype,
                    max_context_length=max_context_length,
                    max_top_k=max_top_k,
                    engine_args=dict(engine_args or {}),
                    trust_remote_code=trust_remote_code,
                    max_request_tokens=max_request_tokens,
                )
            )

        self._model_id = model
        self._hang_timeout_s = hang_timeout_s
        self._launch = launch or launch_vllm
        self._launching: asyncio.Future[Backend] | None = None
        self._backend: Backend | None = None
        self._info: EngineInfo | None = None
        self._has_token_ids = False
        self._request_numbers = itertools.count()
        self._running: set[asyncio.Task[Scores]] = set()
        self._stats = VllmStats()
        self._end: UnavailableError | None = None
        self._has_ended = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise UnavailableError("the engine has not been started")
        return self._info

    @property
    def tokenizer(self) -> TokenizerInfo:
        if self._backend is None:
            raise UnavailableError("the engine has not been started, or has been closed")
        return self._backend.facts.tokenizer

    @property
    def stats(self) -> VllmStats:
        return self._stats

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters(context_tokens_reused=self._stats.tokens_reused)

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Launches vLLM in a thread, then scores a few tokens in each of the ways it may have.

        Raises: ConfigError when vLLM cannot serve the model, or its ways to one score disagree.
        """
        assert self._launching is None, "started twice"
        self._launching = asyncio.get_running_loop().run_in_executor(None, self._launch)
        # Shielded: cancelling must not lose sight of the processes that the thread has started; see `close`.
        self._backend = await asyncio.shield(self._launching)
        facts = self._backend.facts
        supports: set[SupportKind] = {"sampled", "teacher_top_k"}
        ask = partial(self._ask, self._backend, read_cache=False)
        longest = facts.max_model_len - 1
        self._has_token_ids = await has_token_ids(ask, vocab_size=facts.vocab_size, max_context_length=longest)
        if self._has_token_ids:
            supports.add("candidates")
        self._info = EngineInfo(
            model_id=self._model_id,
            model_revision=facts.revision,
            engine="vllm",
            engine_version=facts.version,
            dtype=facts.dtype,
            vocab_size=facts.vocab_size,
            hidden_size=facts.hidden_size,
            max_context_length=longest,
            supports=frozenset(supports),
            any_temperature=False,
            deterministic=False,
            window_tokens=facts.window_tokens,
            max_batch_tokens=facts.max_batch_tokens,
        )

    async def check(self) -> None:
        """Asks vLLM for a sign of life. An engine found dead or hung fails what it is running, for good.

        Raises: EngineDeadError when it is dead, or does not answer within `hang_timeout_s`.
        """
        backend = self._ready()
        clock_s = asyncio.get_running_loop().time
        deadline_s = clock_s() + self._hang_timeout_s
        ping = asyncio.create_task(backend.ping(), name="vopd-vllm-ping")
        try:
            while not ping.done() and not backend.is_dead and clock_s() < deadline_s:
                await asyncio.wait((ping,), timeout=_DEATH_POLL_S)
            if backend.is_dead:
                self._stop(EngineDeadError("vLLM died"))
            elif not ping.done():
                self._stop(EngineDeadError(f"vLLM has not answered for {self._hang_timeout_s:g} s"))
            elif (error := ping.exception()) is not None:
                self._stop(EngineDeadError(f"vLLM does not answer: {error}"))
        finally:
            ping.cancel()
        self._raise_if_ended()

    async def wait_until_dead(self, *, interval_s: float = 1.0) -> EngineDeadError:
        """Watches a started engine; returns why it can score nothing any more. Cancel it to stop watching.

        Raises: UnavailableError before `start` and after `close`.
        """
        while True:
            try:
                await self.check()
                await asyncio.wait_for(self._has_ended.wait(), interval_s)
            except TimeoutError:
                continue
            except EngineDeadError as error:
                return error

    async def close(self) -> None:
        """Fails what is running with UnavailableError, aborts it in vLLM and ends vLLM's processes."""
        self._stop(UnavailableError("the engine is closing"))
        if self._running:
            await asyncio.wait(self._running)
        if self._launching is None:
            return
        if not self._launching.done():
            from vopd_server.engines.vllm_processes import end_launch

            await end_launch(self._launching)
        if self._launching.exception() is None:
            await self._launching.result().shutdown()
        self._backend = self._launching = None

    # ---------------------------------------------------------------- scoring

    async def score(self, request: ScoreRequest) -> Scores:
        """Scores one request; vLLM batches concurrent ones. Cancelling it aborts it in vLLM.

        Raises: EngineError when vLLM failed or twice gave an answer that is not wholly there; EngineDeadError when
            it died or hangs; UnavailableError before `start` and after `close`; InvalidRequestError for a k beyond
            the vocabulary.
        """
        assert request.temperature == 1.0, "the service refuses it, since any_temperature is False"
        if isinstance(request.support, TeacherTopK) and request.support.k > self.info.vocab_size:
            raise InvalidRequestError("k", f"{request.support.k} > vocab_size {self.info.vocab_size}")
        backend = self._ready()
        if len(request.completion_ids) == 0:
            return empty_scores(request, hidden_size=self.info.hidden_size)
        running = asyncio.create_task(self._score(backend, request))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        try:
            return await running
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # not our caller's doing: the engine has ended
                self._raise_if_ended()
            raise

    async def _score(self, backend: Backend, request: ScoreRequest) -> Scores:
        """Asks once, or twice where the first answer read more of the cache than it may."""
        ask = partial(self._ask, backend, request, has_token_ids=self._has_token_ids)
        self._stats = replace(self._stats, requests=self._stats.requests + 1)
        try:
            try:
                return await ask(read_cache=True)
            except UnusableAnswerError as error:
                logger.debug("asking again with cache reads off: %s", error)
                self._stats = replace(self._stats, asked_again=self._stats.asked_again + 1)
            return await ask(read_cache=False)
        except EngineError:
            if backend.is_dead:
                self._stop(EngineDeadError("vLLM died"))
                self._raise_if_ended()
            raise

    async def _ask(self, backend: Backend, request: ScoreRequest, *, read_cache: bool, has_token_ids: bool) -> Scores:
        # Ids that clients choose may repeat; vLLM's may not.
        request_id = f"{request.request_id}-{next(self._request_numbers)}"
        answer = await backend.answer(
            request_id,
            np.concatenate((request.context_ids, request.completion_ids)).tolist(),
            scoring_arguments(request, has_token_ids=has_token_ids),
            read_cache=read_cache,
            salt=request.cache_salt,
        )
        scores = read_scores(request, answer, read_cache=read_cache, vocab_size=backend.facts.vocab_size)
        reused = self._stats.tokens_reused + (answer.num_cached_tokens or 0)
        self._stats = replace(self._stats, tokens_reused=reused)
        queue_time_s, engine_time_s = times_s(answer)
        return replace(scores, queue_time_s=queue_time_s, engine_time_s=engine_time_s)

    # ---------------------------------------------------------------- inside

    def _ready(self) -> Backend:
        self._raise_if_ended()
        if self._backend is None or self._info is None:
            raise UnavailableError("the engine has not been started")
        return self._backend

    def _stop(self, end: UnavailableError) -> None:
        """The engine takes nothing any more, and what it is running fails with `end`. The first reason stands."""
        if self._end is not None:
            return
        if isinstance(end, EngineDeadError):
            logger.error("the engine cannot go on: %s", end)
        self._end = end
        self._has_ended.set()
        for running in self._running:
            if running is not asyncio.current_task():
                running.cancel()

    def _raise_if_ended(self) -> None:
        """Every caller gets an exception of its own: one shared would collect all their tracebacks."""
        if self._end is not None:
            raise type(self._end)(str(self._end))
