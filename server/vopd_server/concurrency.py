"""Small patterns that asyncio spells at length."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vopd_server.errors import DeadlineError


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup whose first failure cancels the rest and is raised itself, not wrapped in a group of one."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


@asynccontextmanager
async def deadline(seconds: float | None) -> AsyncIterator[None]:
    """Cancels what runs inside after `seconds` (None: never). Raises: DeadlineError."""
    if seconds is not None and seconds <= 0:
        raise DeadlineError("the caller's deadline had passed before the call began")
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineError(f"the caller's deadline passed after {seconds:.3g} s") from error


@asynccontextmanager
async def unread_timeout(seconds: float) -> AsyncIterator[None]:
    """Around sending a part of an answer, which waits for the client to read. Raises: DeadlineError."""
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineError(f"an answer was left unread for {seconds:g} s (answer_timeout_s)") from error
