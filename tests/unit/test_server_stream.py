"""One stream between two queues: what is read, what is held back, what is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from google.protobuf.message import Message

from fake_engine import ENGINE_TIME_S, QUEUE_TIME_S, FakeEngine, until
from open_service import num_held, open_service, reserved_tokens, take
from vopd_proto import teacher_pb2 as pb
from vopd_server import grpc_stream
from vopd_server.errors import DeadlineError, EngineError, InvalidRequestError, UnavailableError
from vopd_server.grpc_stream import ScoreStream, StreamContexts
from vopd_server.service import TeacherService
from vopd_server.tenancy import OPEN_TENANT
from vopd_server.validation import Limits
from wire_client import Question, stream_context, stream_sequence, stream_settings

LIMITS = Limits(
    max_context_length=64, max_sequences_per_request=8, max_tokens_per_request=64, max_top_k=8, max_message_bytes=2**20
)
CONTEXTS = [[1, 2]]
OPENING: list[Message] = [stream_settings(request_id="r"), stream_context(0, CONTEXTS[0])]


def sequence(name: str, num_tokens: int = 4) -> Message:
    """One that takes `num_tokens` of the budget."""
    return stream_sequence(Question([5] * (num_tokens - 2), name=name), CONTEXTS)


class Wire:
    """A client's end: `sent` is read by the stream, `answers` is what it wrote while it could."""

    def __init__(
        self, service: TeacherService, *messages: Message | bytes | None, answer_timeout_s: float = 0.05
    ) -> None:
        self.service = service
        self.sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.answers: list[pb.ScoreStreamResponse] = []
        self.is_closed = False
        self.is_read = asyncio.Event()
        self.is_read.set()
        self.send(*messages)
        self.stream = ScoreStream(service, OPEN_TENANT, self._read, self._write, answer_timeout_s=answer_timeout_s)

    def send(self, *messages: Message | bytes | None) -> None:
        for message in messages:
            self.sent.put_nowait(message.SerializeToString() if isinstance(message, Message) else message)

    def names(self, kind: str) -> list[str]:
        found = [answer for answer in self.answers if answer.WhichOneof("message") == kind]
        return [answer.chunk.scores.sequence_id if kind == "chunk" else answer.failure.sequence_id for answer in found]

    async def _read(self) -> bytes | None:
        if self.is_closed:
            return None
        message = await self.sent.get()
        self.is_closed = message is None
        return message

    async def _write(self, response: pb.ScoreStreamResponse) -> None:
        await self.is_read.wait()
        self.answers.append(response)


async def started_service(engine: FakeEngine, queue_tokens: int = 100) -> TeacherService:
    service = open_service(engine, LIMITS, queue_tokens=queue_tokens)
    await service.start()
    return service


async def test_a_stream_over_the_budget_is_held_back_and_nothing_of_it_refused() -> None:
    engine = FakeEngine()
    service = await started_service(engine, queue_tokens=64)
    engine.hold()
    wire = Wire(service, *OPENING, *(sequence(str(index), 30) for index in range(5)), None)
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: engine.num_running == 2 and num_held(service) == 1)
    assert wire.sent.qsize() == 3, "the third waits; what is behind it has not been read"
    assert reserved_tokens(service) == 60
    engine.let_go()
    await running
    assert sorted(wire.names("chunk")) == ["0", "1", "2", "3", "4"]
    assert wire.names("failure") == []
    assert reserved_tokens(service) == 0


async def test_answers_return_as_they_finish_and_the_request_id_is_told_first() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.hold()
    wire = Wire(service, *OPENING, sequence("slow"), stream_sequence(Question([], name="empty"), CONTEXTS))
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: wire.names("chunk") == ["empty"])
    assert wire.answers[0].opened == pb.StreamOpened(request_id="r", model_revision="formula-1")
    engine.let_go()
    wire.send(None)
    await running
    assert wire.names("chunk") == ["empty", "slow"]


async def test_the_queue_time_of_an_answer_holds_the_engines_and_the_time_it_was_held_back() -> None:
    engine = FakeEngine()
    service = await started_service(engine, queue_tokens=64)
    blocker = take(service, 64)
    wire = Wire(service, *OPENING, sequence("held"), sequence("not held"), None)
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: num_held(service) == 1)
    await asyncio.sleep(0.05)
    service.admission.leave(blocker, answered=False)
    await running
    times = {a.chunk.scores.sequence_id: a.chunk.scores for a in wire.answers if a.HasField("chunk")}
    assert times["held"].queue_time_s >= QUEUE_TIME_S + 0.04
    assert times["not held"].queue_time_s >= QUEUE_TIME_S
    assert times["held"].engine_time_s == ENGINE_TIME_S


