"""What an HTTP answer means: a message, a teacher's own error, or what a gateway has to say. Pure.

A teacher's error is JSON and names gRPC's status; any other answer's HTTP status says the class.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from vopd_client.teacher.status import Failure
from vopd_client.teacher.transport import CallFailed

PROTOBUF = "application/x-protobuf"
OCTETS = "application/octet-stream"

CODE_OF_STATUS: dict[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.UNAVAILABLE,  # some gateways say so of an idle connection that was just used again
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,  # a gateway that cannot reach its teacher; a teacher's own has a body
}
# What anybody on the way to a teacher may answer in its place.
GATEWAY_STATUSES = frozenset({401, 403, 408, 429, 500, 502, 503, 504})

SHOWN_BYTES = 80

AnyMessage = TypeVar("AnyMessage", bound=Message)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One whole answer. Headers that it did not have are empty."""

    status: int
    body: bytes
    content_type: str = ""
    retry_after: str = ""
    location: str = ""

    @property
    def is_protobuf(self) -> bool:
        return self.status == HTTPStatus.OK and _media_type(self.content_type) == PROTOBUF

    @property
    def is_octets(self) -> bool:
        return self.status == HTTPStatus.OK and _media_type(self.content_type) == OCTETS

    @property
    def may_be_a_teachers(self) -> bool:
        """Whether a teacher, or a gateway in front of one, answers like this to a path that teachers have."""
        error = _teachers_error(self.body)
        if error is not None:
            return error.code is not grpc.StatusCode.NOT_FOUND
        return self.is_protobuf or self.status in GATEWAY_STATUSES

    @property
    def summary(self) -> str:
        """`HTTP 404 Not Found, text/html`, with the target of a redirect and the start of a plain text."""
        try:
            phrase = HTTPStatus(self.status).phrase
        except ValueError:
            phrase = ""
        media_type = _media_type(self.content_type)
        told = [f"HTTP {self.status} {phrase}".strip(), media_type, self.location and f"to {self.location}"]
        if media_type == "text/plain" and self.body:
            told.append(repr(self.body[:SHOWN_BYTES].decode("utf-8", "replace").strip()))
        return ", ".join(part for part in told if part)

    def message(self, message_type: type[AnyMessage], *, now: datetime | None = None) -> AnyMessage:
        """The protobuf message in the body. Raises: CallFailed for every other answer."""
        if not self.is_protobuf:
            raise CallFailed(self.failure(now=now))
        try:
            return message_type.FromString(self.body)
        except DecodeError as error:
            broken = f"{len(self.body)} bytes that are no {message_type.DESCRIPTOR.name}: {error}"
            raise CallFailed(Failure(grpc.StatusCode.INTERNAL, broken)) from error

    def failure(self, *, now: datetime | None = None) -> Failure:
        """Why there is no message. `now` is what a date in Retry-After is compared with."""
        retry_delay_s = retry_after_s(self.retry_after, now or datetime.now(UTC))
        error = _teachers_error(self.body)
        if error is not None:
            return Failure(error.code, error.message, error.retry_delay_s or retry_delay_s)
        code = CODE_OF_STATUS.get(self.status, grpc.StatusCode.UNKNOWN)
        return Failure(code, self.summary, retry_delay_s)


def retry_after_s(value: str, now: datetime) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; None: it names no time to come.

    Source: RFC 9110, 10.2.3.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        # "-0000", which a header may not hold, gives a date without a zone.
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _teachers_error(body: bytes) -> Failure | None:
    """What a teacher says in an error's body; None: this is no teacher's.

    Others write `{"error": {…}}` too, with codes of their own.
    """
    try:
        error = json.loads(body)["error"]
        code = grpc.StatusCode.__members__.get(error["code"])
        message, field, delay_s = error["message"], error.get("field") or "", error.get("retry_delay_s")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    if code is None or not isinstance(message, str) or not isinstance(field, str):
        return None
    if field not in message:
        message = f"{field}: {message}"
    has_delay = type(delay_s) in (int, float) and math.isfinite(delay_s) and delay_s > 0
    return Failure(code, message, float(delay_s) if has_delay else None)
