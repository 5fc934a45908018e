"""The embedded engine: any causal LM that transformers loads, on any device it runs on.

The queue, the planning and the futures live on the event loop; one worker thread runs the model, one forward
at a time. Between two passes the queue is looked at again, so what arrived meanwhile joins the next pass.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import transformers

from vopd_server.engines.batching import Shape, plan_next_pass
from vopd_server.engines.contexts import ContextCache, ReadContext, ReadContexts
from vopd_server.engines.forward import Forwarded, context_key
from vopd_server.engines.head_file import head_directory, write_head_file
from vopd_server.engines.loading import DtypeName, choose_device, load_model
from vopd_server.engines.queued import Queued, fail
from vopd_server.engines.scoring_model import ScoringModel, scoring_model
from vopd_server.engines.warm_up import warm_up
from vopd_server.errors import EngineDeadError, EngineError, InvalidRequestError, UnavailableError
from vopd_server.status import EngineCounters
from vopd_server.types import (
    EngineInfo,
    HeadFile,
    ScoreRequest,
    Scores,
    SupportKind,
    TeacherTopK,
    TokenizerInfo,
    empty_scores,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start. Token counts are of what the model read."""

    requests_scored: int = 0
    passes: int = 0
    forwards: int = 0
    tokens_forwarded: int = 0  # padding included
    padding_tokens: int = 0
    context_tokens_reused: int = 0  # that a completion found read: for its group, or kept from before


