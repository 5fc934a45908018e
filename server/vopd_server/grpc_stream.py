"""One ScoreStream: messages in, answers out as they finish.

The stream reads no further while the budget is taken, so that the transport's flow control holds a fast
sender back. A sequence that cannot be scored answers with its own failure; a message that makes no sense in
a stream (no settings, too many contexts) ends it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import IntArray
from vopd_server.answer_codec import answer_format_of, pack_chunks
from vopd_server.codec import (
    check_float_type,
    check_no_unknown_fields,
    parse,
    request_id_of,
    shape_of,
    temperature_of,
    unpack_ids,
    unpack_sequence,
)
from vopd_server.concurrency import task_group, unread_timeout
from vopd_server.errors import InvalidRequestError, TeacherError, UnauthenticatedError, UnsupportedError
from vopd_server.grpc_errors import score_failure, status_code
from vopd_server.scheduler import Ticket
from vopd_server.service import TeacherService
from vopd_server.tenancy import Tenant
from vopd_server.validation import SequenceShape, check_temperature

MAX_CONTEXTS = 4096  # kept for one stream at a time
# How long a stream that ends early still reads. A grpc.aio client that is writing when the status arrives tells
# its caller "INTERNAL: Internal error from Core" instead of it (https://github.com/grpc/grpc/issues/36066).
LAST_WORDS_S = 0.5
TELL_WHY_EVERY_S = 2.0

Read = Callable[[], Awaitable[bytes | None]]  # None: the client sends no more
Write = Callable[[pb.ScoreStreamResponse], Awaitable[None]]


class StreamContexts:
    """The contexts that a client has sent and not released."""

    def __init__(self, *, max_contexts: int, max_tokens: int) -> None:
        self._max_contexts = max_contexts
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._kept: dict[int, IntArray | InvalidRequestError] = {}

    def keep(self, context: pb.StreamContext) -> None:
        """Keeps a context, in the place of one of the same index. A broken one fails the sequences that use it.

        Raises: InvalidRequestError when the stream would hold too many.
        """
        if context.context_index in self._kept:
            self.release(context.context_index)
        try:
            ids = unpack_ids(context.ids, f"contexts[{context.context_index}].ids")
        except InvalidRequestError as error:
            self._kept[context.context_index] = error
        else:
            self._kept[context.context_index] = ids
            self._num_tokens += len(ids)
        if len(self._kept) > self._max_contexts or self._num_tokens > self._max_tokens:
            raise InvalidRequestError(
                "context",
                f"{len(self._kept)} contexts of {self._num_tokens} tokens together > the {self._max_contexts} contexts "
                f"and {self._max_tokens} tokens that a stream may keep: release those that are done with",
            )

    def release(self, context_index: int) -> None:
        """Raises: InvalidRequestError for a context that is not there."""
        if context_index not in self._kept:
            raise InvalidRequestError("release_context.context_index", f"{context_index}; no such context is kept")
        released = self._kept.pop(context_index)
        if not isinstance(released, InvalidRequestError):
            self._num_tokens -= len(released)

    def find(self, context_index: int) -> IntArray:
        """[C]. Raises: InvalidRequestError for a context that is broken or not there."""
        found = self._kept.get(context_index)
        if found is None:
            raise InvalidRequestError("sequence.context_index", f"{context_index}; no such context is kept")
        if isinstance(found, InvalidRequestError):
            raise found
        return found


class ScoreStream:
    """One stream, from its settings to its last answer. Tokens are held until their answer is written."""

    def __init__(
        self, service: TeacherService, tenant: Tenant, read: Read, write: Write, *, answer_timeout_s: float
    ) -> None:
        self._service = service
        self._tenant = tenant
        self._read = read
        self._write = write
        self._answer_timeout_s = answer_timeout_s
        self._writing = asyncio.Lock()
        self._contexts = StreamContexts(max_contexts=MAX_CONTEXTS, max_tokens=service.queue_tokens_of(tenant))
        self._settings = pb.StreamSettings()
        self._num_answers_due = 0
        self._is_held = False  # the sequence that was read last
        self._last_sent_s = time.monotonic()
        self._no_answers_due = asyncio.Event()
        self._no_answers_due.set()
        self.request_id = ""
        self.num_sequences = 0
        self.num_tokens = 0

    async def run(self) -> None:
        """Answers until the client sends no more. When the service drains, what was let in is answered, what
        comes later fails, and the stream ends with UnavailableError.

        Raises: InvalidRequestError, UnsupportedError, UnavailableError, DeadlineError when the client leaves an
            answer unread for too long.
        """
        try:
            await self._open()
            async with task_group() as answers:
                reading = answers.create_task(self._read_all(answers))
                draining = answers.create_task(self._service.wait_for_drain())
                telling = answers.create_task(self._tell_why_it_waits())
                await asyncio.wait({reading, draining}, return_when=asyncio.FIRST_COMPLETED)
                draining.cancel()
                await self._no_answers_due.wait()
                if not reading.done():
                    await asyncio.wait({reading}, timeout=LAST_WORDS_S)
                is_cut_off = reading.cancel()
                telling.cancel()
        except (InvalidRequestError, UnsupportedError, UnauthenticatedError):
            await self._hear_out()
            raise
        if is_cut_off:
            self._service.check_accepting()

    async def _open(self) -> None:
        data = await self._read()
        message = pb.ScoreStreamRequest() if data is None else parse(pb.ScoreStreamRequest, data)
        check_no_unknown_fields(message)
        if message.WhichOneof("message") != "settings":
            raise InvalidRequestError("settings", "the first message of a stream must hold its settings")
        self.request_id = request_id_of(message.settings)
        check_temperature(temperature_of(message.settings), self._service.info)
        check_float_type(message.settings.float_type)
        self._settings = message.settings
        opened = pb.StreamOpened(request_id=self.request_id, model_revision=self._service.info.model_revision)
        await self._send(pb.ScoreStreamResponse(opened=opened))

    async def _hear_out(self) -> None:
        """Reads and drops what the client was about to send before it can hear of an error."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                while await self._read() is not None:
                    pass

    async def _read_all(self, answers: asyncio.TaskGroup) -> None:
        while (data := await self._read()) is not None:
            message = parse(pb.ScoreStreamRequest, data)
            kind = message.WhichOneof("message")
            if kind == "sequence":
                await self._accept(message, answers)
                continue
            check_no_unknown_fields(message)
            if kind == "context":
                self._contexts.keep(message.context)
            elif kind == "release_context":
                self._contexts.release(message.release_context.context_index)
            elif kind == "settings":
                raise InvalidRequestError("settings", "sent twice; they are the first message of a stream")
            else:
                raise InvalidRequestError("ScoreStreamRequest", "an empty message")

    async def _accept(self, message: pb.ScoreStreamRequest, answers: asyncio.TaskGroup) -> None:
        """Waits until the sequence may come in, and leaves it to a task of its own."""
        sequence = message.sequence
        self.num_sequences += 1
        arrived_s = time.monotonic()
        try:
            check_no_unknown_fields(message)
            context_ids = self._contexts.find(sequence.context_index)
            shape = shape_of(sequence, field="sequence", num_context_ids=len(context_ids))
            self._is_held = True
            ticket = await self._service.admit(self._tenant, shape, temperature_of(self._settings))
        except UnauthenticatedError:
            raise  # the key was revoked: nothing more of this stream is answered
        except TeacherError as error:
            # Draining cancels who reads; what is half written must be finished for the next write to work.
            await asyncio.shield(answers.create_task(self._send_failure(sequence.sequence_id, error)))
            return
        finally:
            self._is_held = False
        held_s = time.monotonic() - arrived_s
        self._num_answers_due += 1
        self._no_answers_due.clear()
        task = answers.create_task(self._answer(ticket, sequence, shape, context_ids, held_s))
        # Not a `finally` inside the task: one that is cancelled before its first step never gets there.
        task.add_done_callback(partial(self._give_back, ticket))

    async def _answer(
        self, ticket: Ticket, sequence: pb.Sequence, shape: SequenceShape, context_ids: IntArray, held_s: float
    ) -> bool:
        """Scores and sends; whether there were scores."""
        unpack = partial(
            unpack_sequence,
            sequence,
            field=shape.field,
            context_ids=context_ids,
            request_id=self.request_id,
            temperature=temperature_of(self._settings),
        )
        try:
            request, scores = await self._service.score_admitted(self._tenant, ticket, shape, unpack)
        except TeacherError as error:
            await self._send_failure(sequence.sequence_id, error)
            return False
        scores = dataclasses.replace(scores, queue_time_s=scores.queue_time_s + held_s)
        answer_format = answer_format_of(self._service.info, self._settings.float_type)
        encoding_s = 0.0
        started_s = time.monotonic()
        for chunk in pack_chunks(sequence.sequence_id, request, scores, answer_format):
            encoding_s += time.monotonic() - started_s
            await self._send(pb.ScoreStreamResponse(chunk=chunk))
            started_s = time.monotonic()
        self._service.metrics.stage(self._tenant.id, "encode", encoding_s)
        self.num_tokens += shape.num_tokens
        return True

    async def _tell_why_it_waits(self) -> None:
        """Every few seconds in which there is nothing else to send, and something is owed."""
        while True:
            await asyncio.sleep(TELL_WHY_EVERY_S)
            is_quiet = time.monotonic() - self._last_sent_s >= TELL_WHY_EVERY_S
            if is_quiet and (self._num_answers_due or self._is_held) and not self._writing.locked():
                await self._send(pb.ScoreStreamResponse(waiting=self._service.why_waiting(self._tenant)))

    async def _send(self, response: pb.ScoreStreamResponse) -> None:
        """One message at a time. Raises: DeadlineError when the client does not take it."""
        async with self._writing, unread_timeout(self._answer_timeout_s):
            await self._write(response)
        self._last_sent_s = time.monotonic()

    async def _send_failure(self, sequence_id: str, error: TeacherError) -> None:
        self._service.rejected(self._tenant.id, status_code(error).name)
        await self._send(pb.ScoreStreamResponse(failure=score_failure(sequence_id, error)))

    def _give_back(self, ticket: Ticket, task: asyncio.Task[bool]) -> None:
        answered = not task.cancelled() and task.exception() is None and task.result()
        self._service.admission.leave(ticket, answered=answered)
        self._num_answers_due -= 1
        if self._num_answers_due == 0:
            self._no_answers_due.set()
