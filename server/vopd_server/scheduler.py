"""Who may ask, and who comes next: a pure state machine. No I/O, no clock, no tasks; time is handed in.

A ticket is one sequence, from the moment it asks to be let in until its answer has left:

    held ──► admitted ──► queued ──► running ──► answered ──► left        (from everywhere: left)
         bound       unpacked    turn       scored      written

Two bounds, so that fairness and back-pressure do not fight. What a tenant has admitted and not yet had answered stays
within *its own* queue bound, in tokens and bytes: a call over it is refused, a sequence of a stream is held. What runs
stays within the *engine window*, which all share: of the tenants that have something queued, the one that has had the
least for its weight comes next (start-time fair queueing, Goyal, Vin and Cheng 1996). So a job that floods waits for
itself, and nobody for more than the window and its own turn.

Rollouts of one prompt share their context, which an engine reads once if they come together. So they do: whose turn it
is brings those behind it that have the same context along, and a context that is running counts once.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vopd_server.tenancy import Tenant, TenantLimits

Stage = Literal["held", "admitted", "queued", "running", "answered", "left"]
WaitsFor = Literal["", "engine", "tokens_in_flight", "tokens_per_minute"]


@dataclass(frozen=True, slots=True)
class Demand:
    """What one sequence takes.

    tokens: context + completion tokens. num_bytes: of memory, for the request and its answer.
    """

    tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine is to do for one sequence.

    context_key: equal for equal contexts. own_tokens: those that are not the context's.
    row_cost: of the engine's time beyond reading, in tokens that it could read meanwhile.
    """

    context_key: bytes
    context_tokens: int
    own_tokens: int
    row_cost: float = 0.0


@dataclass(slots=True, eq=False)
class Ticket:
    """A sequence's place. Compared by identity; only the scheduler changes it."""

    tenant_id: str
    demand: Demand
    since_s: float  # in its stage
    stage: Stage = "held"
    work: Work | None = None  # from `queued` on
    cost: float = 0.0  # from `running` on: what it was charged, in tokens


@dataclass(slots=True)
class TenantQueue:
    """One tenant's tickets and sums; read by others, changed by the scheduler only.

    virtual_time: cost over weight of all that it has had, never behind that of the others when it starts anew.
    allowance: tokens it may still let in at its rate; below 0 after a sequence larger than what was left.
    """

    limits: TenantLimits
    queue_tokens: int
    queue_bytes: int
    held: deque[Ticket] = field(default_factory=deque)
    queued: deque[Ticket] = field(default_factory=deque)
    num_running: int = 0
    running_tokens: int = 0
    running_contexts: Counter[bytes] = field(default_factory=Counter)
    reserved_tokens: int = 0
    reserved_bytes: int = 0
    num_reserved: int = 0
    virtual_time: float = 0.0
    allowance: float = math.inf
    allowance_at_s: float = 0.0
    is_revoked: bool = False

    def fits(self, tokens: int, num_bytes: int) -> bool:
        return (
            self.reserved_tokens + tokens <= self.queue_tokens and self.reserved_bytes + num_bytes <= self.queue_bytes
        )

    @property
    def queued_tokens(self) -> int:
        return sum(ticket.demand.tokens for ticket in self.queued)

    @property
    def is_busy(self) -> bool:
        return bool(self.queued) or self.num_running > 0


