"""One replica of a teacher: the connection to it, why there is none, and what it has done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc

from vopd_client.errors import TeacherUnavailableError, VopdError
from vopd_client.teacher.channel import Address
from vopd_client.teacher.codec import teacher_info
from vopd_client.teacher.status import Failure
from vopd_client.teacher.transport import CallFailed, Traffic, Transport
from vopd_client.types import SequenceToScore, TeacherInfo
from vopd_proto import MAX_MESSAGE_BYTES

HANDSHAKE_TIMEOUT_S = 30.0
# What gRPC and httpx2 say of a peer that ends the connection instead of answering, as one does that was spoken to
# in another protocol than its own.
HUNG_UP = frozenset({"Socket closed", "Server disconnected without sending a response."})


@dataclass(eq=False)
class Connection:
    """The way to a replica that passed the handshake."""

    replica: Replica
    transport: Transport
    info: TeacherInfo
    num_users: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return self.replica.address.url


@dataclass(frozen=True, slots=True)
class ReplicaUse:
    """What one replica is to this client, and has done for it.

    missing: why it is not connected; empty when it is. num_tokens: of the completions of its num_sequences answers.
    num_taken_back: sequences that it was given and did not answer, so that they were asked again.
    """

    url: str
    missing: str
    num_sequences: int
    num_tokens: int
    num_taken_back: int
    bytes_sent: int
    bytes_received: int


class Replica:
    """Connects when told to, one attempt at a time, and keeps the connection until a user says that it broke."""

    def __init__(
        self,
        address: Address,
        *,
        open_transport: Callable[[Address, Traffic], Transport],
        check: Callable[[Transport, TeacherInfo, str], Awaitable[None]],
    ) -> None:
        """check: refuses another teacher than the others; given transport, info and URL."""
        self.address = address
        self.traffic = Traffic()
        self.current: Connection | None = None
        self.problem = "not connected yet"  # why there is no connection; empty when there is one
        self.refusal: VopdError | None = None  # the problem, where trying again does not help by itself
        self.retry_delay_s: float | None = None  # as it asked for
        self.num_failures = 0  # since its last answer
        self.max_message_bytes = MAX_MESSAGE_BYTES
        self.num_taken_back = 0
        self._num_sequences = 0
        self._num_tokens = 0
        self._open_transport = open_transport
        self._check = check
        self._lock = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def use(self) -> ReplicaUse:
        return ReplicaUse(
            self.address.url,
            self.problem,
            self._num_sequences,
            self._num_tokens,
            self.num_taken_back,
            self.traffic.bytes_sent,
            self.traffic.bytes_received,
        )

    @property
    def num_sequences(self) -> int:
        """That it has answered."""
        return self._num_sequences

    def answered(self, sequences: Sequence[SequenceToScore]) -> None:
        self._num_sequences += len(sequences)
        self._num_tokens += sum(len(sequence.completion_ids) for sequence in sequences)
        self.num_failures = 0

    async def open(self) -> Connection:
        """The connection there is, or a new one that was checked.

        Raises: CallFailed where trying again can help; where it cannot, HandshakeError, TeacherPermissionError and
            whatever else `check` raises.
        """
        async with self._lock:
            if self.current is not None:
                return self.current
            try:
                self.current = await self._connect()
            except CallFailed as error:
                failure = _handshake_failure(error.failure, self.address)
                if failure.is_retryable:
                    self._note(failure)
                    raise CallFailed(failure) from error.__cause__
                self._note(refusal := failure.to_error())
                raise refusal from error
            except VopdError as error:
                self._note(error)
                raise
            self.problem, self.refusal = "", None
            return self.current

    def retire(self, connection: Connection, reason: Failure | VopdError) -> None:
        """Says why a connection is of no more use. Closing it would cancel calls; that is for its last user to do."""
        connection.ended.set()
        if self.current is connection:
            self.current = None
            self._note(reason)

    def close_unused(self, connection: Connection) -> None:
        """In a task of its own, which nothing interrupts."""
        task = asyncio.create_task(connection.transport.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes the current connection, which cancels its calls, and any that is being opened."""
        self._closed = True
        if self.current is not None:
            self.close_unused(self.current)
            self.current = None
        await asyncio.gather(*self._closing)

    def _note(self, reason: Failure | VopdError) -> None:
        self.num_failures += 1
        self.refusal = reason if isinstance(reason, VopdError) else None
        self.problem = reason.reason if isinstance(reason, Failure) else str(reason)
        self.retry_delay_s = reason.retry_delay_s if isinstance(reason, Failure) else None

    async def _connect(self) -> Connection:
        async with AsyncExitStack() as on_failure:
            transport = self._open_transport(self.address, self.traffic)
            on_failure.push_async_callback(transport.close)
            response = await transport.get_info(timeout_s=HANDSHAKE_TIMEOUT_S)
            info = teacher_info(response)
            await self._check(transport, info, self.address.url)
            if self._closed:
                raise TeacherUnavailableError("the teacher client was closed")
            on_failure.pop_all()
        self.max_message_bytes = min(response.limits.max_message_bytes or MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
        return Connection(self, transport, info)


def _handshake_failure(failure: Failure, address: Address) -> Failure:
    """GetInfo needs no accelerator: no answer in time means that nobody is there, not that it is busy."""
    if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(grpc.StatusCode.UNAVAILABLE, f"{address.url} said nothing for {HANDSHAKE_TIMEOUT_S:g} s")
    if failure.reason in HUNG_UP:
        other = "grpcs:// is for gRPC" if address.secure else f"{address.scheme}s:// is for TLS"
        return Failure(failure.code, f"{address.target} hung up before it answered; {other}")
    return failure
