"""The service, whatever the transport: validate -> admit -> engine -> result.

A transport hands over shapes (lengths that it knows without unpacking anything) and a function that unpacks.
It never sees the engine, and the service never sees a message.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from vopd_server.admission import Admission, Ticket
from vopd_server.concurrency import task_group
from vopd_server.engines.base import Engine
from vopd_server.errors import EngineDeadError, EngineError, TeacherError, UnavailableError, UnsupportedError
from vopd_server.metrics import Metrics
from vopd_server.types import EngineInfo, HeadFile, ScoreRequest, Scores, TokenizerInfo, empty_scores
from vopd_server.validation import (
    Limits,
    SequenceShape,
    check_request,
    check_scores,
    check_shapes,
    check_temperature,
    hidden_states_hint,
)

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "dead"]
# A client that hears this asks again: about how long a model takes to load, a replica to be replaced.
STARTING_RETRY_DELAY_S = 2.0
DRAINING_RETRY_DELAY_S = 1.0


class TeacherService:
    """One engine behind validation and admission. `limits` are final once the engine has started."""

    def __init__(self, engine: Engine, limits: Limits, admission: Admission) -> None:
        self._engine = engine
        self.limits = limits
        self.admission = admission
        self.metrics = Metrics()
        self.metrics.watch("vopd_ready", "1 when requests are answered.", lambda: self._state == "ready")
        self.metrics.watch("vopd_calls_in_flight", "Calls that have begun and not ended.", lambda: self._num_calls)
        self.metrics.watch(
            "vopd_reserved_tokens", "Tokens admitted and not yet answered.", lambda: admission.budget.reserved_tokens
        )
        self.metrics.watch(
            "vopd_waiting_sequences", "Sequences of streams held back.", lambda: admission.budget.num_waiting
        )
        self._state: State = "starting"
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_calls = 0

    # ---------------------------------------------------------------- life

    @property
    def state(self) -> State:
        return self._state

    async def start(self) -> None:
        """Loads and warms the engine; requests are accepted from then on."""
        await self._engine.start()
        longest = min(self._engine.info.max_context_length, self.limits.max_context_length)
        self.limits = dataclasses.replace(self.limits, max_context_length=longest)
        self._state = "ready"

    def drain(self) -> None:
        """From now on nothing new is accepted."""
        if self._state != "dead":
            self._state = "draining"
        self._draining.set()

    async def wait_until_dead(self) -> EngineDeadError:
        """Returns when the engine can score nothing any more, with the reason; nothing new is accepted then."""
        reason = await self._engine.wait_until_dead()
        self._state = "dead"
        self.drain()
        return reason

    async def wait_for_drain(self) -> None:
        await self._draining.wait()

    @property
    def is_idle(self) -> bool:
        """No call is in flight."""
        return self._num_calls == 0

    async def wait_until_idle(self) -> None:
        """Returns when no call is in flight."""
        await self._idle.wait()

    async def close(self) -> None:
        await self._engine.close()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around everything a transport does for one call, so that draining waits for it.

        Raises: UnavailableError while the engine starts and once the service drains.
        """
        self.check_accepting()
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._idle.set()

    def check_accepting(self) -> None:
        """Raises: UnavailableError, with a delay after which another try may be answered."""
        if self._state == "starting":
            raise UnavailableError("the teacher is loading its model", retry_delay_s=STARTING_RETRY_DELAY_S)
        if self._state == "dead":
            raise UnavailableError("the teacher's engine has died", retry_delay_s=STARTING_RETRY_DELAY_S)
        if self._state == "draining":
            raise UnavailableError("the teacher is shutting down", retry_delay_s=DRAINING_RETRY_DELAY_S)

    # ---------------------------------------------------------------- what it is

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self._engine.tokenizer

    @property
    def head_file(self) -> HeadFile:
        """The model's output head. Raises: UnsupportedError where it is not given away."""
        info = self.info
        if info.head is not None:
            return info.head
        supports = ", ".join(sorted(info.supports))
        raise UnsupportedError(
            f"engine {info.engine} does not give away the model's output head, since it has no hidden_states "
            f"support; it has {supports}{hidden_states_hint(info)}"
        )

    # ---------------------------------------------------------------- scoring

    def check(self, shapes: Sequence[SequenceShape], temperature: float) -> None:
        """What can be said of a request before it is admitted. Raises: InvalidRequestError, UnsupportedError."""
        check_temperature(temperature, self.info)
        check_shapes(shapes, info=self.info, limits=self.limits)

    async def score_batch(
        self, shapes: Sequence[SequenceShape], unpack: Callable[[], Sequence[ScoreRequest]], *, temperature: float
    ) -> list[tuple[ScoreRequest, Scores]]:
        """Scores a small batch, all or nothing, in its order. The first failure cancels the rest.

        Raises: InvalidRequestError, UnsupportedError; OverloadedError at once when the budget is taken;
            EngineError.
        """
        self.check(shapes, temperature)
        ticket = self.admission.enter_now(sum(shape.num_tokens for shape in shapes))
        answered = False
        try:
            requests = unpack()
            for shape, request in zip(shapes, requests, strict=True):
                check_request(request, field=shape.field, info=self.info, limits=self.limits)
            async with task_group() as group:
                tasks = [group.create_task(self._run(request)) for request in requests]
            answered = True
            return [(request, task.result()) for request, task in zip(requests, tasks, strict=True)]
        finally:
            self.admission.leave(ticket, answered=answered)

    async def admit(self, shape: SequenceShape, temperature: float) -> Ticket:
        """Lets one sequence of a stream in, when there is room. Who calls gives the ticket back.

        Raises: InvalidRequestError, UnsupportedError; UnavailableError once the service drains.
        """
        self.check_accepting()
        self.check([shape], temperature)
        return await self.admission.enter(shape.num_tokens)

    async def score_admitted(
        self, shape: SequenceShape, unpack: Callable[[], ScoreRequest]
    ) -> tuple[ScoreRequest, Scores]:
        """Scores one sequence that was let in. Raises: InvalidRequestError, EngineError."""
        request = unpack()
        check_request(request, field=shape.field, info=self.info, limits=self.limits)
        return request, await self._run(request)

    async def _run(self, request: ScoreRequest) -> Scores:
        """The engine's answer, checked. An empty completion has one that needs no engine."""
        if len(request.completion_ids) == 0:
            return empty_scores(request, hidden_size=self.info.hidden_size)
        try:
            scores = await self._engine.score(request)
        except TeacherError:
            raise
        except Exception as error:
            logger.exception("engine failed", extra={"request_id": request.request_id})
            raise EngineError(f"the engine failed; the teacher's log tells why under {request.request_id}") from error
        check_scores(request, scores, hidden_size=self.info.hidden_size)
        self.metrics.sequence_scored(
            context_tokens=len(request.context_ids),
            completion_tokens=len(request.completion_ids),
            queue_time_s=scores.queue_time_s,
            engine_time_s=scores.engine_time_s,
        )
        return scores
