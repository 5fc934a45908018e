"""A ScoreStream over a protocol that has none: a request a sequence, many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc

from vopd_client.errors import AlignmentError
from vopd_client.teacher.transport import CallFailed
from vopd_proto import teacher_pb2 as pb

# As true of every other sequence as of the one that met it.
_FAILS_EVERYTHING = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})


class HttpStreamCall:
    """Implements `transport.StreamCall`: the client's end of a stream, and the part of the server that it stands for.

    A request whose connection broke is the failure of its sequence, UNAVAILABLE, as from a replica that drains:
    nothing more is sent here, and the others, each with a connection of its own, may still be answered.
    """

    def __init__(self, score: Callable[[pb.ScoreRequest], Awaitable[pb.ScoreResponse]], model_revision: str) -> None:
        """score: sends one request. model_revision: what the handshake on this connection showed."""
        self._score = score
        self._model_revision = model_revision
        self._settings = pb.StreamSettings()
        self._contexts: dict[int, pb.UIntArray] = {}
        self._answers: asyncio.Queue[pb.ScoreStreamResponse | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def write(self, message: pb.ScoreStreamRequest) -> None:
        """Never waits: the window of the one who writes bounds the requests."""
        match message.WhichOneof("message"):
            case "settings":
                self._settings = message.settings
                self._tell_revision(self._model_revision)
            case "context":
                self._contexts[message.context.context_index] = message.context.ids
            case "release_context":
                del self._contexts[message.release_context.context_index]
            case "sequence":
                task = asyncio.create_task(self._answer(self._request(message.sequence)))
                self._tasks.add(task)
                task.add_done_callback(self._done)

    async def read(self) -> pb.ScoreStreamResponse | None:
        answer = await self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _request(self, sequence: pb.Sequence) -> pb.ScoreRequest:
        settings = self._settings
        request = pb.ScoreRequest(
            request_id=settings.request_id,
            float_type=settings.float_type,
            contexts=[self._contexts[sequence.context_index]],
            sequences=[sequence],
        )
        request.sequences[0].context_index = 0
        if settings.HasField("temperature"):
            request.temperature = settings.temperature
        return request

    async def _answer(self, request: pb.ScoreRequest) -> None:
        """Raises, for the whole stream: CallFailed, AlignmentError."""
        sequence_id = request.sequences[0].sequence_id
        try:
            response = await self._score(request)
        except CallFailed as error:
            if error.failure.code in _FAILS_EVERYTHING:
                raise
            self._answers.put_nowait(pb.ScoreStreamResponse(failure=error.failure.to_message(sequence_id)))
            return
        if response.model_revision != self._model_revision:
            self._tell_revision(response.model_revision)
        ids = [scores.sequence_id for scores in response.scores]
        if ids != [sequence_id]:
            raise AlignmentError(f"asked for sequence {sequence_id!r}, answered with ids {ids[:10]}")
        chunk = pb.ScoreChunk(scores=response.scores[0], first_row=0, is_last=True)
        self._answers.put_nowait(pb.ScoreStreamResponse(chunk=chunk))

    def _tell_revision(self, model_revision: str) -> None:
        """The reader compares it with the handshake's, and ends the stream when it is another."""
        self._answers.put_nowait(pb.ScoreStreamResponse(opened=pb.StreamOpened(model_revision=model_revision)))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._answers.put_nowait(error)