class TransformersEngine:
    """Scores with a transformers causal LM; implements `vopd_server.engines.base.Engine`, any temperature.

    model: a directory or a hub id. revision: a hub branch, tag or commit.
    dtype: "auto" is the checkpoint's own. On a CPU with AMX or AVX512-BF16, "bfloat16" is several times
        faster than "float32".
    device: None takes the accelerator there is, else the CPU.
    max_context_length: context + completion tokens of one request; the model's own limit bounds it.
    max_request_tokens: tokens beyond which no sequence is admitted, so that no room is needed for them.
    max_batch_tokens: padded tokens one forward may hold, cached contexts included; a longer request runs alone.
    context_cache_tokens: tokens of contexts that are kept for completions that arrive after the first of their
        group; None: a quarter of max_batch_tokens; 0: none. They take the memory of so many tokens' keys and values.
    max_top_k: ids in the support of one position, at most.
    deterministic: every forward's shape depends on its request alone (one row; a context, then its
        completion on its cache), so the same request gives the same bits in whatever company, from run to
        run, on the same machine and number of threads. Slower: nothing is batched but contexts stay shared.
    trust_remote_code: run model code that comes with the weights.
    chunk_elements: float32 logits that exist at once; None picks by device.
    allow_full_vocab: give hidden states and the output head away. From `start` to `close` the head is a file in
        a private temporary directory; see `head_file`.

    All calls belong to the event loop that called `start`. CPU threads are whatever torch was told to use.
    `deterministic` sets no global switch of torch: on an accelerator it rests on kernels that are deterministic
    for a fixed shape, as the matrix products and attention of dense models are.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        dtype: DtypeName = "auto",
        device: str | None = None,
        max_context_length: int | None = None,
        max_request_tokens: int | None = None,
        max_batch_tokens: int = 16_384,
        context_cache_tokens: int | None = None,
        max_top_k: int = 1024,
        deterministic: bool = False,
        trust_remote_code: bool = False,
        chunk_elements: int | None = None,
        allow_full_vocab: bool = False,
    ) -> None:
        self._model_id = model
        self._max_batch_tokens = max_batch_tokens
        self._deterministic = deterministic
        self._kept = ContextCache(max_batch_tokens // 4 if context_cache_tokens is None else context_cache_tokens)

        def load() -> tuple[ScoringModel, HeadFile | None]:
            loaded = load_model(
                model,
                revision=revision,
                dtype=dtype,
                device=choose_device(device),
                max_context_length=max_context_length,
                trust_remote_code=trust_remote_code,
            )
            model_to_score = scoring_model(loaded, chunk_elements=chunk_elements)
            head = self._write_head(model_to_score) if allow_full_vocab else None
            # A CPU's memory has swap behind it, and the largest forwards would take it minutes.
            if loaded.device.type != "cpu":
                warm_up(
                    model_to_score,
                    max_context_length=min(loaded.max_context_length, max_request_tokens or loaded.max_context_length),
                    max_batch_tokens=max_batch_tokens,
                    context_cache_tokens=self._kept.max_tokens,
                    max_top_k=max_top_k,
                    deterministic=deterministic,
                )
            return model_to_score, head

        self._load = load
        self._head_directory: TemporaryDirectory[str] | None = None
        self._scoring_model: ScoringModel | None = None
        self._info: EngineInfo | None = None  # outlives the model, as the tokenizer does
        self._tokenizer: TokenizerInfo | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vopd-engine")
        self._queue: dict[int, Queued] = {}  # by arrival number, so oldest first
        self._num_arrived = 0
        self._has_work = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._is_closing = False
        self._stats = EngineStats()

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "not started"
        return self._info

    @property
    def tokenizer(self) -> TokenizerInfo:
        assert self._tokenizer is not None, "not started"
        return self._tokenizer

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters(
            batches=self._stats.forwards,
            batch_tokens=self._stats.tokens_forwarded,
            padding_tokens=self._stats.padding_tokens,
            context_tokens_reused=self._stats.context_tokens_reused,
        )

    async def start(self) -> None:
        """Loads the model in the worker thread and compares it with itself; see `probe`, and on accelerators `warm_up`.

        Raises: ConfigError when the model cannot be loaded, its own logits cannot be reproduced, its head cannot be
            given away as asked, or the largest forward does not fit the device.
        """
        assert self._dispatcher is None, "started twice"
        try:
            loaded, head = await asyncio.get_running_loop().run_in_executor(self._executor, self._load)
        except Exception:  # cancelled, the thread goes on: `close` waits for it
            self._executor.shutdown(wait=False)
            self._remove_head()
            raise
        supports: set[SupportKind] = {"sampled", "teacher_top_k", "candidates"}
        if head is not None:
            supports.add("hidden_states")
        self._scoring_model, self._tokenizer = loaded, loaded.tokenizer
        self._info = EngineInfo(
            model_id=self._model_id,
            model_revision=loaded.revision,
            engine="transformers",
            engine_version=transformers.__version__,
            dtype=loaded.dtype_name,
            vocab_size=loaded.head.vocab_size,
            hidden_size=loaded.head.hidden_size,
            max_context_length=loaded.max_context_length,
            supports=frozenset(supports),
            any_temperature=True,
            deterministic=self._deterministic,
            # One forward's worth: while it runs the rest is where fairness decides, and what comes next is there
            # before the event loop has given these answers out.
            window_tokens=self._max_batch_tokens,
            max_batch_tokens=self._max_batch_tokens,
            head=head,
        )
        self._dispatcher = asyncio.create_task(self._dispatch(), name="vopd-engine-dispatcher")
        self._dispatcher.add_done_callback(self._fail_what_is_left)

    async def score(self, request: ScoreRequest) -> Scores:
        """Queues one request and waits for its scores; cancelling it takes it out of the queue.

        Raises: EngineError when the model failed, gave NaN, or hidden states that are not finite; UnavailableError
            before `start` and after `close`; InvalidRequestError for a k beyond the vocabulary.
        """
        loaded = self._loaded()
        if isinstance(request.support, TeacherTopK) and request.support.k > loaded.head.vocab_size:
            raise InvalidRequestError("k", f"{request.support.k} > vocab_size {loaded.head.vocab_size}")
        if len(request.completion_ids) == 0:
            return empty_scores(request, hidden_size=loaded.head.hidden_size)
        shape = Shape(context_key(request), len(request.context_ids), len(request.completion_ids))
        answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        queued = Queued(self._num_arrived, request, shape, answer, time.perf_counter())
        self._num_arrived += 1
        self._queue[queued.number] = queued
        # The dispatcher wakes after every call that is ready now has queued: a gather() becomes one batch.
        self._has_work.set()
        try:
            return await answer
        finally:
            self._queue.pop(queued.number, None)

    async def wait_until_dead(self) -> EngineDeadError:
        """Returns when the dispatcher has ended, which only a mistake in it can bring about before `close`."""
        assert self._dispatcher is not None, "not started"
        await asyncio.wait((self._dispatcher,))
        error = None if self._dispatcher.cancelled() else self._dispatcher.exception()
        return EngineDeadError(f"the engine's dispatcher ended: {error!r}")

    async def close(self) -> None:
        """Fails what is queued with UnavailableError, waits for the forward in flight, frees the model.

        The file of the head is gone then.
        """
        self._is_closing = True
        self._has_work.set()
        if self._dispatcher is not None:
            await asyncio.wait((self._dispatcher,))
        await asyncio.to_thread(self._executor.shutdown)
        self._remove_head()
        self._kept.clear()
        self._scoring_model = None

    def _write_head(self, model: ScoringModel) -> HeadFile:
        """In the worker thread. Raises: ConfigError."""
        self._head_directory = head_directory()
        head = write_head_file(model.head, Path(self._head_directory.name), model_dtype=model.dtype_name)
        logger.info("the output head is given away", extra={"num_bytes": head.num_bytes, "sha256": head.sha256})
        return head

    def _remove_head(self) -> None:
        if self._head_directory is not None:
            self._head_directory.cleanup()
            self._head_directory = None

    def _loaded(self) -> ScoringModel:
        if self._scoring_model is None or self._dispatcher is None:
            raise UnavailableError("the engine is not started")
        if self._is_closing or self._dispatcher.done():
            raise UnavailableError("the engine is closing")
        return self._scoring_model

    async def _dispatch(self) -> None:
        """Runs passes while there is something queued, until the engine closes."""
        while not self._is_closing:
            await self._has_work.wait()
            self._has_work.clear()
            while self._queue and not self._is_closing:
                await self._run_next_pass()

    async def _run_next_pass(self) -> None:
        assert self._scoring_model is not None
        queued = [entry for entry in self._queue.values() if not entry.answer.done()]
        if not queued:
            self._queue.clear()  # cancelled calls only, which have yet to take themselves out
            return
        plan = plan_next_pass(
            [entry.shape for entry in queued],
            max_tokens=self._max_batch_tokens,
            can_share=self._scoring_model.can_share_contexts,
            kept=self._kept.keys,
            one_by_one=self._deterministic,
        )
        members = [queued[index] for index in plan.members]
        for entry in members:
            del self._queue[entry.number]
        started_at_s = time.perf_counter()
        contexts: ReadContexts | None = None
        read: dict[bytes, ReadContext] = {}
        if plan.shares_contexts:
            outcome = await self._read_missing(members)
            if isinstance(outcome, BaseException):
                fail(members, outcome)
                return
            read = outcome
            contexts = self._kept.of(entry.shape.context_key for entry in members) | read
        contexts_time_s = time.perf_counter() - started_at_s
        for wave in plan.waves:
            await self._run_wave([queued[index] for index in wave], contexts, contexts_time_s)
        self._stats = replace(self._stats, passes=self._stats.passes + 1)
        if read:  # not before: what is kept anew overwrites what the waves read
            await self._in_worker(lambda _: self._kept.keep(read))

    async def _read_missing(self, members: Sequence[Queued]) -> dict[bytes, ReadContext] | BaseException:
        """One forward of the members' contexts that are not kept from before, where there are any; or how it failed."""
        length_of = {entry.shape.context_key: entry.shape.context_length for entry in members}
        kept = self._kept.keys
        to_read = [entry.request for entry in members if entry.shape.context_key not in kept]
        read: dict[bytes, ReadContext] = {}
        forwarded = Forwarded()
        if to_read:
            outcome = await self._in_worker(lambda model: model.read_contexts(to_read))
            if isinstance(outcome, BaseException):
                return outcome
            read, forwarded = outcome
        num_used = sum(entry.shape.context_length for entry in members)
        self._count(forwarded, context_tokens_reused=num_used - sum(length_of[key] for key in read))
        return read

    async def _run_wave(self, entries: list[Queued], contexts: ReadContexts | None, contexts_time_s: float) -> None:
        """One forward; hands every request its own answer. Calls cancelled meanwhile are left out."""
        waiting = [entry for entry in entries if not entry.answer.done()]
        if not waiting:
            return
        if self._is_closing:
            fail(waiting, UnavailableError("the engine is closing"))
            return
        requests = [entry.request for entry in waiting]
        started_at_s = time.perf_counter()
        outcome = await self._in_worker(partial(self._score, requests, contexts))
        if isinstance(outcome, BaseException):
            fail(waiting, outcome)
            return
        results, forwarded = outcome
        engine_time_s = contexts_time_s + time.perf_counter() - started_at_s
        self._count(forwarded, requests_scored=len(requests))
        for entry, result in zip(waiting, results, strict=True):
            if entry.answer.done():
                continue
            if isinstance(result, EngineError):
                entry.answer.set_exception(result)
                continue
            queue_time_s = started_at_s - contexts_time_s - entry.queued_at_s
            timed = replace(result, queue_time_s=queue_time_s, engine_time_s=engine_time_s)
            entry.answer.set_result(timed)

    def _score(
        self, requests: Sequence[ScoreRequest], contexts: ReadContexts | None, model: ScoringModel
    ) -> tuple[list[Scores | EngineError], Forwarded]:
        """In the worker thread. Contexts that were read on the way are kept."""
        scored = model.score(requests, contexts, keep_tokens=self._kept.max_tokens * model.can_share_contexts)
        self._kept.keep(scored.contexts)
        return scored.results, scored.forwarded

    async def _in_worker(self, call: Callable[[ScoringModel], Result]) -> Result | BaseException:
        """Runs `call` in the worker thread and returns what it returns or raises: the dispatcher lives on."""
        assert self._scoring_model is not None
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, call, self._scoring_model)
        await asyncio.wait((running,))
        error = running.exception()
        if error is None:
            return running.result()
        logger.error("a batch failed", exc_info=error)
        traceback.clear_frames(error.__traceback__)  # they hold the batch's tensors; out of memory is likely
        return error

    def _count(self, forwarded: Forwarded, *, requests_scored: int = 0, context_tokens_reused: int = 0) -> None:
        stats = self._stats
        self._stats = replace(
            stats,
            requests_scored=stats.requests_scored + requests_scored,
            forwards=stats.forwards + forwarded.forwards,
            tokens_forwarded=stats.tokens_forwarded + forwarded.tokens,
            padding_tokens=stats.padding_tokens + forwarded.padding_tokens,
            context_tokens_reused=stats.context_tokens_reused + context_tokens_reused,
        )

    def _fail_what_is_left(self, dispatcher: asyncio.Task[None]) -> None:
        """Nobody waits for a dispatcher that has ended, whatever ended it."""
        error = None if dispatcher.cancelled() else dispatcher.exception()
        if error is not None:
            logger.error("the engine's dispatcher failed", exc_info=error)
        fail(self._queue.values(), error or UnavailableError("the engine is closing"))
        self._queue.clear()
