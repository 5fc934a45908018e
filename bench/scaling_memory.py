"""The largest request that a teacher serves inside a memory budget: growing, then halving the interval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from scaling_points import Point
from scaling_rounds import play
from scaling_teacher import WatchedTeacher, watched_teacher

GRAIN_TOKENS = 64  # lengths that are tried are multiples of it
MEBIBYTE = 2**20

LimitedBy = Literal["memory", "length", "time"]


@dataclass(frozen=True)
class Probe:
    """One request of `tokens` context and completion tokens, in each of its group."""

    tokens: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Largest:
    """found: the largest that kept the budget; None: not even the shortest did.

    limited_by: memory; or the longest that was allowed, or the time of a probe, before memory was.
    """

    found: Probe | None
    limited_by: LimitedBy
    probes: tuple[Probe, ...]


def largest_within(
    probe: Callable[[int], Probe],
    *,
    budget_bytes: int,
    shortest_tokens: int,
    longest_tokens: int,
    slowest_s: float,
    resolution: float = 0.05,
) -> Largest:
    """Doubles until the budget, `longest_tokens` or `slowest_s` is passed, then halves down to `resolution` of it.

    slowest_s: no probe is begun that by the last one's time, growing with the square of the length, takes longer.
    """
    probes: list[Probe] = []
    fitting: Probe | None = None
    too_large_tokens: int | None = None
    tokens = shortest_tokens
    limited_by: LimitedBy = "memory"
    while too_large_tokens is None:
        if fitting is not None and fitting.seconds * (tokens / fitting.tokens) ** 2 > slowest_s:
            limited_by = "time"
            break
        probes.append(probe(tokens))
        if probes[-1].peak_bytes > budget_bytes:
            too_large_tokens = tokens
        elif tokens >= longest_tokens:
            return Largest(probes[-1], "length", tuple(probes))
        else:
            fitting, tokens = probes[-1], min(2 * tokens, longest_tokens)
    while fitting is not None and too_large_tokens is not None:
        middle = (fitting.tokens + too_large_tokens) // 2 // GRAIN_TOKENS * GRAIN_TOKENS
        if middle <= fitting.tokens or too_large_tokens - fitting.tokens <= resolution * fitting.tokens:
            break
        probes.append(probe(middle))
        if probes[-1].peak_bytes > budget_bytes:
            too_large_tokens = middle
        else:
            fitting = probes[-1]
    return Largest(fitting, limited_by, tuple(probes))


class MemoryProbe:
    """Sends one group of `point`, its completions made longer, and reads the peak; a context manager.

    A process keeps memory that it has needed once, so a request smaller than the one before gets a new teacher.
    """

    def __init__(self, model: Path, scratch: Path, point: Point, runner: asyncio.Runner) -> None:
        self._model, self._scratch, self._point, self._runner = model, scratch, point, runner
        self._stack = ExitStack()
        self._teacher: WatchedTeacher | None = None
        self._largest_tokens = 0
        self._rng = np.random.default_rng(0)

    def __enter__(self) -> MemoryProbe:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def __call__(self, tokens: int) -> Probe:
        """`tokens`: the context's and the completion's together."""
        point = replace(self._point, completion=tokens - self._point.context)
        teacher = self._teacher_for(tokens)
        rounds = self._runner.run(play(teacher.url, point, self._rng, 0))
        made = Probe(tokens, teacher.peak_bytes(), rounds.seconds)
        told = f"peak {made.peak_bytes / MEBIBYTE:.0f} MiB, {made.seconds:.1f} s"
        print(f"  {point.group} x {tokens} tokens: {told}", flush=True)
        return made

    def _teacher_for(self, tokens: int) -> WatchedTeacher:
        if self._teacher is None or tokens < self._largest_tokens:
            self._stack.close()
            self._teacher = self._stack.enter_context(watched_teacher(self._model, self._scratch / "memory.log"))
            self._teacher.forget_peak()  # of its start, which has weights of two types
        self._largest_tokens = tokens
        return self._teacher
