"""When to try again, and when to give up: pure arithmetic over a clock that is handed in."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 15.0
SERVER_DELAY_JITTER = 0.25


def backoff_s(attempt: int, rng: random.Random) -> float:
    """Seconds to wait after failed attempt 0, 1, 2, …: exponential with full jitter.

    Uniform between 0 and the doubling ceiling, so that clients which failed together do not return
    together. Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    ceiling_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt, 32))
    return rng.uniform(0.0, ceiling_s)


def retry_delay_s(attempt: int, rng: random.Random, *, server_delay_s: float | None) -> float:
    """Seconds to wait after failed attempt `attempt`; never less than what the server asked for."""
    if server_delay_s is None:
        return backoff_s(attempt, rng)
    return server_delay_s * (1.0 + rng.uniform(0.0, SERVER_DELAY_JITTER))


class ProgressClock:
    """Seconds without an answer while one was owed.

    Not a limit of a request: eight students with long rollouts are minutes of queueing, and all is well
    as long as answers keep coming.
    """

    def __init__(self, timeout_s: float, now: Callable[[], float]) -> None:
        self.timeout_s = timeout_s
        self._now = now
        self._num_outstanding = 0
        self._since_s = now()

    @property
    def num_outstanding(self) -> int:
        return self._num_outstanding

    def begin(self) -> None:
        """Something is owed from now on."""
        if self._num_outstanding == 0:
            self._since_s = self._now()
        self._num_outstanding += 1

    def end(self) -> None:
        """It no longer is, answered or given up."""
        assert self._num_outstanding > 0, "more ends than begins"
        self._num_outstanding -= 1

    def progress(self) -> None:
        """An answer, or a part of one, arrived."""
        self._since_s = self._now()

    @property
    def waited_s(self) -> float:
        return self._now() - self._since_s if self._num_outstanding else 0.0

    @property
    def remaining_s(self) -> float:
        return max(0.0, self.timeout_s - self.waited_s)

    @property
    def expired(self) -> bool:
        return self.waited_s >= self.timeout_s
