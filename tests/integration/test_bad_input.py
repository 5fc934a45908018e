"""Bad input gets a clear error, nothing is lost, and the next request is answered normally.

Every test runs against the real server on a real socket, every way to ask where it exists, and ends with a normal
request on the same server (and the same connection) and with an empty budget. What only HTTP can get wrong is in
test_http_api.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from fake_engine import FakeEngine, fake_logprobs_TV, until
from fake_server import FakeTeacher, fake_teacher
from vopd_proto import teacher_pb2 as pb
from wire_client import (
    Answer,
    Question,
    Refusal,
    RefusedError,
    WireClient,
    connect,
    refusal_of,
    score_request,
    stream_context,
    stream_sequence,
    stream_settings,
)

CONTEXTS: list[Sequence[int]] = [[1, 2, 3], [4]]
GOOD = Question([5, 6], name="good")
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
async def teacher() -> AsyncIterator[FakeTeacher]:
    """A small teacher; whatever was done to it, it answers afterwards and holds nothing."""
    engine = FakeEngine(max_context_length=64)
    async with fake_teacher(engine, max_tokens_per_request=128, queue_tokens=256, max_top_k=16) as running:
        yield running
        await until(lambda: running.reserved_tokens == 0 and running.num_waiting == 0)
        await assert_answers(running.client)
        assert engine.num_running == 0


LARGE_HEAD_BYTES = 32 * 2**20  # more than a connection buffers


@pytest.fixture
async def large_head() -> AsyncIterator[FakeTeacher]:
    """A teacher whose head takes a while to send."""
    async with fake_teacher(FakeEngine(gives_head=True)) as running:
        running.engine.lengthen_head(LARGE_HEAD_BYTES)
        yield running


WAYS: list[Any] = [
    WireClient.score,
    WireClient.score_stream,
    WireClient.score_http_protobuf,
    WireClient.score_http_json,
]
SENDS: list[Any] = [WireClient.send_score, WireClient.post_score]  # a whole ScoreRequest, in gRPC and in HTTP


async def assert_answers(client: WireClient) -> None:
    for way in WAYS:
        (answer,) = await way(client, CONTEXTS, [GOOD])
        assert_good(answer)


def assert_good(answer: Any) -> None:
    expected_TV = fake_logprobs_TV(np.asarray(CONTEXTS[0]), np.asarray(GOOD.completion))
    np.testing.assert_allclose(answer.sampled_T, expected_TV[[0, 1], [5, 6]], atol=1e-6)


async def refused(asking: Awaitable[object]) -> Refusal:
    with pytest.raises(RefusedError) as error:
        await asking
    return error.value.refusal


# ---------------------------------------------------------------- one wrong sequence


def declare(**lengths: int) -> Callable[[pb.Sequence], None]:
    def edit(sequence: pb.Sequence) -> None:
        for name, length in lengths.items():
            setattr(sequence, name, length)

    return edit


def wrong_counts(sequence: pb.Sequence) -> None:
    sequence.candidates.counts.data = bytes([1, 2])


def half_an_id(sequence: pb.Sequence) -> None:
    sequence.completion_ids.bytes_per_item = 2
    sequence.completion_ids.data = b"\x01\x02\x03\x04\x05"


def no_width(sequence: pb.Sequence) -> None:
    sequence.completion_ids.bytes_per_item = 9
    sequence.completion_length = 0


def unknown_field(sequence: pb.Sequence) -> None:
    sequence.MergeFromString(b"\xf8\x06\x01")  # number 111


def keep(_: pb.Sequence) -> None:
    """As it is."""


WRONG_SEQUENCES: list[Any] = [
    pytest.param(Question([300]), keep, "completion_ids", "id 300 at position 0 is not in [0, 300)", id="id"),
    pytest.param(
        Question([1], candidates=[[299, 300]]), keep, "candidates.ids", "id 300 at position 1", id="candidate id"
    ),
    pytest.param(Question([1], context=3), keep, "context_ids", "empty", id="empty context"),
    pytest.param(Question([1], context=2), keep, "context_ids", "id 999 at position 1", id="context id"),
    pytest.param(
        Question([7] * 62),
        keep,
        "",
        "context 3 + completion 62 tokens > max_context_length 64",
        id="longer than the model",
    ),
    pytest.param(Question([1], k=0), keep, "teacher_top_k.k", "0; it must lie in [1, 16]", id="k zero"),
    pytest.param(Question([1], k=17), keep, "teacher_top_k.k", "17; it must lie in [1, 16]", id="k beyond the limit"),
    pytest.param(
        Question([1], candidates=[[1] * 17]), keep, "num_candidates", "17 candidates > 1", id="too many candidates"
    ),
    pytest.param(
        Question([1, 2], candidates=[[1] * 17, []]),
        keep,
        "candidates.counts",
        "17 candidates at position 0",
        id="wide row",
    ),
    pytest.param(
        Question([1, 2], candidates=[[1], [2]]),
        wrong_counts,
        "candidates.counts",
        "add up to 3; there are 2",
        id="counts",
    ),
    pytest.param(
        Question([1, 2], candidates=[[1]]), keep, "candidates.counts", "1 counts for 2 completion tokens", id="ragged"
    ),
    pytest.param(Question([1, 2]), declare(completion_length=3), "completion_length", "declared 3", id="declared T"),
    pytest.param(Question([1, 2]), declare(context_length=2), "context_length", "declared 2", id="declared C"),
    pytest.param(Question([1, 2]), declare(num_candidates=2), "num_candidates", "declared 2", id="declared K"),
    pytest.param(Question([1, 2]), half_an_id, "completion_ids", "5 bytes are not a whole number", id="half an id"),
    pytest.param(Question([1, 2]), no_width, "completion_ids", "bytes_per_item is 9", id="no such width"),
    pytest.param(Question([1, 2]), unknown_field, "", "by number: 111", id="unknown field"),
    pytest.param(Question([1, 2]), declare(context_index=9), "context_index", "9; ", id="no such context"),
    pytest.param(Question([1], name="n" * 257), keep, "sequence_id", "257 characters > 256", id="long name"),
]
BAD_CONTEXTS: list[Sequence[int]] = [*CONTEXTS, [1, 999], []]


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize(("question", "edit", "field", "words"), WRONG_SEQUENCES)
async def test_score_refuses_all_of_a_request_with_one_wrong_sequence(
    teacher: FakeTeacher, send: Any, question: Question, edit: Callable[[pb.Sequence], None], field: str, words: str
) -> None:
    request = score_request(BAD_CONTEXTS, [GOOD, question])
    edit(request.sequences[1])
    refusal = await refused(send(teacher.client, request))
    assert (refusal.code, refusal.field) == (INVALID, full_field("sequences[1]", field))
    assert words in refusal.message
    assert teacher.engine.requests == []


@pytest.mark.parametrize(("question", "edit", "field", "words"), WRONG_SEQUENCES)
async def test_a_stream_answers_a_wrong_sequence_with_its_failure_and_goes_on(
    teacher: FakeTeacher, question: Question, edit: Callable[[pb.Sequence], None], field: str, words: str
) -> None:
    wrong = stream_sequence(question, BAD_CONTEXTS)
    edit(wrong.sequence)
    messages = [
        stream_settings(),
        *(stream_context(index, context) for index, context in enumerate(BAD_CONTEXTS)),
        wrong,
        stream_sequence(GOOD, CONTEXTS),
    ]
    outcomes = await teacher.client.send_stream(messages)
    refusal = outcomes[question.name]
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.field) == (INVALID, full_field("sequence", field))
    assert words in refusal.message
    assert_good(outcomes["good"])


def full_field(sequence: str, field: str) -> str:
    return f"{sequence}.{field}" if field else sequence


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "odd",
    [
        Question([]),
        Question([], k=3),
        Question([7, 7], candidates=[[5, 5, 5], []]),
        Question([7], candidates=[[]]),
    ],
    ids=["empty completion", "empty completion with top-k", "duplicate candidates", "empty positions"],
)
async def test_what_is_odd_but_valid_is_answered(teacher: FakeTeacher, way: Any, odd: Question) -> None:
    answer, good = await way(teacher.client, CONTEXTS, [odd, GOOD])
    assert len(answer.sampled_T) == len(odd.completion)
    if odd.candidates is not None:
        assert len(answer.support) == sum(map(len, odd.candidates))
    assert_good(good)


# ---------------------------------------------------------------- a wrong request


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 0.0, -1.0])
async def test_what_is_no_temperature_is_refused(teacher: FakeTeacher, way: Any, temperature: float) -> None:
    refusal = await refused(way(teacher.client, CONTEXTS, [GOOD], temperature=temperature))
    assert (refusal.code, refusal.field) == (INVALID, "temperature")
    assert f"{temperature}" in refusal.message


@pytest.mark.parametrize("way", WAYS[:3])
async def test_an_unknown_float_type_is_refused(teacher: FakeTeacher, way: Any) -> None:
    refusal = await refused(way(teacher.client, CONTEXTS, [GOOD], float_type=9))
    assert (refusal.code, refusal.field) == (INVALID, "float_type")


@pytest.mark.parametrize("way", [WireClient.score, WireClient.score_http_protobuf, WireClient.score_http_json])
@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([], "holds none"),
        ([Question([1])] * 300, "300 sequences > max_sequences_per_request 256"),
        ([Question([1] * 40)] * 3, "129 tokens > max_tokens_per_request 128"),
    ],
)
async def test_a_request_that_is_empty_or_too_large_is_refused(
    teacher: FakeTeacher, way: Any, questions: list[Question], words: str
) -> None:
    refusal = await refused(way(teacher.client, CONTEXTS, questions))
    assert (refusal.code, refusal.field) == (INVALID, "sequences")
    assert words in refusal.message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("question", "temperature", "words"),
    [
        (Question([1], candidates=[[1]]), None, "no candidates support; it has sampled, teacher_top_k"),
        (Question([1]), 0.5, "temperature 0.5: engine fake scores at temperature 1 only"),
    ],
)
async def test_what_the_engine_cannot_do_is_refused_by_naming_what_it_can(
    way: Any, question: Question, temperature: float | None, words: str
) -> None:
    engine = FakeEngine(supports=frozenset({"sampled", "teacher_top_k"}), any_temperature=False)
    async with fake_teacher(engine) as teacher:
        refusal = await refused(way(teacher.client, CONTEXTS, [question], temperature=temperature))
        assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
        assert words in refusal.message
        await assert_answers(teacher.client)


@pytest.mark.parametrize("send", SENDS)
async def test_hidden_states_and_the_head_are_refused_in_words(teacher: FakeTeacher, send: Any) -> None:
    request = score_request(CONTEXTS, [GOOD])
    request.sequences[0].hidden_states.SetInParent()
    refusal = await refused(send(teacher.client, request))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "no hidden_states support; it has candidates, sampled, teacher_top_k" in refusal.message
    for fetch in (teacher.client.head, teacher.client.head_http):
        refusal = await refused(fetch())
        assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "it has candidates, sampled, teacher_top_k" in refusal.message


@pytest.mark.parametrize("method", ["GetInfo", "GetTokenizer", "Score"])
async def test_an_unknown_field_is_named_whatever_the_method(teacher: FakeTeacher, method: str) -> None:
    with pytest.raises(aio.AioRpcError) as failed:
        await teacher.client.unary(method, b"\xf8\x06\x01", pb.ScoreResponse)
    refusal = refusal_of(failed.value)
    assert (refusal.code, refusal.field) == (INVALID, f"{method}Request")
    assert "by number: 111" in refusal.message


async def test_what_is_no_request_for_the_head_is_refused_too(teacher: FakeTeacher) -> None:
    for data, words in ((b"\xf8\x06\x01", "by number: 111"), (b"\x07", "no GetHeadRequest message")):
        with pytest.raises(aio.AioRpcError) as failed:
            await teacher.client.head_stream(data).read()
        refusal = refusal_of(failed.value)
        assert (refusal.code, refusal.field) == (INVALID, "GetHeadRequest")
        assert words in refusal.message


async def test_random_bytes_are_refused_by_every_method(teacher: FakeTeacher) -> None:
    generator = random.Random(7)
    for number in range(60):
        garbage = b"\x07" + generator.randbytes(generator.randrange(1, 200))  # wire type 7 does not exist
        method = ("GetInfo", "GetTokenizer", "Score")[number % 3]
        with pytest.raises(aio.AioRpcError) as failed:
            await teacher.client.unary(method, garbage, pb.ScoreResponse)
        assert failed.value.code() is INVALID
        assert (await refused(teacher.client.post_score(garbage))).code is INVALID
        refusal = await refused(teacher.client.send_stream([stream_settings(), garbage]))
        assert refusal.code is INVALID


async def test_a_stream_that_does_not_begin_with_its_settings_is_refused(teacher: FakeTeacher) -> None:
    refusal = await refused(teacher.client.send_stream([stream_context(0, [1])]))
    assert (refusal.code, refusal.field) == (INVALID, "settings")


async def test_a_message_over_the_limit_is_refused_and_the_connection_lives_on() -> None:
    settings = {"max_message_bytes": 2**21, "max_tokens_per_request": 128, "max_sequences_per_request": 8}
    async with fake_teacher(FakeEngine(), **settings) as teacher:
        too_large = score_request(CONTEXTS, [GOOD])
        too_large.request_id = "x" * 2**21
        for asking in (
            teacher.client.send_score(too_large),
            teacher.client.send_stream([stream_settings(request_id=too_large.request_id)]),
        ):
            refusal = await refused(asking)
            assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"vs. {2**21}" in refusal.message
        await assert_answers(teacher.client)


async def test_an_answer_over_the_limit_is_refused_before_any_work_and_streams() -> None:
    settings = {"max_message_bytes": 2**21, "max_tokens_per_request": 4096, "max_sequences_per_request": 8}
    async with fake_teacher(FakeEngine(), **settings) as teacher:
        question = Question([1] * 4000, k=100)
        refusal = await refused(teacher.client.score(CONTEXTS, [question]))
        assert (refusal.code, refusal.field) == (INVALID, "sequences")
        assert "max_message_bytes 2097152" in refusal.message
        assert "ScoreStream" in refusal.message
        assert teacher.engine.requests == []
        (answer,) = await teacher.client.score_stream(CONTEXTS, [question])
        assert answer.support is not None
        assert answer.support.shape == (4000, 100)


@pytest.mark.parametrize("way", [WireClient.score, WireClient.score_http_protobuf])
async def test_hidden_states_over_the_limit_are_refused_before_any_work_and_stream(way: Any) -> None:
    settings = {"max_message_bytes": 2**21, "max_tokens_per_request": 70_000, "max_sequences_per_request": 8}
    async with fake_teacher(FakeEngine(gives_head=True), **settings) as teacher:
        question = Question([1] * 60_000, hidden=True)
        refusal = await refused(way(teacher.client, CONTEXTS, [question]))
        assert (refusal.code, refusal.field) == (INVALID, "sequences")
        assert f"an answer of up to {60_000 * 4 * 9 + 1280} bytes > max_message_bytes 2097152" in refusal.message
        assert teacher.engine.requests == []
        (answer,) = await way(teacher.client, CONTEXTS, [question], float_type=pb.BFLOAT16)
        (streamed,) = await teacher.client.score_stream(CONTEXTS, [question])
        assert answer.hidden_TH is not None
        assert streamed.hidden_TH is not None
        assert answer.hidden_TH.shape == streamed.hidden_TH.shape == (60_000, 8)


# ---------------------------------------------------------------- clients that go away, and too many of them


async def test_a_unary_client_that_goes_away_gives_its_budget_back(teacher: FakeTeacher) -> None:
    teacher.engine.hold()
    async with connect(teacher.url) as client:
        call = asyncio.ensure_future(client.send_score(score_request(CONTEXTS, [GOOD, GOOD])))
        await until(lambda: teacher.engine.num_running == 2)
        assert teacher.reserved_tokens == 10
        call.cancel()
        await until(lambda: teacher.engine.num_cancelled == 2 and teacher.reserved_tokens == 0)
        with pytest.raises(asyncio.CancelledError):
            await call
    teacher.engine.let_go()


async def test_a_client_that_disconnects_in_mid_stream_gives_its_budget_back(teacher: FakeTeacher) -> None:
    teacher.engine.hold()
    async with connect(teacher.url) as client:
        stream = client.stream()
        long = Question([1] * 60)
        for message in [stream_settings(), stream_context(0, CONTEXTS[0]), *[stream_sequence(long, CONTEXTS)] * 9]:
            await stream.write(message)
        await until(lambda: teacher.engine.num_running == 4 and teacher.num_waiting == 1)
    # The connection is closed with four sequences in the engine and one that waits to come in.
    await until(lambda: teacher.engine.num_cancelled == 4 and teacher.reserved_tokens == 0)
    assert teacher.num_waiting == 0
    teacher.engine.let_go()


async def test_a_client_that_sends_half_a_stream_and_leaves_is_forgotten(teacher: FakeTeacher) -> None:
    async with connect(teacher.url) as client:
        stream = client.stream()
        await stream.write(stream_settings())
        assert (await stream.read()).WhichOneof("message") == "opened"
    await until(lambda: teacher.server.service.is_idle)


async def test_a_client_that_leaves_in_the_middle_of_the_head_is_forgotten(large_head: FakeTeacher) -> None:
    async with connect(large_head.url) as client:
        call = client.head_stream()
        assert (await call.read()).num_bytes == LARGE_HEAD_BYTES
        assert not large_head.server.service.is_idle
    await until(lambda: large_head.server.service.is_idle)
    assert len(await large_head.client.head()) == LARGE_HEAD_BYTES


async def test_a_deadline_that_passes_ends_the_head(large_head: FakeTeacher) -> None:
    call = large_head.client.head_stream(timeout_s=0.3)
    await call.read()
    await asyncio.sleep(0.4)  # not reading: what is in flight fills the connection

    async def read_to_the_end() -> None:
        while await call.read() is not aio.EOF:
            pass

    with pytest.raises(aio.AioRpcError) as failed:
        await read_to_the_end()
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: large_head.server.service.is_idle)


@pytest.mark.parametrize("transport", ["Score", "ScoreStream", "HTTP"])
async def test_a_deadline_that_passes_cancels_the_engine_and_gives_the_budget_back(
    teacher: FakeTeacher, transport: str
) -> None:
    teacher.engine.hold()
    if transport == "ScoreStream":
        stream = teacher.client.stream(timeout_s=0.3)
        for message in (stream_settings(), stream_context(0, CONTEXTS[0]), stream_sequence(GOOD, CONTEXTS)):
            await stream.write(message)
        await stream.read()
        with pytest.raises(aio.AioRpcError) as failed:
            await stream.read()
        code = failed.value.code()
    else:
        send = teacher.client.post_score if transport == "HTTP" else teacher.client.send_score
        refusal = await refused(send(score_request(CONTEXTS, [GOOD]), timeout_s=0.3))
        code = refusal.code
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: teacher.engine.num_cancelled == 1 and teacher.reserved_tokens == 0)
    teacher.engine.let_go()


async def test_over_the_queue_bound_a_call_is_refused_with_a_delay_and_a_stream_is_held(teacher: FakeTeacher) -> None:
    teacher.engine.hold()
    full = score_request(CONTEXTS, [Question([1] * 61)] * 2)
    running = [asyncio.ensure_future(teacher.client.send_score(full)) for _ in range(2)]
    await until(lambda: teacher.reserved_tokens == 256)
    for send in SENDS:
        refusal = await refused(send(teacher.client, score_request(CONTEXTS, [GOOD])))
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "queue_tokens 256" in refusal.message
        assert refusal.retry_delay_s == 1.0, "no rate is known yet"
    held = asyncio.ensure_future(teacher.client.score_stream(CONTEXTS, [GOOD]))
    await until(lambda: teacher.num_waiting == 1)
    teacher.engine.let_go()
    assert_good((await held)[0])
    await asyncio.gather(*running)


async def test_two_requests_with_one_id_are_answered_each_on_its_own(teacher: FakeTeacher) -> None:
    teacher.engine.hold()
    other = Question([9], context=1, name="same")
    asked = [[Question([5, 6], name="same")], [other], [other]]
    answering = [
        asyncio.ensure_future(teacher.client.score(CONTEXTS, questions, request_id="one id")) for questions in asked
    ]
    await until(lambda: teacher.engine.num_running == 3)
    teacher.engine.let_go()
    first, second, third = await asyncio.gather(*answering)
    assert_good(first[0])
    assert [len(answers[0].sampled_T) for answers in (second, third)] == [1, 1]


async def test_sequences_of_one_stream_may_share_a_name(teacher: FakeTeacher) -> None:
    named = Question([5, 6], name="same")
    stream = teacher.client.stream()
    for message in (stream_settings(), stream_context(0, CONTEXTS[0]), *[stream_sequence(named, CONTEXTS)] * 3):
        await stream.write(message)
    await stream.done_writing()
    responses = [response async for response in stream]
    assert [response.chunk.scores.sequence_id for response in responses[1:]] == ["same"] * 3
    assert all(response.chunk.is_last for response in responses[1:])


# ---------------------------------------------------------------- an engine that fails


@pytest.mark.parametrize("way", WAYS)
async def test_an_engine_that_breaks_is_an_internal_error_without_a_traceback(teacher: FakeTeacher, way: Any) -> None:
    teacher.engine.fail(lambda _: ZeroDivisionError("secret detail in /some/file.py"))
    refusal = await refused(way(teacher.client, CONTEXTS, [GOOD]))
    teacher.engine.fail(lambda _: None)
    assert refusal.code is grpc.StatusCode.INTERNAL
    assert "the engine failed" in refusal.message
    assert not {"secret", "Traceback", ".py"} & set(refusal.message.replace("/", " ").split())


@pytest.mark.parametrize("send", SENDS)
async def test_a_bug_of_the_server_is_an_internal_error_with_the_request_id(
    teacher: FakeTeacher, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> list[Answer]:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patched:
        patched.setattr(teacher.server.service, "scored_batch", broken)
        request = score_request(CONTEXTS, [GOOD])
        request.request_id = "find-me"
        refusal = await refused(send(teacher.client, request))
    assert refusal.code is grpc.StatusCode.INTERNAL
    assert refusal.request_id == "find-me"
    assert "find-me" in refusal.message
    assert "secret" not in refusal.message
