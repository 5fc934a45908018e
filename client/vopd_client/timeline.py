"""Who was busy when in one step: a row of timeline.jsonl, of bounded size, that costs a few clock readings.

Spans are those of the main process on its host: on an accelerator, work that runs on after its call has returned is
counted where it is waited for. Seconds count from the step's start; a request that left before has a negative time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from vopd_client.scoring import Flight

Lane = Literal["sampling", "waiting", "forward", "backward", "optimizer"]
LANES: tuple[Lane, ...] = ("sampling", "waiting", "forward", "backward", "optimizer")

MAX_SPANS = 128  # of one lane, and as many flights: a row stays below 10 kB whatever the step holds
_DIGITS = 4

Span = tuple[float, float]


class Timeline:
    """Records one step from its construction on. `started_at` is seconds since 1970, to put rows side by side."""

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._began = clock()
        self.started_at = wall_clock()
        self._spans: dict[Lane, list[Span]] = {lane: [] for lane in LANES}

    @contextmanager
    def span(self, lane: Lane) -> Iterator[None]:
        """What runs inside is `lane`'s."""
        began_s = self.elapsed_s
        try:
            yield
        finally:
            self._spans[lane].append((began_s, self.elapsed_s))

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def seconds(self, lane: Lane) -> float:
        return sum(end_s - start_s for start_s, end_s in self._spans[lane])

    def to_row(self, step: int, *, sampled_steps: Sequence[int], flights: Sequence[Flight]) -> dict[str, Any]:
        """The row of timeline.jsonl.

        sampled_steps: whose rollouts each span of sampling is. flights: of the rollouts that this step learned from.
        """
        flown = sorted((flight.sent_at - self._began, flight.answered_at - self._began) for flight in flights)
        return {
            "step": step,
            "started_at": round(self.started_at, _DIGITS),
            "step_s": round(self.elapsed_s, _DIGITS),
            "sampled_steps": list(sampled_steps),
            **{lane: _rounded(merged(self._spans[lane])) for lane in LANES},
            "num_flights": len(flown),
            "flights": _rounded(spread(flown)),
        }


def merged(spans: Sequence[Span], limit: int = MAX_SPANS) -> list[Span]:
    """At most `limit` spans in place of consecutive ones, each from the start of its first to the end of its last."""
    size = -(-len(spans) // limit) or 1
    groups = [spans[first : first + size] for first in range(0, len(spans), size)]
    return [(group[0][0], group[-1][1]) for group in groups]


def spread(spans: Sequence[Span], limit: int = MAX_SPANS) -> list[Span]:
    """At most `limit` of the spans, evenly over all of them, first and last included."""
    if len(spans) <= limit:
        return list(spans)
    return [spans[round(place * (len(spans) - 1) / (limit - 1))] for place in range(limit)]


def _rounded(spans: Sequence[Span]) -> list[list[float]]:
    return [[round(start_s, _DIGITS), round(end_s, _DIGITS)] for start_s, end_s in spans]
