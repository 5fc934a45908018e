"""The asyncio shell of the scheduler: waits for what it decides, tells the time, and counts.

One event loop only. A call holds a ticket for every one of its sequences, from admission until its answer is written
for a stream, and until it is packed for a unary call, so that what the server works on is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from vopd_server.errors import OverloadedError
from vopd_server.scheduler import Demand, FairScheduler, Ticket, Work
from vopd_server.tenancy import Tenant
from vopd_server.usage import UsageBook

MIN_RETRY_DELAY_S = 0.1
MAX_RETRY_DELAY_S = 30.0
# After the moment at which a rate lets its tenant go on, so that rounding does not find it a little early.
TIMER_SLACK_S = 0.001


def retry_delay_s(missing_tokens: int, tokens_per_s: float) -> float:
    """Seconds until `missing_tokens` are likely free, within bounds; a second when no rate is known."""
    estimate = missing_tokens / tokens_per_s if tokens_per_s > 0 else 1.0
    return min(max(estimate, MIN_RETRY_DELAY_S), MAX_RETRY_DELAY_S)


class Admission:
    """Waits on a FairScheduler."""

    def __init__(self, scheduler: FairScheduler, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler = scheduler
        self.usage = UsageBook()
        self._clock = clock
        self._calls: dict[Ticket, asyncio.Future[None]] = {}
        self._starting: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set_tenants(self, tenants: Iterable[Tenant]) -> None:
        self._call_in(self.scheduler.set_tenants(tenants, self._clock()))

    def admit_now(self, tenant: Tenant, demands: Sequence[Demand]) -> list[Ticket]:
        """All of a call's sequences.

        Raises: OverloadedError with the delay after which its tenant's own tokens are likely free.
        """
        now_s = self._clock()
        tickets = self.scheduler.admit_now(tenant.id, demands, now_s)
        if tickets is not None:
            return tickets
        queue = self.scheduler.queues[tenant.id]
        tokens, num_bytes = sum(demand.tokens for demand in demands), sum(demand.num_bytes for demand in demands)
        held_tokens = sum(ticket.demand.tokens for ticket in queue.held)
        missing = max(0, queue.reserved_tokens + held_tokens + tokens - queue.queue_tokens)
        held = f" and {held_tokens} of streams held back" if held_tokens else ""
        raise OverloadedError(
            f"{tokens} tokens ({num_bytes} bytes) do not fit beside {queue.reserved_tokens} tokens "
            f"({queue.reserved_bytes} bytes) that tenant {tenant.id} has queued{held} (queue_tokens "
            f"{queue.queue_tokens}, its share of queue_bytes {queue.queue_bytes})",
            retry_delay_s=retry_delay_s(missing, self.usage.of(tenant.id).tokens_per_s(now_s)),
        )

    async def admit(self, tenant: Tenant, demand: Demand) -> Ticket:
        """One sequence of a stream, when its tenant has room. Cancelling the wait gives the place up."""
        ticket = self.scheduler.admit_or_hold(tenant.id, demand, self._clock())
        try:
            if ticket.stage == "held":
                await self._until_called(ticket)
        except asyncio.CancelledError:
            self.leave(ticket, answered=False)
            raise
        return ticket

    async def enter_engine(self, ticket: Ticket, work: Work) -> float:
        """Returns when it is the ticket's turn, with the seconds that took. `running` comes next, or `leave`."""
        now_s = self._clock()
        self.scheduler.queue(ticket, work, now_s)
        self._start_soon()
        await self._until_called(ticket)
        return self._clock() - now_s

    @contextmanager
    def running(self, ticket: Ticket) -> Iterator[None]:
        """Around the engine's work on a ticket whose turn it is."""
        try:
            yield
        finally:
            self.scheduler.answered(ticket, self._clock())
            self._start_soon()

    def leave(self, ticket: Ticket, *, answered: bool) -> None:
        """Gives a ticket back, once. `answered`: its tokens count for its tenant's rate."""
        now_s = self._clock()
        if answered:
            self.usage.of(ticket.tenant_id).answered(ticket.demand.tokens, now_s)
        self._call_in(self.scheduler.leave(ticket, now_s))
        self._start_soon()

    async def _until_called(self, ticket: Ticket) -> None:
        called = self._calls[ticket] = asyncio.get_running_loop().create_future()
        try:
            await called
        finally:
            self._calls.pop(ticket, None)

    def _start_soon(self) -> None:
        """Once whatever is ready now has been queued: what was sent together enters together."""
        if self._starting is None:
            self._starting = asyncio.get_running_loop().call_soon(self._start_next)

    def _start_next(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        now_s = self._clock()
        started = self.scheduler.start_next(now_s)
        for ticket in started:
            self.usage.of(ticket.tenant_id).started(ticket.cost, now_s)
        self._call_in(started)
        self._set_timer(now_s)

    def _set_timer(self, now_s: float) -> None:
        """Comes back when a rate lets somebody go on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_s = self.scheduler.next_start_s(now_s)
        if next_s is not None:
            delay_s = max(0.0, next_s - now_s) + TIMER_SLACK_S
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._start_next)

    def _call_in(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            called = self._calls.pop(ticket, None)
            if called is not None and not called.done():
                called.set_result(None)
