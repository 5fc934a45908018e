"""What /openapi.json says of the HTTP API beyond what FastAPI sees: bodies are read by hand, within a limit."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from vopd_server.http_errors import ErrorBody
from vopd_server.http_info import InfoAnswer, TokenizerAnswer
from vopd_server.http_json import ScoreAnswer

_PROTOBUF = {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}}
TEXT = {"text/plain": {"schema": {"type": "string"}}}
TIMEOUT = {
    "name": "Request-Timeout",
    "in": "header",
    "required": False,
    "description": "Seconds after which the caller waits no longer; the call is cancelled then.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


def errors(**statuses: str) -> dict[int | str, dict[str, Any]]:
    """`_422="…"` for every status that may be answered with an ErrorBody."""
    return {int(status.lstrip("_")): {"model": ErrorBody, "description": about} for status, about in statuses.items()}


ANY_CALL = {
    "_401": "No API key, or one that is not valid.",
    "_422": "The request can never be answered; `field` names what is wrong.",
    "_429": "Too many calls of this tenant, or over its queue bound; try again after `retry_delay_s`.",
    "_500": "The teacher failed; its log tells more under the request id.",
    "_503": "Loading, or shutting down; another try may be answered after `retry_delay_s`.",
    "_504": "The deadline in Request-Timeout passed.",
}

GET_INFO: dict[str, Any] = {
    "operation_id": "GetInfo",
    "summary": "What this teacher is and what it can do.",
    "response_model": InfoAnswer,
    "responses": {200: {"content": _PROTOBUF, "description": "Ready."}, **errors(**ANY_CALL)},
    "openapi_extra": {"parameters": [TIMEOUT]},
}
GET_TOKENIZER: dict[str, Any] = {
    "operation_id": "GetTokenizer",
    "summary": "The whole id -> token table, and the tokenizer itself where it serialises.",
    "response_model": TokenizerAnswer,
    "responses": {200: {"content": _PROTOBUF, "description": "The table."}, **errors(**ANY_CALL)},
    "openapi_extra": {"parameters": [TIMEOUT]},
}
GET_HEAD: dict[str, Any] = {
    "operation_id": "GetHead",
    "summary": "The output head that finishes hidden states, as a safetensors file; see teacher.proto.",
    "response_class": Response,
    "responses": {
        200: {
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            "description": "The file.",
            "headers": {
                "ETag": {
                    "description": "The file's SHA-256 in quotes: head_sha256 of /v1/info.",
                    "required": True,
                    "schema": {"type": "string"},
                }
            },
        },
        304: {"description": "The file is the one that If-None-Match names."},
        **errors(_409="This teacher does not give its head away; the message names what it can.", **ANY_CALL),
    },
    "openapi_extra": {
        "parameters": [
            TIMEOUT,
            {
                "name": "If-None-Match",
                "in": "header",
                "required": False,
                "description": "The ETag of the file that the client has.",
                "schema": {"type": "string"},
            },
        ]
    },
}
SCORE: dict[str, Any] = {
    "operation_id": "Score",
    "summary": "Scores a small batch of completions; one answer, in the order of the request, all or nothing.",
    "response_model": ScoreAnswer,
    "responses": {
        200: {"content": _PROTOBUF, "description": "The scores."},
        **errors(
            _409="This engine cannot do it; the message names what it can.",
            _413="The body has too many bytes.",
            _415="The body is neither JSON nor protobuf.",
            **ANY_CALL,
        ),
    },
    "openapi_extra": {
        "parameters": [TIMEOUT],
        "requestBody": {
            "required": True,
            "description": "The same message either way; see teacher.proto for the protobuf one.",
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/ScoreBody"}},
                **_PROTOBUF,
            },
        },
    },
}
HEALTHZ: dict[str, Any] = {
    "summary": "The process lives.",
    "response_model": None,
    "responses": {200: {"content": TEXT, "description": "It does."}},
}
READYZ: dict[str, Any] = {
    "summary": "Requests are answered.",
    "response_model": None,
    "responses": {
        200: {"content": TEXT, "description": "They are."},
        503: {"content": TEXT, "description": "The state that the teacher is in instead."},
    },
}


def describe(app: FastAPI, *bodies: type[BaseModel]) -> None:
    """Puts the schemas of request bodies where the routes refer to them."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for body_type in bodies:
                body = body_type.model_json_schema(ref_template="#/components/schemas/{model}")
                definitions = body.pop("$defs", {})
                schema["components"]["schemas"].update({body_type.__name__: body, **definitions})
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
