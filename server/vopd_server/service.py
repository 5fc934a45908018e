"""The service, whatever the transport: validate -> admit -> its turn -> engine -> result.

A transport hands over whose call it is, shapes (lengths that it knows without unpacking anything) and a function that
unpacks. It never sees the engine, and the service never sees a message.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal

from vopd_proto import teacher_pb2 as pb
from vopd_server.admission import Admission
from vopd_server.concurrency import first_done, raise_result, task_group
from vopd_server.demand import demand_of, work_of
from vopd_server.engines.base import Engine
from vopd_server.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    TeacherError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from vopd_server.metrics import Metrics
from vopd_server.scheduler import Demand, Ticket
from vopd_server.status import EngineCounters, ServiceStatus, tenants_status
from vopd_server.tenancy import Doorkeeper, Tenant
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
from vopd_server.version import SERVER_VERSION
from vopd_server.waiting import why_waiting
from vopd_server.watchdog import Watchdog

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "dead"]
# A client that hears this asks again: about how long a model takes to load, a replica to be replaced.
STARTING_RETRY_DELAY_S = 2.0
DRAINING_RETRY_DELAY_S = 1.0
TOO_MANY_CALLS_RETRY_DELAY_S = 1.0
DEFAULT_MAX_CALLS = 256


class TeacherService:
    """One engine behind validation and admission. `limits` are final once the engine has started.

    door: says whose call it is. window_tokens: of the engine at a time; None: what the engine finds best.
    max_calls: of one tenant at a time, at most.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        admission: Admission,
        *,
        door: Doorkeeper,
        window_tokens: int | None = None,
        max_calls: int = DEFAULT_MAX_CALLS,
    ) -> None:
        self._engine = engine
        self.limits = limits
        self.admission = admission
        self.metrics = Metrics()
        self._door = door
        self._window_tokens = window_tokens
        self._max_calls = max_calls
        self._started_s = time.monotonic()
        self.golden_probe = ""  # what it found, in words
        self._state: State = "starting"
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_calls: Counter[str] = Counter()
        self.last_answer_s = time.monotonic()
        self._take_tenants()

    # ---------------------------------------------------------------- life

    @property
    def state(self) -> State:
        return self._state

    async def start(self, before_ready: Callable[[Engine], Coroutine[Any, Any, None]] | None = None) -> None:
        """Loads and warms the engine; requests are accepted once `before_ready` has returned, too.

        Raises: what they raise; EngineDeadError when the engine dies meanwhile.
        """
        await self._engine.start()
        if before_ready is not None:
            await first_done(before_ready(self._engine), raise_result(self._engine.wait_until_dead()))
        longest = min(self._engine.info.max_context_length, self.limits.max_context_length)
        self.limits = dataclasses.replace(self.limits, max_context_length=longest)
        self.admission.scheduler.window_tokens = self._window_tokens or self._engine.info.window_tokens
        self._state = "ready"

    def drain(self) -> None:
        """From now on nothing new is accepted."""
        if self._state != "dead":
            self._state = "draining"
        self._draining.set()

    async def wait_until_dead(self, watchdog: Watchdog | None = None) -> EngineDeadError:
        """Returns when the engine can score nothing any more, with the reason; nothing new is accepted then."""
        watching = [self._engine.wait_until_dead()]
        if watchdog is not None:
            watching.append(watchdog.wait_until_dead())
        reason = await first_done(*watching)
        self._state = "dead"
        self.drain()
        return reason

    async def wait_for_drain(self) -> None:
        await self._draining.wait()

    @property
    def is_idle(self) -> bool:
        """No call is in flight."""
        return not self._num_calls

    async def wait_until_idle(self) -> None:
        """Returns when no call is in flight."""
        await self._idle.wait()

    async def close(self) -> None:
        await self._engine.close()

    @contextmanager
    def call(self, tenant: Tenant) -> Iterator[None]:
        """Around everything a transport does for one call, so that draining waits for it.

        Raises: UnavailableError while the engine starts and once the service drains; OverloadedError for a tenant
            with too many calls.
        """
        self.check_accepting()
        if self._num_calls[tenant.id] >= self._max_calls:
            raise OverloadedError(
                f"tenant {tenant.id} has {self._max_calls} calls in flight (calls_per_tenant)",
                retry_delay_s=TOO_MANY_CALLS_RETRY_DELAY_S,
            )
        self._num_calls[tenant.id] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls[tenant.id] -= 1
            if not self._num_calls[tenant.id]:
                del self._num_calls[tenant.id]
            if not self._num_calls:
                self._idle.set()

    def check_accepting(self) -> None:
        """Raises: UnavailableError, with a delay after which another try may be answered."""
        if self._state == "starting":
            raise UnavailableError("the teacher is loading its model", retry_delay_s=STARTING_RETRY_DELAY_S)
        if self._state == "dead":
            raise UnavailableError("the teacher's engine has died", retry_delay_s=STARTING_RETRY_DELAY_S)
        if self._state == "draining":
            raise UnavailableError("the teacher is shutting down", retry_delay_s=DRAINING_RETRY_DELAY_S)

    # ---------------------------------------------------------------- whose call it is

    def authenticate(self, api_key: str | None) -> Tenant:
        """Raises: UnauthenticatedError."""
        return self._door.authenticate(api_key)

    def refresh_tenants(self) -> None:
        """Looks whether the keys have changed. Those that are gone are served what they have had admitted."""
        if self._door.reload_if_changed():
            self._take_tenants()

    def _take_tenants(self) -> None:
        self._cache_salts = {tenant.id: tenant.cache_salt for tenant in self._door.tenants}
        self.admission.set_tenants(self._door.tenants)

    def rejected(self, tenant_id: str, code: str) -> None:
        """A call, or a sequence of a stream, has ended with an error."""
        self.metrics.rejected(tenant_id, code)
        if tenant_id:
            self.admission.usage.of(tenant_id).rejections[code] += 1

    # ---------------------------------------------------------------- what it is

    def status(self) -> ServiceStatus:
        """Everything an operator sees, at this moment; of an engine that has not started there is little."""
        info = self._engine.info if self._state != "starting" else None
        scheduler = self.admission.scheduler
        now_s = time.monotonic()
        return ServiceStatus(
            state=self._state,
            uptime_s=now_s - self._started_s,
            model_id=info.model_id if info else "",
            model_revision=info.model_revision if info else "",
            engine=info.engine if info else "",
            engine_version=info.engine_version if info else "",
            dtype=info.dtype if info else "",
            server_version=SERVER_VERSION,
            calls_in_flight=self._num_calls.total(),
            window_tokens=scheduler.window_tokens,
            running_tokens=scheduler.window_used,
            max_batch_tokens=info.max_batch_tokens if info else 0,
            engine_counters=self._engine.counters if info else EngineCounters(),
            golden_probe=self.golden_probe,
            keys_problem=self._door.problem,
            tenants=tenants_status(scheduler, self.admission.usage, now_s),
        )

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def engine(self) -> Engine:
        """For who looks after it: requests go through the service."""
        return self._engine

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

    def limits_for(self, tenant: Tenant) -> Limits:
        """What a request of `tenant` may ask for: nothing that its own bounds could never admit."""
        limits, own = self.limits, tenant.limits
        bound = own.queue_tokens or limits.max_tokens_per_request
        return dataclasses.replace(
            limits,
            max_context_length=min(limits.max_context_length, bound),
            max_tokens_per_request=min(limits.max_tokens_per_request, bound),
            max_top_k=min(limits.max_top_k, own.max_top_k or limits.max_top_k),
        )

    def queue_tokens_of(self, tenant: Tenant) -> int:
        """What the tenant may have admitted and unanswered at a time."""
        return self.admission.scheduler.queues[tenant.id].queue_tokens

    def why_waiting(self, tenant: Tenant) -> pb.StreamWaiting:
        """What the tenant's sequences wait for at this moment."""
        return why_waiting(self.admission.scheduler, tenant.id, time.monotonic())

    def check(self, tenant: Tenant, shapes: Sequence[SequenceShape], temperature: float) -> list[Demand]:
        """What can be said of a request before it is admitted: what each of its sequences takes.

        Raises: InvalidRequestError, UnsupportedError; UnauthenticatedError when the tenant's key has been revoked.
        """
        queue = self.admission.scheduler.queues.get(tenant.id)
        # A tenant that has got a new key since has another salt, too: what came with the old key is over.
        is_same_key = self._cache_salts.get(tenant.id) == tenant.cache_salt
        if queue is None or queue.is_revoked or not is_same_key:
            raise UnauthenticatedError("the API key is not valid any more")
        check_temperature(temperature, self.info)
        check_shapes(shapes, info=self.info, limits=self.limits_for(tenant))
        demands = [demand_of(shape, hidden_size=self.info.hidden_size) for shape in shapes]
        num_bytes = sum(demand.num_bytes for demand in demands)
        if num_bytes > queue.queue_bytes:
            raise InvalidRequestError(
                shapes[0].field if len(shapes) == 1 else "sequences",
                f"about {num_bytes} bytes of memory for ids and answer > {queue.queue_bytes}, the share of one tenant",
            )
        return demands

    @asynccontextmanager
    async def scored_batch(
        self,
        tenant: Tenant,
        shapes: Sequence[SequenceShape],
        unpack: Callable[[], Sequence[ScoreRequest]],
        *,
        temperature: float,
    ) -> AsyncIterator[list[tuple[ScoreRequest, Scores]]]:
        """A small batch, scored, all or nothing, in its order. The first failure cancels the rest.

        Its tokens are held while the answer is made of it.

        Raises: InvalidRequestError, UnsupportedError; OverloadedError at once when the tenant is at its bound;
            EngineError.
        """
        started_s = time.monotonic()
        tickets = self.admission.admit_now(tenant, self.check(tenant, shapes, temperature))
        answered = False
        try:
            requests = unpack()
            for shape, request in zip(shapes, requests, strict=True):
                check_request(request, field=shape.field, info=self.info, limits=self.limits)
            self.metrics.stage(tenant.id, "validate", time.monotonic() - started_s)
            async with task_group() as group:
                tasks = [
                    group.create_task(self._run(tenant, ticket, request))
                    for ticket, request in zip(tickets, requests, strict=True)
                ]
            answered = True
            yield [(request, task.result()) for request, task in zip(requests, tasks, strict=True)]
        finally:
            for ticket in tickets:
                self.admission.leave(ticket, answered=answered)

    async def admit(self, tenant: Tenant, shape: SequenceShape, temperature: float) -> Ticket:
        """Lets one sequence of a stream in, when its tenant has room. Who calls gives the ticket back.

        Raises: InvalidRequestError, UnsupportedError; UnavailableError once the service drains;
            UnauthenticatedError when the tenant's key has been revoked.
        """
        self.check_accepting()
        [demand] = self.check(tenant, [shape], temperature)
        return await self.admission.admit(tenant, demand)

    async def score_admitted(
        self, tenant: Tenant, ticket: Ticket, shape: SequenceShape, unpack: Callable[[], ScoreRequest]
    ) -> tuple[ScoreRequest, Scores]:
        """Scores one sequence that was let in. Raises: InvalidRequestError, EngineError."""
        started_s = time.monotonic()
        request = unpack()
        check_request(request, field=shape.field, info=self.info, limits=self.limits)
        self.metrics.stage(tenant.id, "validate", time.monotonic() - started_s)
        return request, await self._run(tenant, ticket, request)

    async def _run(self, tenant: Tenant, ticket: Ticket, request: ScoreRequest) -> Scores:
        """The engine's answer, checked, when it is the ticket's turn. An empty completion needs no engine."""
        if len(request.completion_ids) == 0:
            return empty_scores(request, hidden_size=self.info.hidden_size)
        waited_s = await self.admission.enter_engine(ticket, work_of(request))
        with self.admission.running(ticket):
            scores = await self._ask_engine(dataclasses.replace(request, cache_salt=tenant.cache_salt))
        scores = dataclasses.replace(scores, queue_time_s=scores.queue_time_s + waited_s)
        self.metrics.sequence_scored(
            tenant.id, context_tokens=len(request.context_ids), completion_tokens=len(request.completion_ids)
        )
        self.metrics.stage(tenant.id, "queue", scores.queue_time_s)
        self.metrics.stage(tenant.id, "engine", scores.engine_time_s)
        return scores

    async def _ask_engine(self, request: ScoreRequest) -> Scores:
        try:
            scores = await self._engine.score(request)
        except TeacherError:
            raise
        except Exception as error:
            logger.exception("engine failed", extra={"request_id": request.request_id})
            raise EngineError(f"the engine failed; the teacher's log tells why under {request.request_id}") from error
        check_scores(request, scores, hidden_size=self.info.hidden_size)
        self.last_answer_s = time.monotonic()
        return scores
