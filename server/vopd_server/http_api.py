"""The HTTP transport: gRPC's calls under /v1, as JSON or as the same protobuf bytes. Nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from fastapi import FastAPI, Request
from google.protobuf.message import Message
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vopd_proto import teacher_pb2 as pb
from vopd_server.calls import Call, get_info, get_tokenizer, score
from vopd_server.codec import parse
from vopd_server.compat.openapi import COMPAT_BODIES
from vopd_server.compat.routes import add_compat
from vopd_server.errors import MediaTypeError
from vopd_server.http_call import Answer, CallResponse, whole_answer
from vopd_server.http_errors import routing_error_response
from vopd_server.http_head import head_answer
from vopd_server.http_info import info_answer, tokenizer_answer
from vopd_server.http_json import ScoreBody, parse_score_body, score_answer
from vopd_server.http_openapi import GET_HEAD, GET_INFO, GET_TOKENIZER, HEALTHZ, READYZ, SCORE, describe
from vopd_server.http_request import JSON, MAX_JSON_BYTES, media_type_of, read_body, while_connected
from vopd_server.service import TeacherService
from vopd_server.version import SERVER_VERSION

PROTOBUF = "application/x-protobuf"
Encoding = Literal["application/json", "application/x-protobuf"]


def make_http_app(service: TeacherService, *, body_timeout_s: float) -> FastAPI:
    """The ASGI application.

    body_timeout_s: in which a request's body must have arrived, and a client must have taken a piece of the head.
    """
    # No pages of documentation: they would load scripts from another site.
    app = FastAPI(title="vopd teacher", version=SERVER_VERSION, docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _routing_error)
    add_health(app, lambda: service.state)
    api = HttpApi(service, body_timeout_s=body_timeout_s)
    app.get("/v1/info", **GET_INFO)(api.get_info)
    app.get("/v1/tokenizer", **GET_TOKENIZER)(api.get_tokenizer)
    app.get("/v1/head", **GET_HEAD)(api.get_head)
    app.post("/v1/score", **SCORE)(api.score)
    add_compat(app, service, body_timeout_s=body_timeout_s)
    describe(app, ScoreBody, *COMPAT_BODIES)
    return app


def add_health(app: FastAPI, state: Callable[[], str]) -> None:
    """/healthz: the process lives. /readyz: requests are answered. state: as `TeacherService.state`."""

    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz() -> Response:
        return Response(f"{state()}\n", 200 if state() == "ready" else 503, media_type="text/plain")

    app.get("/healthz", **HEALTHZ)(healthz)
    app.get("/readyz", **READYZ)(readyz)


class HttpApi:
    """The methods of the service, by their paths."""

    def __init__(self, service: TeacherService, *, body_timeout_s: float) -> None:
        self._service = service
        self._body_timeout_s = body_timeout_s

    async def get_info(self, _request: Request) -> Response:
        async def answer(request: Request, call: Call) -> Answer:
            info = get_info(self._service, call)
            return _packed(info) if _wants(request, default=JSON) == PROTOBUF else _json(info_answer(info))

        return self._respond("GetInfo", answer)

    async def get_tokenizer(self, _request: Request) -> Response:
        async def answer(request: Request, _call: Call) -> Answer:
            table = get_tokenizer(self._service)
            return _packed(table) if _wants(request, default=JSON) == PROTOBUF else _json(tokenizer_answer(table))

        return self._respond("GetTokenizer", answer)

    async def get_head(self, _request: Request) -> Response:
        async def answer(request: Request, _call: Call) -> Answer:
            return head_answer(request, self._service.head_file)

        return self._respond("GetHead", answer)

    async def score(self, _request: Request) -> Response:
        async def answer(request: Request, call: Call) -> Answer:
            encoding = _encoding_of(request)
            limit = self._service.limits.max_message_bytes
            max_bytes = min(limit, MAX_JSON_BYTES) if encoding == JSON else limit
            body = await read_body(request, max_bytes, timeout_s=self._body_timeout_s)
            self._service.metrics.bytes_moved(call.tenant.id, "http", "received", len(body))
            return await while_connected(request, self._score(call, body, encoding, _wants(request, default=encoding)))

        return self._respond("Score", answer)

    async def _score(self, call: Call, body: bytes, encoding: Encoding, wanted: Encoding) -> Answer:
        if encoding == JSON:
            message = await asyncio.to_thread(parse_score_body, body)
        else:
            message = parse(pb.ScoreRequest, body)
        response = await score(self._service, call, message, max_json_bytes=MAX_JSON_BYTES if wanted == JSON else None)
        if wanted == JSON:
            return whole_answer(await asyncio.to_thread(score_answer, message, response), JSON)
        return _packed(response)

    def _respond(self, method: str, answer: Callable[[Request, Call], Awaitable[Answer]]) -> CallResponse:
        return CallResponse(self._service, method, answer, unread_timeout_s=self._body_timeout_s)


# ---------------------------------------------------------------- headers


def _encoding_of(request: Request) -> Encoding:
    """Raises: MediaTypeError for a content type, or an encoding on top of it, that is not spoken here."""
    media_type = media_type_of(request)
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


def _packed(message: Message) -> Answer:
    return whole_answer(message.SerializeToString(), PROTOBUF)


def _json(answer: BaseModel) -> Answer:
    return whole_answer(answer.model_dump_json().encode(), JSON)


async def _routing_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return routing_error_response(error)
