"""The HTTP transport: gRPC's calls under /v1, as JSON or as the same protobuf bytes. Nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from fastapi import FastAPI, Request
from google.protobuf.message import Message
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vopd_proto import teacher_pb2 as pb
from vopd_server.calls import Call, answering, get_info, get_tokenizer, score
from vopd_server.codec import parse
from vopd_server.concurrency import unread_timeout
from vopd_server.errors import (
    BodyTooLargeError,
    ClientGoneError,
    DeadlineError,
    MediaTypeError,
    TeacherError,
    UnauthenticatedError,
)
from vopd_server.http_errors import error_response, routing_error_response
from vopd_server.http_head import HeadResponse
from vopd_server.http_info import info_answer, tokenizer_answer
from vopd_server.http_json import parse_score_body, score_answer
from vopd_server.http_openapi import GET_HEAD, GET_INFO, GET_TOKENIZER, HEALTHZ, READYZ, SCORE, describe
from vopd_server.http_request import api_key_of, timeout_of, while_connected
from vopd_server.service import TeacherService
from vopd_server.version import SERVER_VERSION

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
Encoding = Literal["application/json", "application/x-protobuf"]
# JSON is for people. Its numbers become Python objects, which take ten times the bytes. Of a request it bounds the
# JSON itself, of an answer the protobuf that the JSON is made of.
MAX_JSON_BYTES = 16 * 2**20
# A client that is told of an error while it still sends may see a broken connection instead of the error.
LAST_WORDS_S = 0.5
PIECE_BYTES = 2**20


def make_http_app(service: TeacherService, *, body_timeout_s: float) -> FastAPI:
    """The ASGI application.

    body_timeout_s: in which a request's body must have arrived, and a client must have taken a piece of the head.
    """
    # No pages of documentation: they would load scripts from another site.
    app = FastAPI(title="vopd teacher", version=SERVER_VERSION, docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _routing_error)
    add_health(app, service)
    api = HttpApi(service, body_timeout_s=body_timeout_s)
    app.get("/v1/info", **GET_INFO)(api.get_info)
    app.get("/v1/tokenizer", **GET_TOKENIZER)(api.get_tokenizer)
    app.get("/v1/head", **GET_HEAD)(api.get_head)
    app.post("/v1/score", **SCORE)(api.score)
    describe(app)
    return app


def add_health(app: FastAPI, service: TeacherService) -> None:
    """/healthz: the process lives. /readyz: requests are answered."""

    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz() -> Response:
        return Response(f"{service.state}\n", 200 if service.state == "ready" else 503, media_type="text/plain")

    app.get("/healthz", **HEALTHZ)(healthz)
    app.get("/readyz", **READYZ)(readyz)


class HttpApi:
    """The methods of the service, by their paths."""

    def __init__(self, service: TeacherService, *, body_timeout_s: float) -> None:
        self._service = service
        self._body_timeout_s = body_timeout_s

    async def get_info(self, request: Request) -> Response:
        async def answer(call: Call) -> Response:
            info = get_info(self._service, call)
            return _packed(info) if _wants(request, default=JSON) == PROTOBUF else _json(info_answer(info))

        return await self._answer(request, "GetInfo", answer)

    async def get_tokenizer(self, request: Request) -> Response:
        async def answer(_call: Call) -> Response:
            table = get_tokenizer(self._service)
            return _packed(table) if _wants(request, default=JSON) == PROTOBUF else _json(tokenizer_answer(table))

        return await self._answer(request, "GetTokenizer", answer)

    async def get_head(self, _request: Request) -> Response:
        return HeadResponse(self._service, unread_timeout_s=self._body_timeout_s)

    async def score(self, request: Request) -> Response:
        async def answer(call: Call) -> Response:
            encoding = _encoding_of(request)
            limit = self._service.limits.max_message_bytes
            body = await self._read_body(request, min(limit, MAX_JSON_BYTES) if encoding == JSON else limit)
            self._service.metrics.bytes_moved(call.tenant.id, "http", "received", len(body))
            return await while_connected(request, self._score(call, body, encoding, _wants(request, default=encoding)))

        return await self._answer(request, "Score", answer)

    async def _score(self, call: Call, body: bytes, encoding: Encoding, wanted: Encoding) -> Response:
        if encoding == JSON:
            message = await asyncio.to_thread(parse_score_body, body)
        else:
            message = parse(pb.ScoreRequest, body)
        response = await score(self._service, call, message, max_json_bytes=MAX_JSON_BYTES if wanted == JSON else None)
        if wanted == JSON:
            return Response(await asyncio.to_thread(score_answer, message, response), media_type=JSON)
        return _packed(response)

    async def _answer(
        self, request: Request, method: str, answer: Callable[[Call], Coroutine[Any, Any, Response]]
    ) -> Response:
        """Around every call; its errors become their responses."""
        call = Call("http", method)
        try:
            api_key = api_key_of(request)
            async with answering(self._service, call, api_key=api_key, timeout_s=timeout_of(request)):
                response = await answer(call)
        except TeacherError as error:
            refusal = error_response(error, call.request_id)
            is_stranger = isinstance(error, UnauthenticatedError)  # of whom nothing is read
            if not is_stranger and not getattr(request.state, "has_arrived", False) and not await _hear_out(request):
                refusal.headers["Connection"] = "close"  # or the rest would be read and dropped as long as it comes
            return refusal
        self._service.metrics.bytes_moved(call.tenant.id, "http", "sent", len(response.body))
        return PiecedResponse(response, unread_timeout_s=self._body_timeout_s)

    async def _read_body(self, request: Request, max_bytes: int) -> bytes:
        """Raises: BodyTooLargeError, at once where the length is declared; DeadlineError for one that does not end."""
        declared = request.headers.get("content-length", "0")
        body = bytearray()
        num_bytes = int(declared) if declared.isdecimal() else 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                chunks = request.stream()
                while num_bytes <= max_bytes and (chunk := await anext(chunks, None)) is not None:
                    body += chunk
                    num_bytes = max(num_bytes, len(body))
        except TimeoutError as error:
            raise DeadlineError(f"the body did not arrive within {self._body_timeout_s:g} s") from error
        except ClientDisconnect as error:
            raise ClientGoneError("the client hung up in the middle of its body") from error
        if num_bytes > max_bytes:
            raise BodyTooLargeError("body", f"{num_bytes} bytes or more > {max_bytes}")
        request.state.has_arrived = True
        return bytes(body)


class PiecedResponse(Response):
    """An answer of which the client must take each piece in time: one that reads nothing holds a piece, not all."""

    def __init__(self, whole: Response, *, unread_timeout_s: float) -> None:
        super().__init__(whole.body, whole.status_code, media_type=whole.media_type)
        self._unread_timeout_s = unread_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for start in range(0, len(self.body) or 1, PIECE_BYTES):
                end = start + PIECE_BYTES
                async with unread_timeout(self._unread_timeout_s):
                    piece = {"body": bytes(self.body[start:end]), "more_body": end < len(self.body)}
                    await send({"type": "http.response.body", **piece})
        except DeadlineError:
            pass  # what is missing of its length tells the client


async def _hear_out(request: Request) -> bool:
    """Reads and drops what the client was about to send before it can hear of an error; whether that was all."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            while (await request.receive()).get("more_body"):
                pass
    except TimeoutError:
        return False
    return True


# ---------------------------------------------------------------- headers


def _encoding_of(request: Request) -> Encoding:
    """Raises: MediaTypeError for a content type, or an encoding on top of it, that is not spoken here."""
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise MediaTypeError("Content-Encoding", f"{coding!r}; bodies are not compressed")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == JSON:
        return "application/json"
    if media_type == PROTOBUF:
        return "application/x-protobuf"
    raise MediaTypeError("Content-Type", f"{media_type or 'none'!r}; send {JSON} or {PROTOBUF}")


def _wants(request: Request, *, default: str) -> Encoding:
    """What `Accept` names, where it names one of ours; both: the first."""
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    named = next((media_type for media_type in accepted if media_type in (JSON, PROTOBUF)), default)
    return "application/x-protobuf" if named == PROTOBUF else "application/json"


# ---------------------------------------------------------------- answers


def _packed(message: Message) -> Response:
    return Response(message.SerializeToString(), media_type=PROTOBUF)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type=JSON)


async def _routing_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return routing_error_response(error)
