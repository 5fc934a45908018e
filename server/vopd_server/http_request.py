"""What every HTTP call takes from its request: key, body, deadline, and whether the client is still there."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from vopd_server.calls import bearer_token
from vopd_server.errors import (
    BodyTooLargeError,
    ClientGoneError,
    DeadlineError,
    InvalidRequestError,
    MediaTypeError,
)

Answered = TypeVar("Answered")

JSON = "application/json"
# JSON is for people. Its numbers become Python objects, which take ten times the bytes. Of a request it bounds the
# JSON itself, of an answer the protobuf that the JSON is made of.
MAX_JSON_BYTES = 16 * 2**20


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
    """The bearer token of its Authorization header, or the password of a Basic one; None: it has no such header.

    A client that can be told a URL and nothing else sends the password in it: `https://job:KEY@teacher:8080`.
    """
    authorization = request.headers.get("authorization")
    if authorization is None:
        return None
    scheme, _, credentials = authorization.partition(" ")
    return _password(credentials) if scheme.lower() == "basic" else bearer_token(authorization)


def _password(credentials: str) -> str:
    """Of `user:password` in base64, or the user of `user:`; what is not that is no key."""
    try:
        user, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        return ""
    return password or user


def media_type_of(request: Request) -> str:
    """What its Content-Type says the body is; "" where it has none.

    Raises: MediaTypeError for an encoding on top of it.
    """
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise MediaTypeError("Content-Encoding", f"{coding!r}; bodies are not compressed")
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, max_bytes: int, *, timeout_s: float) -> bytes:
    """Raises: BodyTooLargeError, at once where the length is declared; DeadlineError for one that does not end."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    num_bytes = int(declared) if declared.isdecimal() else 0
    try:
        async with asyncio.timeout(timeout_s):
            chunks = request.stream()
            while num_bytes <= max_bytes and (chunk := await anext(chunks, None)) is not None:
                body += chunk
                num_bytes = max(num_bytes, len(body))
    except TimeoutError as error:
        raise DeadlineError(f"the body did not arrive within {timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise ClientGoneError("the client hung up in the middle of its body") from error
    if num_bytes > max_bytes:
        raise BodyTooLargeError("body", f"{num_bytes} bytes or more > {max_bytes}")
    return bytes(body)


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