class FairScheduler:
    """Invariants: what is reserved is the sum over admitted, queued, running and answered tickets, and within the
    tenant's bounds; what runs is within the window, or beyond it by one sequence at most; nobody is held who would fit
    at the head of its tenant's line; whose turn it is enters as soon as the window has room.

    window_tokens: tokens that may run at a time, each running context counted once.
    queue_tokens: bound of a tenant that has none of its own. queue_bytes: of all tenants together, in equal shares.
    """

    def __init__(self, *, window_tokens: int, queue_tokens: int, queue_bytes: int) -> None:
        self.window_tokens = window_tokens
        self.window_used = 0
        self._default_queue_tokens = queue_tokens
        self._all_queue_bytes = queue_bytes
        self._queues: dict[str, TenantQueue] = {}
        self._num_running = 0
        self._virtual_time = 0.0  # of the tenant whose turn it was last, before it had its turn

    @property
    def queues(self) -> Mapping[str, TenantQueue]:
        return self._queues

    def set_tenants(self, tenants: Iterable[Tenant], now_s: float) -> list[Ticket]:
        """The tenants there are from now on; returns the tickets that are let in by wider bounds.

        One that is gone is served what it has had admitted, and forgotten then.
        """
        tenants = list(tenants)
        share = self._all_queue_bytes // max(1, len(tenants))
        for tenant in tenants:
            queue = self._queues.get(tenant.id)
            if queue is None:
                queue = self._queues[tenant.id] = TenantQueue(TenantLimits(), 0, 0)
            self._set_limits(queue, tenant.limits, share, now_s)
        present = {tenant.id for tenant in tenants}
        for tenant_id in [tenant_id for tenant_id in self._queues if tenant_id not in present]:
            self._queues[tenant_id].is_revoked = True
            self._forget_if_done(tenant_id)
        return [ticket for queue in self._queues.values() for ticket in self._let_in(queue, now_s)]

    # ---------------------------------------------------------------- the queue bound

    def admit_now(self, tenant_id: str, demands: Sequence[Demand], now_s: float) -> list[Ticket] | None:
        """All of a call or nothing, and not past what its tenant has held. None: over the bound.

        Raises: ValueError for more than the bound, which would never be admitted; KeyError for an unknown tenant.
        """
        queue = self._queues[tenant_id]
        tokens, num_bytes = sum(demand.tokens for demand in demands), sum(demand.num_bytes for demand in demands)
        _check_it_ever_fits(queue, tokens, num_bytes)
        if queue.held or not queue.fits(tokens, num_bytes):
            return None
        tickets = [Ticket(tenant_id, demand, now_s) for demand in demands]
        for ticket in tickets:
            _reserve(queue, ticket, now_s)
        return tickets

    def admit_or_hold(self, tenant_id: str, demand: Demand, now_s: float) -> Ticket:
        """A ticket that is admitted now, or held until what its tenant has had answered makes room.

        Raises: as `admit_now`.
        """
        queue = self._queues[tenant_id]
        _check_it_ever_fits(queue, demand.tokens, demand.num_bytes)
        ticket = Ticket(tenant_id, demand, now_s)
        queue.held.append(ticket)
        self._let_in(queue, now_s)
        return ticket

    def leave(self, ticket: Ticket, now_s: float) -> list[Ticket]:
        """The ticket is done with, wherever it was; returns the held ones that are admitted for it.

        Raises: ValueError for one that has left before.
        """
        queue = self._queues[ticket.tenant_id]
        match ticket.stage:
            case "left":
                raise ValueError(f"a ticket of {ticket.demand.tokens} tokens left twice")
            case "held":
                queue.held.remove(ticket)
            case "queued":
                queue.queued.remove(ticket)
            case "running":
                self.answered(ticket, now_s)
            case "admitted" | "answered":
                pass
        if ticket.stage != "held":
            queue.reserved_tokens -= ticket.demand.tokens
            queue.reserved_bytes -= ticket.demand.num_bytes
            queue.num_reserved -= 1
        ticket.stage = "left"
        admitted = self._let_in(queue, now_s)
        self._forget_if_done(ticket.tenant_id)
        return admitted

    # ---------------------------------------------------------------- the engine window

    def queue(self, ticket: Ticket, work: Work, now_s: float) -> None:
        """An admitted ticket is ready for the engine."""
        assert ticket.stage == "admitted", ticket.stage
        ticket.work = work
        queue = self._queues[ticket.tenant_id]
        if not queue.queued:
            # One that has asked for nothing for a while has saved up nothing.
            queue.virtual_time = max(queue.virtual_time, self._virtual_time)
        queue.queued.append(ticket)
        _move(ticket, "queued", now_s)

    def start_next(self, now_s: float) -> list[Ticket]:
        """Those who enter the engine now, in their order."""
        started: list[Ticket] = []
        while (queue := self._whose_turn(now_s)) is not None:
            if not self._has_room(queue):
                break  # nobody overtakes
            # One that a limit of its own held back has saved up nothing either.
            self._virtual_time = queue.virtual_time = max(self._virtual_time, queue.virtual_time)
            key = _work(queue.queued[0]).context_key
            while self.waits_for(queue, now_s) == "engine" and _work(queue.queued[0]).context_key == key:
                if not self._has_room(queue):
                    break
                started.append(self._start(queue, now_s))
        return started

    def answered(self, ticket: Ticket, now_s: float) -> None:
        """The engine is done with a running ticket."""
        assert ticket.stage == "running", ticket.stage
        queue = self._queues[ticket.tenant_id]
        work = _work(ticket)
        queue.num_running -= 1
        queue.running_tokens -= ticket.demand.tokens
        queue.running_contexts[work.context_key] -= 1
        if not queue.running_contexts[work.context_key]:
            del queue.running_contexts[work.context_key]
            self.window_used -= work.context_tokens
        self.window_used -= work.own_tokens
        self._num_running -= 1
        _move(ticket, "answered", now_s)

    def next_start_s(self, now_s: float) -> float | None:
        """When `start_next` may find somebody without anything else happening: a rate lets it go on. None: never."""
        moments = [
            now_s - queue.allowance / _tokens_per_s(queue.limits)
            for queue in self._queues.values()
            if queue.queued and self.waits_for(queue, now_s) == "tokens_per_minute"
        ]
        return min(moments, default=None)

    def waits_for(self, queue: TenantQueue, now_s: float) -> WaitsFor:
        """What keeps the first of a tenant's queue from the engine."""
        if not queue.queued:
            return ""
        in_flight = queue.limits.tokens_in_flight
        tokens = queue.queued[0].demand.tokens
        if in_flight is not None and queue.num_running and queue.running_tokens + tokens > in_flight:
            return "tokens_in_flight"
        _refill(queue, now_s)
        return "tokens_per_minute" if queue.allowance < 0 else "engine"

    def _whose_turn(self, now_s: float) -> TenantQueue | None:
        ready = [queue for queue in self._queues.values() if self.waits_for(queue, now_s) == "engine"]
        return min(ready, key=lambda queue: queue.virtual_time, default=None)

    def _has_room(self, queue: TenantQueue) -> bool:
        """For the first of a queue: with its context, or beside the same context, as if that took no room."""
        work = _work(queue.queued[0])
        is_shared = work.context_key in queue.running_contexts
        used = self.window_used - work.context_tokens if is_shared else self.window_used + work.context_tokens
        return used + work.own_tokens <= self.window_tokens or not self._num_running

    def _start(self, queue: TenantQueue, now_s: float) -> Ticket:
        ticket = queue.queued.popleft()
        work = _work(ticket)
        is_new_context = work.context_key not in queue.running_contexts
        read_tokens = work.own_tokens + (work.context_tokens if is_new_context else 0)
        ticket.cost = read_tokens + work.row_cost
        queue.virtual_time += ticket.cost / queue.limits.weight
        queue.allowance -= ticket.demand.tokens
        queue.num_running += 1
        queue.running_tokens += ticket.demand.tokens
        queue.running_contexts[work.context_key] += 1
        self._num_running += 1
        self.window_used += read_tokens
        _move(ticket, "running", now_s)
        return ticket

    # ---------------------------------------------------------------- inside

    def _let_in(self, queue: TenantQueue, now_s: float) -> list[Ticket]:
        admitted = []
        while queue.held and queue.fits(queue.held[0].demand.tokens, queue.held[0].demand.num_bytes):
            ticket = queue.held.popleft()
            _reserve(queue, ticket, now_s)
            admitted.append(ticket)
        return admitted

    def _set_limits(self, queue: TenantQueue, limits: TenantLimits, share: int, now_s: float) -> None:
        if queue.limits.tokens_per_minute != limits.tokens_per_minute:
            queue.allowance = math.inf if limits.tokens_per_minute is None else float(limits.tokens_per_minute)
            queue.allowance_at_s = now_s
        queue.limits = limits
        queue.queue_tokens = limits.queue_tokens or self._default_queue_tokens
        queue.queue_bytes = share
        queue.is_revoked = False

    def _forget_if_done(self, tenant_id: str) -> None:
        queue = self._queues[tenant_id]
        if queue.is_revoked and not queue.num_reserved and not queue.held:
            del self._queues[tenant_id]


