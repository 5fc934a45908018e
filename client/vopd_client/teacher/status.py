"""What went wrong with a call, from gRPC's status to this package's error tree."""

from __future__ import annotations

import re
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from vopd_client.errors import (
    TeacherError,
    TeacherInternalError,
    TeacherPermissionError,
    TeacherRequestError,
    TeacherUnavailableError,
    TeacherUnsupportedError,
)
from vopd_proto import teacher_pb2 as pb

RETRYABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})

ERROR_OF_CODE: dict[grpc.StatusCode, type[TeacherError]] = {
    grpc.StatusCode.OK: TeacherInternalError,  # an error that calls itself OK
    grpc.StatusCode.CANCELLED: TeacherUnavailableError,
    grpc.StatusCode.UNKNOWN: TeacherInternalError,
    grpc.StatusCode.INVALID_ARGUMENT: TeacherRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TeacherUnavailableError,
    grpc.StatusCode.NOT_FOUND: TeacherRequestError,
    grpc.StatusCode.ALREADY_EXISTS: TeacherRequestError,
    grpc.StatusCode.PERMISSION_DENIED: TeacherPermissionError,
    grpc.StatusCode.UNAUTHENTICATED: TeacherPermissionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TeacherUnavailableError,
    grpc.StatusCode.FAILED_PRECONDITION: TeacherUnsupportedError,
    grpc.StatusCode.ABORTED: TeacherInternalError,
    grpc.StatusCode.OUT_OF_RANGE: TeacherRequestError,
    grpc.StatusCode.UNIMPLEMENTED: TeacherUnsupportedError,
    grpc.StatusCode.INTERNAL: TeacherInternalError,
    grpc.StatusCode.UNAVAILABLE: TeacherUnavailableError,
    grpc.StatusCode.DATA_LOSS: TeacherInternalError,
}

# "UNKNOWN: ipv4:127.0.0.1:50051: Failed to connect to remote host: connect: Connection refused (111)"
_CONNECTION_PREFIX = re.compile(r"^[A-Z]+: ipv[46]:\S+: (Failed to connect to remote host: )?(connect: )?")

# What grpc.aio makes of a write to a call that has just ended, in the place of the status it ended with. Trying
# again meets that status itself if it is there to stay. A teacher's own INTERNAL has words of its own.
_WRITE_FAILED = "Internal error from Core"

_CODE_OF_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call or a sequence was not answered.

    retry_delay_s: how long the teacher asked to be left alone; None when it did not say.
    """

    code: grpc.StatusCode
    message: str
    retry_delay_s: float | None = None

    @property
    def is_too_large(self) -> bool:
        """gRPC's own refusal of a message, under the code it shares with a full queue: waiting does not help.

        Requests are measured before they are sent, so this is an answer beyond our limit, or a teacher
        behind something with a smaller one.
        """
        return self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in self.message

    @property
    def is_retryable(self) -> bool:
        return self.code in RETRYABLE and not self.is_too_large

    @property
    def reason(self) -> str:
        """The message for a line on the screen: gRPC's chain of wrappers cut down to its cause."""
        cause = self.message.split("\n", 1)[0].rsplit("last error: ", 1)[-1]
        cause = _CONNECTION_PREFIX.sub("", cause).strip()
        if cause.startswith("Connection refused"):
            cause = "connection refused"
        cause = cause or self.code.name.lower().replace("_", " ")
        return cause if len(cause) <= 120 else cause[:119] + "…"

    def to_error(self) -> TeacherError:
        if self.is_too_large:
            return TeacherRequestError(f"{self.message}: ask for a smaller support or shorter completions")
        return ERROR_OF_CODE[self.code](f"teacher answered {self.code.name}: {self.message}")


def failure_of_call(error: grpc.aio.AioRpcError) -> Failure:
    """The failure of a whole call, with the delay in its google.rpc.RetryInfo where it has one."""
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _WRITE_FAILED:
        return Failure(grpc.StatusCode.UNAVAILABLE, "the connection broke while it was written to")
    return Failure(error.code(), error.details() or "", _retry_delay_s(error))


def failure_of_sequence(failure: pb.ScoreFailure) -> Failure:
    """The failure of one sequence of a stream; a code that gRPC does not know counts as UNKNOWN."""
    code = _CODE_OF_NUMBER.get(failure.code, grpc.StatusCode.UNKNOWN)
    message = failure.message
    if failure.field and failure.field not in message:
        message = f"{failure.field}: {message}"
    return Failure(code, message, failure.retry_delay_s or None)


def _retry_delay_s(error: grpc.aio.AioRpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            return None  # a proxy's own details: the code alone decides
        for detail in status.details:
            retry_info = error_details_pb2.RetryInfo()
            if detail.Is(retry_info.DESCRIPTOR) and detail.Unpack(retry_info):
                return float(retry_info.retry_delay.seconds) + float(retry_info.retry_delay.nanos) / 1e9
    return None
