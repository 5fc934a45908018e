"""Small patterns that asyncio spells at length."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NoReturn, TypeVar

from vopd_server.errors import DeadlineError

Result = TypeVar("Result")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup whose first failure cancels the rest and is raised itself, not wrapped in a group of one."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def first_done(*awaitables: Coroutine[Any, Any, Result]) -> Result:
    """The result of the first that ends; the others are cancelled."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def raise_result(awaitable: Awaitable[BaseException]) -> NoReturn:
    """For what waits for bad news: raises it."""
    raise await awaitable


def deadline(seconds: float | None) -> AbstractAsyncContextManager[None]:
    """Cancels what runs inside after `seconds` (None: never). Raises: DeadlineError."""
    if seconds is not None and seconds <= 0:
        raise DeadlineError("the caller's deadline had passed before the call began")
    return _time_limit(seconds, f"the caller's deadline passed after {seconds or 0:.3g} s")


def unread_timeout(seconds: float) -> AbstractAsyncContextManager[None]:
    """Around sending a part of an answer, which waits for the client to read. Raises: DeadlineError."""
    return _time_limit(seconds, f"an answer was left unread for {seconds:g} s (answer_timeout_s)")


def unsent_timeout(seconds: float) -> AbstractAsyncContextManager[None]:
    """Around reading a request, which waits for the client to send it. Raises: DeadlineError."""
    return _time_limit(seconds, f"the request did not arrive within {seconds:g} s (answer_timeout_s)")


@asynccontextmanager
async def _time_limit(seconds: float | None, message: str) -> AsyncIterator[None]:
    """Raises: DeadlineError with the message once the time is up; a TimeoutError from within passes through."""
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineError(message) from error
