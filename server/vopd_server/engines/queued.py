"""A request that waits for its forward, and how those that cannot have theirs are told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from vopd_server.engines.batching import Shape
from vopd_server.errors import EngineError, UnavailableError
from vopd_server.types import ScoreRequest, Scores


@dataclass(frozen=True, slots=True, eq=False)
class Queued:
    """`number` is of arrival; `queued_at_s` on the clock of time.perf_counter."""

    number: int
    request: ScoreRequest
    shape: Shape
    answer: asyncio.Future[Scores]
    queued_at_s: float


def fail(entries: Iterable[Queued], error: BaseException) -> None:
    """Every caller gets an exception of its own: one shared would collect all their tracebacks."""
    for entry in entries:
        if entry.answer.done():
            continue
        if isinstance(error, UnavailableError):
            entry.answer.set_exception(UnavailableError(str(error)))
        else:
            entry.answer.set_exception(_engine_error(error))


def _engine_error(error: BaseException) -> EngineError:
    engine_error = EngineError(f"the model failed: {type(error).__name__}: {error}")
    engine_error.__cause__ = error
    return engine_error
