"""Every error the teacher raises on purpose; each transport maps this one tree.

TeacherError
├── InvalidRequestError      INVALID_ARGUMENT     422   (names the field)
│   ├── BodyTooLargeError    INVALID_ARGUMENT     413   (HTTP only: gRPC refuses such a message by itself)
│   ├── UnknownModelError    NOT_FOUND            404   (HTTP only: other trainers name the model they ask)
│   └── MediaTypeError       INVALID_ARGUMENT     415   (HTTP only)
├── UnauthenticatedError     UNAUTHENTICATED      401
├── PermissionDeniedError    PERMISSION_DENIED    403
├── OverloadedError          RESOURCE_EXHAUSTED   429   (with a retry delay)
├── UnsupportedError         FAILED_PRECONDITION  409   (names what this engine can do)
├── DeadlineError            DEADLINE_EXCEEDED    504
├── ClientGoneError          CANCELLED            499   (nobody hears it)
├── UnavailableError         UNAVAILABLE          503
│   └── EngineDeadError      UNAVAILABLE          503   (the process ends, another takes its place)
├── EngineError              INTERNAL             500
└── ConfigError              (start-up only)
"""

from __future__ import annotations


class TeacherError(Exception):
    """Root of the tree. `retry_delay_s` is set where trying again can help."""

    retry_delay_s: float | None = None
    field: str = ""


class InvalidRequestError(TeacherError, ValueError):
    """The request can never be answered as it is; `field` says which part is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class BodyTooLargeError(InvalidRequestError):
    """More bytes than a message may have."""


class UnknownModelError(InvalidRequestError):
    """A model is named that is not the one served here."""


class MediaTypeError(InvalidRequestError):
    """A body in a format, or an encoding, that is not spoken here."""


class UnauthenticatedError(TeacherError):
    """No key, or one that is not known."""


class PermissionDeniedError(TeacherError, PermissionError):
    """A known key that may not do this."""


class OverloadedError(TeacherError):
    """Over the caller's queue bound; nothing of the request was admitted."""

    def __init__(self, message: str, *, retry_delay_s: float) -> None:
        super().__init__(message)
        self.retry_delay_s = retry_delay_s


class UnsupportedError(TeacherError):
    """Something this engine cannot do; the message names what it can."""


class DeadlineError(TeacherError, TimeoutError):
    """The caller's deadline passed before the scores were ready."""


class UnavailableError(TeacherError):
    """Not ready yet, or draining; another replica or a later try may answer."""

    def __init__(self, message: str, *, retry_delay_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_delay_s = retry_delay_s


class EngineDeadError(UnavailableError):
    """The engine died or hangs: this process scores nothing any more. What it was working on can be sent again."""


class ClientGoneError(TeacherError):
    """The caller hung up before its answer was ready."""


class EngineError(TeacherError, RuntimeError):
    """The engine failed on a request that was valid."""


class ConfigError(TeacherError, ValueError):
    """A configuration that cannot be served; found before anything is loaded where possible."""