async def test_a_sequence_that_fails_leaves_the_stream_open() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.fail(lambda request: EngineError("broken") if len(request.completion_ids) == 3 else None)
    too_long = sequence("too long", 65)
    wire = Wire(service, *OPENING, sequence("bad", 5), too_long, sequence("good"), None)
    await wire.stream.run()
    assert wire.names("chunk") == ["good"]
    failures = {answer.failure.sequence_id: answer.failure for answer in wire.answers if answer.HasField("failure")}
    assert failures["bad"].code == 13
    assert (failures["too long"].code, failures["too long"].field) == (3, "sequence")
    assert reserved_tokens(service) == 0


async def test_a_client_that_reads_no_answers_is_ended_and_gives_its_tokens_back() -> None:
    service = await started_service(FakeEngine())
    wire = Wire(service, *OPENING)
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: bool(wire.answers))
    wire.is_read.clear()
    wire.send(sequence("a"), sequence("b"))
    with pytest.raises(DeadlineError, match=r"left unread for 0\.05 s"):
        await running
    assert reserved_tokens(service) == 0


async def test_draining_answers_what_was_read_and_sends_the_client_elsewhere_with_the_rest() -> None:
    engine = FakeEngine()
    service = await started_service(engine, queue_tokens=64)
    engine.hold()
    wire = Wire(service, *OPENING, sequence("in", 40), sequence("held back", 40), sequence("late"))
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: engine.num_running == 1 and num_held(service) == 1)
    service.drain()
    engine.let_go()
    with pytest.raises(UnavailableError, match="shutting down"):
        await running
    assert wire.names("chunk") == ["in", "held back"]
    (late,) = [answer.failure for answer in wire.answers if answer.HasField("failure")]
    assert (late.sequence_id, late.code) == ("late", 14)
    assert late.retry_delay_s > 0
    assert reserved_tokens(service) == 0


async def test_draining_ends_a_stream_that_has_nothing_to_say() -> None:
    service = await started_service(FakeEngine())
    wire = Wire(service, *OPENING)
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: bool(wire.answers))
    service.drain()
    with pytest.raises(UnavailableError, match="shutting down"):
        await running


async def test_the_end_of_a_stream_lets_a_half_written_failure_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vopd_server.grpc_stream.LAST_WORDS_S", 0.01)
    service = await started_service(FakeEngine())
    wire = Wire(service, *OPENING, answer_timeout_s=60)
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: bool(wire.answers))
    wire.is_read.clear()
    wire.send(sequence("too long", 65))
    await until(lambda: wire.stream.num_sequences == 1)
    service.drain()
    await asyncio.sleep(0.1)  # were it shorter than the stream's end takes, the test would only be weaker
    wire.is_read.set()
    with pytest.raises(UnavailableError):
        await running
    assert wire.names("failure") == ["too long"]


async def test_what_the_client_was_about_to_send_is_heard_before_an_error_is_told() -> None:
    service = await started_service(FakeEngine())
    wire = Wire(service, stream_settings(temperature=-1.0), *OPENING[1:], sequence("a"), sequence("b"), None)
    with pytest.raises(InvalidRequestError, match="temperature"):
        await wire.stream.run()
    assert wire.sent.empty()
    assert reserved_tokens(service) == 0


async def test_a_stream_that_had_been_sent_whole_ends_well_while_draining() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.hold()
    wire = Wire(service, *OPENING, sequence("last"), None)
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: engine.num_running == 1 and wire.sent.empty())
    await asyncio.sleep(0)
    service.drain()
    engine.let_go()
    await running
    assert wire.names("chunk") == ["last"]


