"""One connection at a time to one of several replicas, with the handshake on every new one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc

from vopd_client.errors import HandshakeError, TeacherUnavailableError
from vopd_client.handshake import check_same_teacher
from vopd_client.teacher.channel import Address
from vopd_client.teacher.codec import teacher_info
from vopd_client.teacher.patience import Patience
from vopd_client.teacher.status import Failure
from vopd_client.teacher.transport import CallFailed, Transport
from vopd_client.types import TeacherInfo
from vopd_proto import MAX_MESSAGE_BYTES

HANDSHAKE_TIMEOUT_S = 30.0
# What gRPC and httpx2 say of a peer that ends the connection instead of answering, as one does that was spoken to
# in another protocol than its own.
HUNG_UP = frozenset({"Socket closed", "Server disconnected without sending a response."})


@dataclass(eq=False)
class Connection:
    """The way to one replica that passed the handshake."""

    address: Address
    transport: Transport
    info: TeacherInfo
    num_users: int = field(default=0)
    retired: bool = field(default=False)


class Connector:
    """Gives out the current connection; replaces it when a user says that it broke.

    The first handshake pins the teacher. A later one that shows another tokenizer, vocabulary or model
    revision raises HandshakeError: scores of other weights would be mixed into the same run.
    """

    def __init__(
        self,
        addresses: tuple[Address, ...],
        *,
        open_transport: Callable[[Address], Transport],
        expected_fingerprint: str | None,
        expected_revision: str | None,
    ) -> None:
        self.addresses = addresses
        self._open_transport = open_transport
        self._expected_fingerprint = expected_fingerprint
        self._expected_revision = expected_revision
        self._next_address = 0
        self._current: Connection | None = None
        self._lock = asyncio.Lock()
        self._closed = False
        self.pinned: TeacherInfo | None = None
        self.max_message_bytes = MAX_MESSAGE_BYTES

    @asynccontextmanager
    async def connection(self, patience: Patience) -> AsyncIterator[Connection]:
        """The current connection, opened if need be; it stays open while it is in use.

        Raises: HandshakeError, TeacherPermissionError, TeacherUnavailableError.
        """
        connection = await self._get(patience)
        connection.num_users += 1
        try:
            yield connection
        finally:
            connection.num_users -= 1
            await _close_if_unused(connection)

    def retire(self, connection: Connection) -> None:
        """Says that a connection broke: the next user gets one to the next replica.

        The transport is closed by its last user, since closing it cancels their calls.
        """
        connection.retired = True
        if self._current is connection:
            self._current = None
            self._turn()

    async def close(self) -> None:
        """Closes the current transport; calls on it are cancelled, and who waits for another one gets none."""
        self._closed = True
        if self._current is not None:
            await self._current.transport.close()
            self._current = None

    async def _get(self, patience: Patience) -> Connection:
        async with self._lock:
            while self._current is None:
                self._check_open()
                address = self.addresses[self._next_address]
                try:
                    opened = await self._open(address)
                    if self._closed:
                        await opened.transport.close()
                    self._check_open()
                    self._current = opened
                except CallFailed as error:
                    failure = _handshake_failure(error.failure, address)
                    if not failure.is_retryable:
                        raise failure.to_error() from error
                    self._turn()
                    await patience.back_off(failure, error, num_replicas=len(self.addresses))
            return self._current

    def _check_open(self) -> None:
        if self._closed:
            raise TeacherUnavailableError("the teacher client was closed")

    def _turn(self) -> None:
        self._next_address = (self._next_address + 1) % len(self.addresses)

    async def _open(self, address: Address) -> Connection:
        async with AsyncExitStack() as on_failure:
            transport = self._open_transport(address)
            on_failure.push_async_callback(transport.close)
            response = await transport.get_info(timeout_s=HANDSHAKE_TIMEOUT_S)
            info = teacher_info(response)
            self._check(info, address)
            on_failure.pop_all()
        self.pinned = self.pinned or info
        self.max_message_bytes = min(response.limits.max_message_bytes or MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
        return Connection(address, transport, info)

    def _check(self, info: TeacherInfo, address: Address) -> None:
        if self.pinned is not None:
            check_same_teacher(self.pinned, info, where=address.url)
            return
        for name, expected, actual in (
            ("tokenizer fingerprint", self._expected_fingerprint, info.fingerprint),
            ("model revision", self._expected_revision, info.model_revision),
        ):
            if expected is not None and expected != actual:
                raise HandshakeError(f"{address.url}: {name} {actual!r} instead of {expected!r}")


def _handshake_failure(failure: Failure, address: Address) -> Failure:
    """GetInfo needs no accelerator: no answer in time means that nobody is there, not that it is busy."""
    if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(grpc.StatusCode.UNAVAILABLE, f"{address.url} said nothing for {HANDSHAKE_TIMEOUT_S:g} s")
    if failure.reason in HUNG_UP:
        other = "grpcs:// is for gRPC" if address.secure else f"{address.scheme}s:// is for TLS"
        return Failure(failure.code, f"{address.target} hung up before it answered; {other}")
    return failure


async def _close_if_unused(connection: Connection) -> None:
    if connection.retired and not connection.num_users:
        await connection.transport.close()
