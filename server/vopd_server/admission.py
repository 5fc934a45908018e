"""How many tokens are let in: a pure state machine, and a thin asyncio shell that waits on it.

Tokens are reserved from admission until the answer is written, for a stream, and until it is scored, for a unary
call, so that what the server works on is bounded. Calls that cannot be held back are refused when the budget is
taken; streams wait, first come, first served. `TokenBudget` decides and `Admission` waits: fairness between tenants
is to replace the first without touching the second.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vopd_server.errors import OverloadedError

MIN_RETRY_DELAY_S = 0.1
MAX_RETRY_DELAY_S = 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A place in the budget, held or waited for. Compared by identity."""

    tokens: int


class TokenBudget:
    """Who is in and who waits. No I/O, no clock, no tasks.

    Invariants: reserved == sum of the tokens of admitted tickets <= capacity; nobody waits who would fit
    at the head of the queue; nobody overtakes it.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.reserved_tokens = 0
        self._admitted: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        return sum(ticket.tokens for ticket in self._waiting)

    def is_admitted(self, ticket: Ticket) -> bool:
        return ticket in self._admitted

    def try_enter(self, tokens: int) -> Ticket | None:
        """Admits at once, or not at all: also not past those who wait.

        Raises: ValueError for more tokens than the capacity, which would wait forever.
        """
        if tokens > self.capacity_tokens:
            raise ValueError(f"{tokens} tokens > capacity {self.capacity_tokens}")
        if self._waiting or not self._fits(tokens):
            return None
        return self._admit(Ticket(tokens))

    def enter_or_wait(self, tokens: int) -> Ticket:
        """A ticket that is admitted now, or by the `leave` that makes room for it. Raises: as `try_enter`."""
        ticket = self.try_enter(tokens)
        if ticket is None:
            ticket = Ticket(tokens)
            self._waiting.append(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> list[Ticket]:
        """Gives a ticket's tokens, or its place in the queue, back; returns those who come in for it.

        Raises: KeyError for a ticket that is neither in nor waiting: it has left before.
        """
        if ticket in self._admitted:
            self._admitted.remove(ticket)
            self.reserved_tokens -= ticket.tokens
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        else:
            raise KeyError(f"a ticket of {ticket.tokens} tokens left twice")
        entered = []
        while self._waiting and self._fits(self._waiting[0].tokens):
            entered.append(self._admit(self._waiting.popleft()))
        return entered

    def _fits(self, tokens: int) -> bool:
        return self.reserved_tokens + tokens <= self.capacity_tokens

    def _admit(self, ticket: Ticket) -> Ticket:
        self._admitted.add(ticket)
        self.reserved_tokens += ticket.tokens
        return ticket


class RecentRate:
    """Tokens answered per second over the last `window_s` seconds; time is handed in."""

    def __init__(self, window_s: float = 30.0) -> None:
        self._window_s = window_s
        self._answers: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def record(self, tokens: int, now_s: float) -> None:
        self._answers.append((now_s, tokens))
        self._tokens += tokens
        self._forget(now_s)

    def tokens_per_s(self, now_s: float) -> float:
        """0 when nothing was answered of late."""
        self._forget(now_s)
        if not self._answers:
            return 0.0
        return self._tokens / max(now_s - self._answers[0][0], 1.0)

    def _forget(self, now_s: float) -> None:
        while self._answers and self._answers[0][0] < now_s - self._window_s:
            self._tokens -= self._answers.popleft()[1]


def retry_delay_s(missing_tokens: int, tokens_per_s: float) -> float:
    """Seconds until `missing_tokens` are likely free, within bounds; a second when no rate is known."""
    estimate = missing_tokens / tokens_per_s if tokens_per_s > 0 else 1.0
    return min(max(estimate, MIN_RETRY_DELAY_S), MAX_RETRY_DELAY_S)


class Admission:
    """Waits on a TokenBudget. One event loop only."""

    def __init__(self, budget: TokenBudget, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self._clock = clock
        self._rate = RecentRate()
        self._calls: dict[Ticket, asyncio.Future[None]] = {}

    def enter_now(self, tokens: int) -> Ticket:
        """Raises: OverloadedError with the delay after which the tokens are likely free."""
        ticket = self.budget.try_enter(tokens)
        if ticket is None:
            budget = self.budget
            taken = budget.reserved_tokens + budget.waiting_tokens
            missing = taken + tokens - budget.capacity_tokens
            raise OverloadedError(
                f"{tokens} tokens do not fit beside {taken} that are queued (queue_tokens {budget.capacity_tokens})",
                retry_delay_s=retry_delay_s(missing, self._rate.tokens_per_s(self._clock())),
            )
        return ticket

    async def enter(self, tokens: int) -> Ticket:
        """Waits for its turn. Cancelling the wait gives the place in the queue back."""
        ticket = self.budget.enter_or_wait(tokens)
        if self.budget.is_admitted(ticket):
            return ticket
        called = self._calls[ticket] = asyncio.get_running_loop().create_future()
        try:
            await called
        except asyncio.CancelledError:
            self._calls.pop(ticket, None)
            self.leave(ticket, answered=False)
            raise
        return ticket

    def leave(self, ticket: Ticket, *, answered: bool) -> None:
        """Gives a ticket back. `answered`: its tokens count for the rate."""
        if answered:
            self._rate.record(ticket.tokens, self._clock())
        for entered in self.budget.leave(ticket):
            called = self._calls.pop(entered)
            if not called.done():
                called.set_result(None)
