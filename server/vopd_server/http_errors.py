"""The error tree as HTTP tells it: a status, Retry-After, and one JSON body; the codes are gRPC's."""

from __future__ import annotations

import json
import math

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vopd_server.errors import (
    BodyTooLargeError,
    ClientGoneError,
    ConfigError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    MediaTypeError,
    OverloadedError,
    PermissionDeniedError,
    TeacherError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
    UnsupportedError,
)
from vopd_server.grpc_errors import error_message, status_code

HTTP_STATUSES: dict[type[TeacherError], int] = {
    InvalidRequestError: 422,
    BodyTooLargeError: 413,
    UnknownModelError: 404,
    MediaTypeError: 415,
    UnauthenticatedError: 401,
    PermissionDeniedError: 403,
    OverloadedError: 429,
    UnsupportedError: 409,
    DeadlineError: 504,
    ClientGoneError: 499,  # as nginx logs it
    UnavailableError: 503,
    EngineDeadError: 503,
    EngineError: 500,
    ConfigError: 500,
    TeacherError: 500,
}
# What the framework answers by itself, before any of our code runs.
ROUTING_CODES = {404: "NOT_FOUND", 405: "UNIMPLEMENTED"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="The gRPC status of the same error.")
    message: str
    field: str = Field(description="The part of the request that is wrong; empty where it is not about one.")
    retry_delay_s: float | None = Field(description="Seconds after which another try may be answered.")
    request_id: str = Field(description="Finds the call in the teacher's log; empty where none was assigned.")


class ErrorBody(BaseModel):
    """Every answer that is not 200, whatever the request's content type."""

    error: ErrorDetail


def http_status(error: TeacherError) -> int:
    """The status of the nearest class that the table holds."""
    return next(HTTP_STATUSES[cls] for cls in type(error).__mro__ if cls in HTTP_STATUSES)


def error_response(error: TeacherError, request_id: str = "") -> Response:
    """Retry-After is in whole seconds, so rounded up; the body has the delay as it is."""
    detail = ErrorDetail(
        code=status_code(error).name,
        message=error_message(error),
        field=error.field,
        retry_delay_s=error.retry_delay_s,
        request_id=request_id,
    )
    headers = {} if error.retry_delay_s is None else {"Retry-After": str(math.ceil(error.retry_delay_s))}
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    return _response(http_status(error), detail, headers)


def routing_error_response(error: HTTPException) -> Response:
    """An unknown path, another method."""
    detail = ErrorDetail(
        code=ROUTING_CODES.get(error.status_code, "UNKNOWN"),
        message=error.detail,
        field="",
        retry_delay_s=None,
        request_id="",
    )
    return _response(error.status_code, detail, dict(error.headers or {}))


def _response(status: int, detail: ErrorDetail, headers: dict[str, str]) -> Response:
    body = json.dumps(ErrorBody(error=detail).model_dump(), ensure_ascii=False)
    return Response(body, status, headers, media_type="application/json")