@pytest.mark.parametrize("steps", range(8))
async def test_a_stream_that_is_cancelled_at_any_step_gives_everything_back(steps: int) -> None:
    engine = FakeEngine()
    service = await started_service(engine, queue_tokens=20)
    engine.hold()
    wire = Wire(service, *OPENING, *(sequence(str(index), 8) for index in range(4)))
    running = asyncio.create_task(wire.stream.run())
    for _ in range(steps):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (reserved_tokens(service), num_held(service), engine.num_running) == (0, 0, 0)
    assert engine.num_cancelled == len(engine.requests)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([None], "settings"),
        ([stream_context(0, [1])], "settings"),
        ([*OPENING, stream_settings()], "settings"),
        ([*OPENING, pb.ScoreStreamRequest()], "ScoreStreamRequest"),
        ([stream_settings(temperature=0.0)], "temperature"),
        ([stream_settings(float_type=9)], "float_type"),
        ([*OPENING, pb.ScoreStreamRequest(release_context=pb.ReleaseContext(context_index=7))], "release_context"),
        ([*OPENING, b"\xff\xff\xff"], "ScoreStreamRequest"),
    ],
)
async def test_a_message_that_makes_no_sense_ends_the_stream(
    messages: Sequence[Message | bytes | None], field: str
) -> None:
    service = await started_service(FakeEngine())
    with pytest.raises(InvalidRequestError) as refused:
        await Wire(service, *messages).stream.run()
    assert refused.value.field.startswith(field)
    assert reserved_tokens(service) == 0


# ---------------------------------------------------------------- contexts


def context(index: int, ids: Sequence[int]) -> pb.StreamContext:
    return stream_context(index, ids).context


def test_contexts_are_kept_until_they_are_released_or_replaced() -> None:
    contexts = StreamContexts(max_contexts=2, max_tokens=5)
    contexts.keep(context(3, [1, 2]))
    contexts.keep(context(4, [5]))
    contexts.keep(context(3, [7, 8, 9, 10]))
    assert contexts.find(3).tolist() == [7, 8, 9, 10]
    contexts.release(3)
    contexts.keep(context(9, [1, 1, 1, 1]))
    for gone in (3, 8):
        with pytest.raises(InvalidRequestError, match=f"{gone}; no such context"):
            contexts.find(gone)


@pytest.mark.parametrize("too_many", [[[1], [2], [3]], [[1], [1, 2, 3, 4, 5]]], ids=["contexts", "tokens"])
def test_a_stream_may_keep_so_many_contexts_and_tokens(too_many: list[list[int]]) -> None:
    contexts = StreamContexts(max_contexts=2, max_tokens=5)
    *fit, one_more = [context(index, ids) for index, ids in enumerate(too_many)]
    for kept in fit:
        contexts.keep(kept)
    with pytest.raises(InvalidRequestError, match="that a stream may keep: release"):
        contexts.keep(one_more)


def test_a_broken_context_fails_those_who_use_it() -> None:
    contexts = StreamContexts(max_contexts=2, max_tokens=5)
    broken = context(1, [70_000])
    broken.ids.data += b"x"
    contexts.keep(broken)
    contexts.keep(context(2, [1, 2, 3, 4, 5]))
    with pytest.raises(InvalidRequestError, match=r"contexts\[1\].ids: 4 bytes are not a whole number"):
        contexts.find(1)


async def test_a_stream_that_waits_is_told_for_what_while_nothing_else_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_stream, "TELL_WHY_EVERY_S", 0.02)
    engine = FakeEngine()
    service = await started_service(engine, queue_tokens=64)
    engine.hold()
    wire = Wire(service, *OPENING, sequence("runs", 40), answer_timeout_s=5)
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: bool(waits(wire)))
    assert waits(wire)[-1] == (pb.StreamWaiting.ENGINE, "sequences of tenant open in the engine: 1")
    wire.send(sequence("held", 40), None)
    await until(lambda: waits(wire)[-1][0] == pb.StreamWaiting.QUEUE_BOUND)
    assert waits(wire)[-1][1] == "tenant open has 40 of 64 tokens unanswered"
    engine.let_go()
    await running
    told = len(waits(wire))
    assert sorted(wire.names("chunk")) == ["held", "runs"]
    await asyncio.sleep(0.06)
    assert len(waits(wire)) == told, "a stream that is over tells nothing"


async def test_an_idle_stream_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "TELL_WHY_EVERY_S", 0.02)
    service = await started_service(FakeEngine())
    wire = Wire(service, *OPENING, sequence("one"))
    running = asyncio.create_task(wire.stream.run())
    await until(lambda: wire.names("chunk") == ["one"])
    await asyncio.sleep(0.1)
    assert waits(wire) == []
    wire.send(None)
    await running


def waits(wire: Wire) -> list[tuple[int, str]]:
    return [(told.waiting.reason, told.waiting.message) for told in wire.answers if told.HasField("waiting")]
