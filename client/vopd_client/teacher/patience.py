"""Waiting for a teacher: backs off between attempts and gives up after too long without progress."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

import grpc

from vopd_client.errors import TeacherUnavailableError
from vopd_client.teacher.retry import ProgressClock, retry_delay_s
from vopd_client.teacher.status import Failure

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Timing:
    """Where time and chance come from, so that tests can bring their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: random.Random = field(default_factory=random.Random)


class Patience:
    """One piece of work's time-out by progress, its failed attempts, and what to tell people meanwhile."""

    def __init__(
        self,
        timeout_s: float,
        timing: Timing,
        *,
        who: str = "teacher",
        also: Callable[[], str] = lambda: "",
    ) -> None:
        """who: is waited for. also: another reason that there may be, where this has none of its own."""
        self.clock = ProgressClock(timeout_s, timing.now)
        self._timing = timing
        self._who = who
        self._also = also
        self._failed_attempts = 0
        self._failure: Failure | None = None
        self._told = ""
        self._retry_at_s = 0.0

    def beside(self, who: str) -> Patience:
        """For a part of the work: attempts of its own, and the whole's time-out, for which any progress counts."""
        part = Patience(self.clock.timeout_s, self._timing, who=who)
        part.clock = self.clock
        return part

    def progressed(self) -> None:
        """An answer arrived: the clock and the back-off start over."""
        self.clock.progress()
        self._failed_attempts = 0
        self._failure = None
        self._told = ""

    def told(self, reason: str) -> None:
        """The teacher says why there is no answer yet: it lives, which is not progress."""
        self._failure = None
        self._told = reason

    @property
    def waiting_reason(self) -> str:
        """`teacher unavailable: connection refused, retrying in 3 s (12 of 600 s)`; empty while all is well."""
        if not self.clock.num_outstanding:
            return ""
        waited = f"{self.clock.waited_s:.0f} of {self.clock.timeout_s:.0f} s"
        if self._failure is None:
            reason = f"{self._who} busy: {self._told}" if self._told else self._also()
            return f"{reason} ({waited})" if reason else ""
        state = "busy" if self._failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED else "unavailable"
        delay_s = self._retry_at_s - self._timing.now()
        then = f"retrying in {delay_s:.0f} s" if delay_s >= 0.5 else "retrying"
        return f"{self._who} {state}: {self._failure.reason}, {then} ({waited})"

    async def back_off(self, failure: Failure, cause: BaseException | None, *, num_replicas: int = 1) -> None:
        """Waits before the next attempt. Another replica, not tried since the last answer, is tried at once.

        Raises: TeacherUnavailableError when the time is up.
        """
        self._failed_attempts += 1
        self._failure = failure
        rounds, tried_in_round = divmod(self._failed_attempts, num_replicas)
        delay_s = 0.0
        if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED or not tried_in_round:
            delay_s = retry_delay_s(max(0, rounds - 1), self._timing.rng, server_delay_s=failure.retry_delay_s)
        self._retry_at_s = self._timing.now() + delay_s
        await self._timing.sleep(min(delay_s, self.clock.remaining_s))
        if self.clock.expired:
            raise self._gone() from cause

    async def run(self, work: Callable[[], Coroutine[object, object, Result]]) -> Result:
        """The result of `work()`, which is cancelled when it makes no progress for too long.

        Raises: TeacherUnavailableError when the time is up, and whatever `work` raises.
        """
        task = asyncio.create_task(work())
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=self.clock.remaining_s)
                if self.clock.expired and not task.done():
                    raise self._gone()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _gone(self) -> TeacherUnavailableError:
        reason = self._failure.reason if self._failure else self._also()
        last = f"; last: {reason}" if reason else ""
        return TeacherUnavailableError(f"no progress of the teacher for {self.clock.timeout_s:g} s{last}")