def _check_it_ever_fits(queue: TenantQueue, tokens: int, num_bytes: int) -> None:
    if tokens > queue.queue_tokens or num_bytes > queue.queue_bytes:
        raise ValueError(
            f"{tokens} tokens and {num_bytes} bytes > the bounds of {queue.queue_tokens} and {queue.queue_bytes}"
        )


def _reserve(queue: TenantQueue, ticket: Ticket, now_s: float) -> None:
    queue.reserved_tokens += ticket.demand.tokens
    queue.reserved_bytes += ticket.demand.num_bytes
    queue.num_reserved += 1
    _move(ticket, "admitted", now_s)


def _move(ticket: Ticket, stage: Stage, now_s: float) -> None:
    ticket.stage = stage
    ticket.since_s = now_s


def _work(ticket: Ticket) -> Work:
    assert ticket.work is not None, ticket.stage
    return ticket.work


def _tokens_per_s(limits: TenantLimits) -> float:
    assert limits.tokens_per_minute is not None
    return limits.tokens_per_minute / 60


def _refill(queue: TenantQueue, now_s: float) -> None:
    """A minute's tokens at most, however long it has been quiet."""
    per_minute = queue.limits.tokens_per_minute
    if per_minute is not None:
        earned = (now_s - queue.allowance_at_s) * per_minute / 60
        queue.allowance = min(float(per_minute), queue.allowance + earned)
        queue.allowance_at_s = now_s
