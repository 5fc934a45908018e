"""What the client needs of a connection, whatever protocol it speaks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from vopd_client.teacher.status import Failure
from vopd_proto import teacher_pb2 as pb


class CallFailed(Exception):  # noqa: N818  (what happened to a call, not an error of the program)
    """A call that was not answered; the retry logic decides what becomes of it. Never leaves this package."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.code.name}: {failure.message}")
        self.failure = failure


@dataclass
class Traffic:
    """Bytes of score requests and their answers, resent ones included: gRPC's messages, HTTP's bodies.

    head_bytes_received: of the output head, broken downloads included; not in bytes_received.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    head_bytes_received: int = 0


class StreamCall(Protocol):
    """One ScoreStream: settings first, then contexts and sequences as the outbox orders them."""

    async def write(self, message: pb.ScoreStreamRequest) -> None:
        """Raises: CallFailed when the call is over; why is for `read` to say."""
        ...

    async def read(self) -> pb.ScoreStreamResponse | None:
        """The next answer; None: the teacher ended the stream. Raises: CallFailed."""
        ...

    async def cancel(self) -> None:
        """Gives up on everything that is unanswered; harmless when the call is over."""
        ...


class Transport(Protocol):
    """A connection to one replica. Nothing is sent before the first call."""

    async def get_info(self, *, timeout_s: float) -> pb.GetInfoResponse:
        """Raises: CallFailed, with DEADLINE_EXCEEDED when the time is up."""
        ...

    async def get_tokenizer(self) -> pb.GetTokenizerResponse:
        """Raises: CallFailed."""
        ...

    async def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        """Raises: CallFailed."""
        ...

    def get_head(self) -> AsyncGenerator[pb.GetHeadResponse, None]:
        """The pieces of the output head's file, in order; the first one's num_bytes is 0 where nothing tells the size.

        Close it when it is not read to its end. Raises, while it is read: CallFailed.
        """
        ...

    def open_stream(self) -> StreamCall:
        """A stream of its own, after `get_info`."""
        ...

    async def close(self) -> None:
        """Ends the connection; calls on it fail with CANCELLED."""
        ...
