"""One replica's part of a stream: sends what it is given and takes answers in, over as many connections as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc

from vopd_client.errors import HandshakeError, TeacherInternalError
from vopd_client.handshake import check_revision
from vopd_client.teacher.outbox import Entry, Outbox
from vopd_client.teacher.patience import Patience
from vopd_client.teacher.replica import Connection, Replica
from vopd_client.teacher.replicas import Replicas
from vopd_client.teacher.status import Failure, failure_of_sequence
from vopd_client.teacher.transport import CallFailed, StreamCall
from vopd_proto import teacher_pb2 as pb


class LinkOwner(Protocol):
    """Who hands sequences out to links, and hears what became of them."""

    def may_take(self, link: StreamLink, is_up: bool) -> None:
        """Whether the link can be given sequences from now on."""
        ...

    def took(self, link: StreamLink, entry: Entry, connection: Connection) -> None:
        """The whole answer to a sequence is there."""
        ...

    def failed(self, link: StreamLink, entry: Entry, failure: Failure) -> None:
        """The replica says that it will never score this sequence."""
        ...

    def gave_back(self, link: StreamLink, entries: Sequence[Entry], *, is_all: bool) -> None:
        """The replica will not answer these. is_all: everything that the link had, abandoned sequences included."""
        ...


class StreamLink:
    """Serves one replica. `add` what it is to score; the owner is told of everything else."""

    def __init__(
        self,
        index: int,
        replica: Replica,
        *,
        replicas: Replicas,
        owner: LinkOwner,
        patience: Patience,
        settings: pb.StreamSettings,
        outbox: Outbox,
        now: Callable[[], float],
    ) -> None:
        self.index = index
        self.replica = replica
        self.patience = patience
        self._replicas = replicas
        self._owner = owner
        self._settings = settings
        self._outbox = outbox
        self._now = now
        self._heard_s = now()  # an answer or a part of one, or the first sequence after it owed none
        self._opened = asyncio.Event()  # the server has said which weights answer on this connection
        self._to_send = asyncio.Event()  # something may have become sendable
        self._refused: Failure | None = None  # a full queue: the writer backs off before it goes on
        self._leaving: Failure | None = None  # a replica that takes no more: it finishes what it has
        self._cut: asyncio.Future[Failure] | None = None  # of the connection that is being served

    def add(self, entry: Entry) -> None:
        if not self._outbox.owes_answers:
            self._heard_s = self._now()
        self._outbox.add(entry)
        self._to_send.set()

    def abandon(self, sequence_id: str) -> bool:
        """As `Outbox.abandon`."""
        return self._outbox.abandon(sequence_id)

    @property
    def unanswered(self) -> list[Entry]:
        return self._outbox.unanswered

    @property
    def silent_s(self) -> float:
        """For how long it has owed an answer and given none."""
        return self._now() - self._heard_s if self._cut is not None and self._outbox.owes_answers else 0.0

    def cut(self, failure: Failure) -> None:
        """Ends the connection that is being served."""
        if self._cut is not None and not self._cut.done():
            self._cut.set_result(failure)

    # ------------------------------------------------------------ connections

    async def serve(self) -> None:
        """Never returns. Raises: whatever ends a connection and may not be tried again."""
        while True:
            if self._replicas.is_single:
                await self._to_send.wait()  # an idle stream reconnects when there is something to ask
            elif self.replica.current is None:
                self._give_everything_back()
            async with self._replicas.connection(self.patience, self.replica) as connection:
                self._owner.may_take(self, True)
                try:
                    failure, cause = await self._serve(connection)
                except HandshakeError as error:  # other weights than at this connection's handshake
                    if self._replicas.is_single:
                        raise
                    self._replicas.retire(connection, error)
                    continue
                finally:
                    self._give_everything_back()
                if failure.code is grpc.StatusCode.UNAVAILABLE:
                    self._replicas.retire(connection, failure)
                    if not self._replicas.is_single:
                        continue  # the others go on, and this one is connected to again behind the scenes
            if self._replicas.is_single and not self.patience.clock.num_outstanding:
                self._to_send.clear()
                continue
            self._to_send.set()
            await self.patience.back_off(failure, cause)

    async def _serve(self, connection: Connection) -> tuple[Failure, BaseException | None]:
        """One connection's life: why it ended, where trying again can help."""
        self._refused = self._leaving = None
        self._opened.clear()
        self._heard_s = self._now()
        self._cut = asyncio.get_running_loop().create_future()
        call = connection.transport.open_stream()
        reader = asyncio.create_task(self._read(call, connection))
        writer = asyncio.create_task(self._write(call))
        ends: set[asyncio.Future[Any]] = {reader, writer, self._cut}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._cut.done():
                return self._cut.result(), None
            if not reader.done():
                await writer  # raises what broke it; otherwise the call is over, and the reader knows why
            return await reader, None
        except CallFailed as error:
            if not error.failure.is_retryable:
                raise error.failure.to_error() from error
            return error.failure, error
        finally:
            self._cut = None
            reader.cancel()
            writer.cancel()
            await call.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    def _give_everything_back(self) -> None:
        self._outbox.connection_lost()
        self._owner.gave_back(self, self._outbox.take_waiting(), is_all=True)

    # ------------------------------------------------------------ sending

    async def _write(self, call: StreamCall) -> None:
        """Sends until the call is over; nothing but the settings before the server has shown its weights."""
        try:
            await call.write(pb.ScoreStreamRequest(settings=self._settings))
            await self._opened.wait()
            while True:
                if self._refused is not None:
                    refused, self._refused = self._refused, None
                    await self.patience.back_off(refused, None)
                self._to_send.clear()
                messages = self._outbox.next_messages()
                for message in messages:
                    await call.write(message)
                if not messages:
                    await self._to_send.wait()
        except CallFailed:
            return  # the call ended under us: its status is the reader's to report

    # ------------------------------------------------------------ receiving

    async def _read(self, call: StreamCall, connection: Connection) -> Failure:
        """Takes answers in until the stream ends or its replica is drained."""
        while not self._outbox.is_drained:
            response = await call.read()
            if response is None:
                return Failure(grpc.StatusCode.UNAVAILABLE, f"{connection.url} ended the stream")
            kind = response.WhichOneof("message")
            if kind == "opened":
                check_revision(connection.info.model_revision, response.opened.model_revision, where=connection.url)
                self._opened.set()
            elif not self._opened.is_set():
                raise TeacherInternalError("the teacher answered before it said which weights answer")
            elif kind == "chunk":
                self._take_chunk(response.chunk, connection)
            elif kind == "failure":
                self._take_failure(response.failure)
            elif kind == "waiting":
                self.patience.told(response.waiting.message)
        assert self._leaving is not None, "drained, but nothing was refused"
        return self._leaving

    def _take_chunk(self, chunk: pb.ScoreChunk, connection: Connection) -> None:
        entry = self._outbox.receive(chunk)
        self._progressed()
        if entry is not None:
            self._to_send.set()  # a place in the window
            self._owner.took(self, entry, connection)

    def _take_failure(self, message: pb.ScoreFailure) -> None:
        entry = self._outbox.failed(message.sequence_id)
        failure = failure_of_sequence(message)
        self._to_send.set()
        if not failure.is_retryable:
            self._progressed()
            self._owner.failed(self, entry, failure)
            return
        self._outbox.send_again(entry)
        if entry.abandoned:
            self._owner.gave_back(self, [entry], is_all=False)
        if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._refused = failure
            return
        self._leaving = failure
        self._outbox.stop_sending()
        self._owner.may_take(self, False)
        self._owner.gave_back(self, self._outbox.take_waiting(), is_all=False)

    def _progressed(self) -> None:
        self._heard_s = self._now()
        self.patience.progressed()
        if self._leaving is None:
            self._owner.may_take(self, True)
