"""What went wrong with a call: gRPC's codes, whatever the transport, and this package's error tree."""

from __future__ import annotations

import re
from dataclasses import dataclass

import grpc

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

# What gRPC says at length of a connection that cannot be made.
_IN_OTHER_WORDS = {
    "Connection refused": "connection refused",
    "http1.x server": "HTTP/1.1 is spoken there, not gRPC: write http://",
    "WRONG_VERSION_NUMBER": "Tls handshake failed: no TLS is spoken there; grpc:// and http:// are without",
    "CERTIFICATE_VERIFY_FAILED": "Tls handshake failed: certificate not trusted; tls_ca_file names its authority",
    "missing selected ALPN": "TLS is spoken there, but not gRPC: write https://",
}

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
        """A transport's own refusal of a message, under the code it shares with a full queue: waiting does not help.

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
        cause = next((words for sign, words in _IN_OTHER_WORDS.items() if sign in cause), cause)
        cause = cause or self.code.name.lower().replace("_", " ")
        return cause if len(cause) <= 120 else cause[:119] + "…"

    def to_error(self) -> TeacherError:
        if self.is_too_large:
            return TeacherRequestError(f"{self.message}: ask for a smaller support or shorter completions")
        return ERROR_OF_CODE[self.code](f"teacher answered {self.code.name}: {self.message}")

    def to_message(self, sequence_id: str) -> pb.ScoreFailure:
        """The same as the failure of one sequence of a stream."""
        number: int = self.code.value[0]
        return pb.ScoreFailure(
            sequence_id=sequence_id, code=number, message=self.message, retry_delay_s=self.retry_delay_s or 0.0
        )


def failure_of_sequence(failure: pb.ScoreFailure) -> Failure:
    """The failure of one sequence of a stream; a code that gRPC does not know counts as UNKNOWN."""
    code = _CODE_OF_NUMBER.get(failure.code, grpc.StatusCode.UNKNOWN)
    message = failure.message
    if failure.field and failure.field not in message:
        message = f"{failure.field}: {message}"
    return Failure(code, message, failure.retry_delay_s or None)
