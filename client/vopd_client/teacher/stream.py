"""Scores over one stream that outlives its connections, whatever they speak."""

from __future__ import annotations

import asyncio
import itertools

import grpc

from vopd_client.errors import TeacherError, TeacherInternalError, TeacherUnavailableError, VopdError
from vopd_client.handshake import check_revision
from vopd_client.teacher.codec import decode_scores, pack_ids, sequence_message
from vopd_client.teacher.connector import Connection, Connector
from vopd_client.teacher.outbox import Entry, Outbox
from vopd_client.teacher.patience import Patience
from vopd_client.teacher.requests import check_message_size
from vopd_client.teacher.status import Failure, failure_of_sequence
from vopd_client.teacher.transport import CallFailed, StreamCall
from vopd_client.types import SequenceScores, SequenceToScore
from vopd_proto import SEQUENCE_OVERHEAD_BYTES
from vopd_proto import teacher_pb2 as pb


class ScoreStream:
    """`submit` sequences from as many tasks as you like; answers return as they finish.

    When the connection breaks, the next replica is asked (after a handshake) for everything that is still
    unanswered, and nothing else: no sequence is lost or answered twice.
    """

    def __init__(
        self,
        connector: Connector,
        patience: Patience,
        *,
        settings: pb.StreamSettings,
        window: int,
        max_context_tokens: int,
        sequence_ids: itertools.count[int],
    ) -> None:
        self.patience = patience
        self._connector = connector
        self._settings = settings
        self._outbox = Outbox(window=window, max_context_tokens=max_context_tokens)
        self._sequence_ids = sequence_ids
        self._futures: dict[str, asyncio.Future[SequenceScores]] = {}
        self._opened = asyncio.Event()  # the server has said which weights answer on this connection
        self._to_send = asyncio.Event()  # something may have become sendable
        self._refused: Failure | None = None  # a full queue: the writer backs off before it goes on
        self._leaving: Failure | None = None  # a replica that takes no more: it finishes what it has
        self._task: asyncio.Task[None] | None = None
        self._error: VopdError | None = None

    async def submit(self, sequence: SequenceToScore) -> SequenceScores:
        """The scores of one sequence. Cancelling gives up on its answer.

        Raises: TeacherRequestError, TeacherUnsupportedError, AlignmentError, NonFiniteError for this
            sequence alone; HandshakeError, TeacherPermissionError, TeacherUnavailableError,
            TeacherInternalError for the stream, which then refuses everything.
        """
        if self._error is not None:
            raise type(self._error)(*self._error.args) from self._error
        entry = self._entry(sequence)
        future: asyncio.Future[SequenceScores] = asyncio.get_running_loop().create_future()
        self._futures[entry.sequence_id] = future
        self._outbox.add(entry)
        self.patience.clock.begin()
        self._to_send.set()
        if self._task is None:
            self._task = asyncio.create_task(self.patience.run(self._serve_connections))
            self._task.add_done_callback(self._stopped)
        try:
            return await future
        finally:
            self.patience.clock.end()
            if self._futures.pop(entry.sequence_id, None) is not None:  # cancelled, not answered
                self._outbox.abandon(entry)

    async def close(self) -> None:
        """Ends the stream; what is unanswered raises TeacherUnavailableError."""
        self._fail(TeacherUnavailableError("the teacher client was closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def __aenter__(self) -> ScoreStream:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    def _entry(self, sequence: SequenceToScore) -> Entry:
        sequence_id = str(next(self._sequence_ids))
        entry = Entry(
            sequence_id,
            sequence,
            message=sequence_message(sequence, sequence_id=sequence_id),
            context=pack_ids("context_ids", sequence.context_ids),
        )
        limit = self._connector.max_message_bytes - SEQUENCE_OVERHEAD_BYTES
        check_message_size(entry.message, limit)
        check_message_size(entry.context, limit)
        return entry

    # ------------------------------------------------------------ connections

    async def _serve_connections(self) -> None:
        while True:
            await self._to_send.wait()
            async with self._connector.connection(self.patience) as connection:
                failure, cause = await self._serve(connection)
                self._outbox.connection_lost()
                if failure.code is grpc.StatusCode.UNAVAILABLE:
                    self._connector.retire(connection)
            if not self.patience.clock.num_outstanding:
                self._to_send.clear()  # an idle stream reconnects when there is something to ask
                continue
            self._to_send.set()
            await self.patience.back_off(failure, cause, num_replicas=len(self._connector.addresses))

    async def _serve(self, connection: Connection) -> tuple[Failure, BaseException | None]:
        """One connection's life: why it ended, where trying again can help."""
        self._refused = self._leaving = None
        self._opened.clear()
        call = connection.transport.open_stream()
        reader = asyncio.create_task(self._read(call, connection))
        writer = asyncio.create_task(self._write(call))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if not reader.done():
                await writer  # raises what broke it; otherwise the call is over, and the reader knows why
            return await reader, None
        except CallFailed as error:
            if not error.failure.is_retryable:
                raise error.failure.to_error() from error
            return error.failure, error
        finally:
            reader.cancel()
            writer.cancel()
            await call.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

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
                return Failure(grpc.StatusCode.UNAVAILABLE, f"{connection.address.url} ended the stream")
            kind = response.WhichOneof("message")
            if kind == "opened":
                where = connection.address.url
                check_revision(connection.info.model_revision, response.opened.model_revision, where=where)
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
        self.patience.progressed()
        if entry is None:
            return
        self._to_send.set()  # a place in the window
        future = self._futures.pop(entry.sequence_id, None)
        if future is None or future.done():
            return  # abandoned
        try:
            scores = decode_scores(
                entry.sequence,
                entry.chunks,
                vocab_size=connection.info.vocab_size,
                hidden_size=connection.info.hidden_size,
            )
        except VopdError as error:
            future.set_exception(error)
        else:
            future.set_result(scores)

    def _take_failure(self, message: pb.ScoreFailure) -> None:
        entry = self._outbox.failed(message.sequence_id)
        failure = failure_of_sequence(message)
        self._to_send.set()
        if failure.is_retryable:
            self._outbox.send_again(entry)
            if failure.code is grpc.StatusCode.UNAVAILABLE:
                self._leaving = failure
                self._outbox.stop_sending()
            else:
                self._refused = failure
            return
        self.patience.progressed()
        future = self._futures.pop(entry.sequence_id, None)
        if future is not None and not future.done():
            future.set_exception(failure.to_error())

    # ------------------------------------------------------------ the end

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """The serving task never returns: it was cancelled by `close`, or something ended the stream."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if isinstance(error, VopdError):
            self._fail(error)
        else:
            broken = TeacherError(f"the score stream broke: {error!r}")
            broken.__cause__ = error
            self._fail(broken)

    def _fail(self, error: VopdError) -> None:
        self._error = self._error or error
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)
        self._futures.clear()
