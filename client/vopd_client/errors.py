"""Every error the client raises on purpose. Leaves also inherit the fitting built-in.

VopdError
├── ConfigError (ValueError)                  a setting, or settings that do not go together
├── DataError (ValueError)                    a prompt row, with file and line
├── RunDirectoryError (OSError)               unwritable, full, or another run's
├── CheckpointError (ValueError)              a checkpoint that does not fit this run
├── AlignmentError (ValueError)               scores that do not line up with the completion
├── NonFiniteError (ArithmeticError)          a log-probability or loss that is not finite
├── OutOfMemory (MemoryError)                 the device is full; names the settings that help
├── EnvironmentReplyError (RuntimeError)      an environment failed, or replied something that is no reply
├── RolloutEngineError (RuntimeError)         vLLM failed on a rollout or on new weights
├── RolloutEngineUnavailableError (ConnectionError)  vLLM is gone, for longer than the time-out
└── TeacherError
    ├── HandshakeError (ValueError)           another tokenizer, or something it cannot do
    ├── TeacherRequestError (ValueError)      INVALID_ARGUMENT: the request can never be answered
    ├── TeacherUnsupportedError (ValueError)  FAILED_PRECONDITION: names what it can do
    ├── TeacherPermissionError (PermissionError)  UNAUTHENTICATED, PERMISSION_DENIED
    ├── TeacherUnavailableError (ConnectionError) gone for longer than the time-out by progress
    └── TeacherInternalError (RuntimeError)   INTERNAL: the teacher failed on a valid request
"""

from __future__ import annotations


class VopdError(Exception):
    """Root of the tree."""


class ConfigError(VopdError, ValueError):
    """A setting, or settings that do not go together."""


class DataError(VopdError, ValueError):
    """A prompt row that cannot be used; the message starts with file and line."""


class RunDirectoryError(VopdError, OSError):
    """A run directory that is unwritable, full, or belongs to another run."""


class CheckpointError(VopdError, ValueError):
    """A checkpoint that is damaged or does not fit this run."""


class AlignmentError(VopdError, ValueError):
    """Scores or arrays that do not line up with the completion."""


class NonFiniteError(VopdError, ArithmeticError):
    """A log-probability or a loss that is not finite where it must be."""


class OutOfMemory(VopdError, MemoryError):  # noqa: N818  (named as torch's)
    """The student's device is full; the message names the settings that help."""


class RolloutEngineError(VopdError, RuntimeError):
    """vLLM failed on a rollout or on new weights, or does what it was not asked for."""


class RolloutEngineUnavailableError(VopdError, ConnectionError):
    """The engine of the rollouts died, or its server made no progress for longer than the time-out."""


class EnvironmentReplyError(VopdError, RuntimeError):
    """A user's environment failed, took too long, or replied something that is no reply; names row and turn."""


class TeacherError(VopdError):
    """Root of what goes wrong with the teacher."""


class HandshakeError(TeacherError, ValueError):
    """The teacher cannot teach this student; the message says what differs."""


class TeacherRequestError(TeacherError, ValueError):
    """The teacher says that this request can never be answered."""


class TeacherUnsupportedError(TeacherError, ValueError):
    """The teacher's engine cannot do this; the message names what it can."""


class TeacherPermissionError(TeacherError, PermissionError):
    """The key is missing, unknown, or may not do this."""


class TeacherUnavailableError(TeacherError, ConnectionError):
    """No teacher made progress for longer than the time-out."""


class TeacherInternalError(TeacherError, RuntimeError):
    """The teacher failed on a request that was valid."""
