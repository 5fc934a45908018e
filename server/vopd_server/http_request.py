"""What every HTTP call asks of its request: how long the caller waits, and whether it is still there."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from vopd_server.calls import bearer_token
from vopd_server.errors import ClientGoneError, InvalidRequestError

Answered = TypeVar("Answered")


def timeout_of(request: Request) -> float | None:
    """Seconds until the caller's deadline; None: it has none.

    Raises: InvalidRequestError for a Request-Timeout that is no number of seconds.
    """
    told = request.headers.get("request-timeout")
    if told is None:
        return None
    try:
        seconds = float(told)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds <= 0:
        raise InvalidRequestError("Request-Timeout", f"{told!r}; it must be a number of seconds above 0")
    return seconds


def api_key_of(request: Request) -> str | None:
    """The bearer token of its Authorization header; None: it has no such header."""
    authorization = request.headers.get("authorization")
    return None if authorization is None else bearer_token(authorization)


async def while_connected(request: Request, work: Coroutine[Any, Any, Answered]) -> Answered:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises: ClientGoneError, and what `work` raises.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError("the client hung up")
        return working.result()
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    """Returns when the client has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
