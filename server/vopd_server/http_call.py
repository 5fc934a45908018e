"""One call over HTTP, from its headers to the last byte of its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vopd_server.calls import Call, answering
from vopd_server.concurrency import unread_timeout
from vopd_server.errors import TeacherError, UnauthenticatedError
from vopd_server.http_bodies import hear_out
from vopd_server.http_errors import error_response
from vopd_server.http_request import api_key_of, timeout_of, while_connected
from vopd_server.service import TeacherService

PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Answer:
    """pieces: the body, `num_bytes` of it together."""

    pieces: AsyncIterator[bytes]
    num_bytes: int
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200


def whole_answer(body: bytes, media_type: str) -> Answer:
    """Of a body that is there already."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), PIECE_BYTES):
            yield body[start : start + PIECE_BYTES]

    return Answer(pieces(), len(body), {"Content-Type": media_type})


class CallResponse(Response):
    """Makes its answer while it is sent, so that the call lasts until the last byte: for draining, for its tenant's
    number of calls, and for the log.

    answer: raises TeacherError. unread_timeout_s: in which the client must take each piece, so that one that reads
    nothing holds a piece, not all.
    """

    def __init__(
        self,
        service: TeacherService,
        method: str,
        answer: Callable[[Request, Call], Awaitable[Answer]],
        *,
        unread_timeout_s: float,
    ) -> None:
        super().__init__()
        self._service = service
        self._method = method
        self._answer = answer
        self._unread_timeout_s = unread_timeout_s
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        call = Call("http", self._method)
        try:
            api_key = api_key_of(request)
            async with answering(self._service, call, api_key=api_key, timeout_s=timeout_of(request)):
                answer = await self._answer(request, call)
                await while_connected(request, self._send(answer, call, send))
        except TeacherError as error:
            if self._has_begun:
                return  # what is missing of its length tells the client
            if not isinstance(error, UnauthenticatedError):  # nothing is read of a stranger
                await hear_out(request)
            await error_response(error, call.request_id)(scope, receive, send)

    async def _send(self, answer: Answer, call: Call, send: Send) -> None:
        headers = dict(answer.headers)
        if answer.status != 304:
            headers["Content-Length"] = str(answer.num_bytes)
        raw_headers = Response(status_code=answer.status, headers=headers).raw_headers
        start = {"type": "http.response.start", "status": answer.status, "headers": raw_headers}
        left = answer.num_bytes
        async for piece in answer.pieces:
            await self._begin(start, send)  # with the first piece in hand: one that cannot be made has its error
            left -= len(piece)
            async with unread_timeout(self._unread_timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
            self._service.metrics.bytes_moved(call.tenant.id, "http", "sent", len(piece))
        if not self._has_begun:
            await self._begin(start, send)
            await send({"type": "http.response.body", "body": b""})

    async def _begin(self, start: dict[str, object], send: Send) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send(start)
