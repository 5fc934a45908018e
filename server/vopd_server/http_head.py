"""GET /v1/head: the file of the output head, gigabytes of it, sent as it is read."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vopd_server.calls import Call, answering, head_pieces
from vopd_server.concurrency import unread_timeout
from vopd_server.errors import TeacherError
from vopd_server.http_errors import error_response
from vopd_server.http_request import api_key_of, timeout_of, while_connected
from vopd_server.service import TeacherService
from vopd_server.types import HeadFile

OCTET_STREAM = "application/octet-stream"


class HeadResponse(Response):
    """Makes its answer while it is sent, so that the call lasts until the last byte, for draining and for the log.

    unread_timeout_s: in which the client must take each piece.
    """

    def __init__(self, service: TeacherService, *, unread_timeout_s: float) -> None:
        super().__init__()
        self._service = service
        self._unread_timeout_s = unread_timeout_s
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        call = Call("http", "GetHead")
        try:
            api_key = api_key_of(request)
            async with answering(self._service, call, api_key=api_key, timeout_s=timeout_of(request)):
                head = self._service.head_file
                if is_held(request, head):
                    await Response(status_code=304, headers={"ETag": etag(head)})(scope, receive, send)
                else:
                    await while_connected(request, self._send(head, call.tenant.id, send))
        except TeacherError as error:
            # Of an answer that has begun, what is missing of its length tells the client.
            if not self._has_begun:
                await error_response(error, call.request_id)(scope, receive, send)

    async def _send(self, head: HeadFile, tenant_id: str, send: Send) -> None:
        headers = {"Content-Type": OCTET_STREAM, "Content-Length": str(head.num_bytes), "ETag": etag(head)}
        left = head.num_bytes
        async for piece in head_pieces(head):
            if not self._has_begun:  # with the first piece in hand: a file that cannot be read has its error
                self._has_begun = True
                await send(
                    {"type": "http.response.start", "status": 200, "headers": Response(headers=headers).raw_headers}
                )
            left -= len(piece)
            async with unread_timeout(self._unread_timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
            self._service.metrics.bytes_moved(tenant_id, "http", "sent", len(piece))


def etag(head: HeadFile) -> str:
    return f'"{head.sha256}"'


def is_held(request: Request, head: HeadFile) -> bool:
    """Whether If-None-Match says that the client has this very file."""
    told = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return "*" in told or etag(head) in told
