"""The error tree as gRPC tells it: a code, and a google.rpc.Status with the field and the retry delay."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from vopd_proto import teacher_pb2 as pb
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

STATUS_CODES: dict[type[TeacherError], StatusCode] = {
    InvalidRequestError: StatusCode.INVALID_ARGUMENT,
    BodyTooLargeError: StatusCode.INVALID_ARGUMENT,
    UnknownModelError: StatusCode.NOT_FOUND,
    MediaTypeError: StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: StatusCode.PERMISSION_DENIED,
    OverloadedError: StatusCode.RESOURCE_EXHAUSTED,
    UnsupportedError: StatusCode.FAILED_PRECONDITION,
    DeadlineError: StatusCode.DEADLINE_EXCEEDED,
    ClientGoneError: StatusCode.CANCELLED,
    UnavailableError: StatusCode.UNAVAILABLE,
    EngineDeadError: StatusCode.UNAVAILABLE,
    EngineError: StatusCode.INTERNAL,
    ConfigError: StatusCode.INTERNAL,
    TeacherError: StatusCode.INTERNAL,
}
STATUS_METADATA_KEY = "grpc-status-details-bin"
# Trailing metadata travels in headers, of which gRPC takes 8 KiB; the message is in them twice.
MAX_MESSAGE_LENGTH = 1024


def status_code(error: TeacherError) -> StatusCode:
    """The code of the nearest class that the table holds."""
    return next(STATUS_CODES[cls] for cls in type(error).__mro__ if cls in STATUS_CODES)


def error_message(error: TeacherError) -> str:
    return str(error)[:MAX_MESSAGE_LENGTH]


def status_metadata(error: TeacherError, request_id: str) -> tuple[str, bytes]:
    """The google.rpc.Status of `error`, as trailing metadata."""
    status = status_pb2.Status(code=status_code(error).value[0], message=error_message(error))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error_message(error))
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_delay_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    return STATUS_METADATA_KEY, status.SerializeToString()


def score_failure(sequence_id: str, error: TeacherError) -> pb.ScoreFailure:
    """The same, for one sequence of a stream that goes on."""
    return pb.ScoreFailure(
        sequence_id=sequence_id,
        code=status_code(error).value[0],
        message=error_message(error),
        field=error.field,
        retry_delay_s=error.retry_delay_s or 0.0,
    )
