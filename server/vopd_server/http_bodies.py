"""Bodies that nobody wants: a client may send on for as long as it likes, and the server need not listen."""

from __future__ import annotations

import asyncio
from typing import cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A client that is told of an error while it still sends may see a broken connection instead of the error.
LAST_WORDS_S = 0.5
_HAS_ENDED = "body_has_ended"  # in the scope's state


class UnreadBodies:
    """Around an ASGI application: an answer before the body's end closes the connection.

    Otherwise the rest would be read, and dropped, for as long as it comes: of a request that was refused, of one to a
    path that does not exist, and of a GET.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state[_HAS_ENDED] = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

        async def receive_noting_the_end() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                state[_HAS_ENDED] = True
            return message

        async def send_noting_what_is_unread(message: Message) -> None:
            if message["type"] == "http.response.start" and not state[_HAS_ENDED]:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, receive_noting_the_end, send_noting_what_is_unread)


async def hear_out(request: Request) -> None:
    """Reads and drops what the client was about to send before it can hear of an error, for LAST_WORDS_S at most."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            while not cast(bool, request.scope["state"][_HAS_ENDED]):
                if (await request.receive())["type"] == "http.disconnect":
                    return
    except TimeoutError:
        pass
