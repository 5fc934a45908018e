"""Several replicas behind one client: who gets what, who is missed, who comes back, and who is not let in."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc
import numpy as np
import pytest

from asking import assert_answers, sequence, until
from fake_engine import FakeEngine, fake_logprobs_TV
from fake_http_teacher import FakeHttpTeacher
from fake_server import fake_teacher
from fake_teacher import FakeTeacher, Refusal, Script
from vopd_client.errors import HandshakeError, TeacherInternalError, TeacherRequestError, TeacherUnavailableError
from vopd_client.teacher import TeacherClient, stream
from vopd_client.types import SequenceToScore
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import pack_floats, unpack_floats
from vopd_server.types import ScoreRequest, Scores

UNAVAILABLE = Refusal(grpc.StatusCode.UNAVAILABLE)
PROTOCOLS = {"grpc": FakeTeacher, "http": FakeHttpTeacher}


@pytest.fixture(params=["grpc grpc", "http http", "grpc http", "http grpc"])
def teacher_types(request: pytest.FixtureRequest) -> list[type[FakeTeacher]]:
    """Of two replicas, which need not speak the same."""
    return [PROTOCOLS[name] for name in request.param.split()]


async def submit_all(client: TeacherClient, asked: list[SequenceToScore]) -> None:
    """Asks for all at once over a stream of its own; every answer must be the right one."""
    async with client.open_stream() as scores:
        for answer, question in zip(await asyncio.gather(*map(scores.submit, asked)), asked, strict=True):
            assert_answers(answer, question)


def why_missing(client: TeacherClient, teacher: FakeTeacher) -> str:
    """Empty when it is there."""
    [use] = [use for use in client.replicas if use.url == teacher.url]
    return use.missing


def score_lower(scores: pb.SequenceScores) -> None:
    """As other weights do."""
    shifted = unpack_floats(scores.sampled_logprobs) - 0.5
    scores.sampled_logprobs.CopyFrom(pack_floats(shifted, pb.FLOAT32))


# ---------------------------------------------------------------- balance


async def test_equal_replicas_share_the_work_equally(teacher_type):
    async with (
        teacher_type() as first,
        teacher_type() as second,
        TeacherClient([first.url, second.url], window=15) as client,
    ):
        await submit_all(client, [sequence(index, num_contexts=200) for index in range(200)])
        for teacher, use in zip((first, second), client.replicas, strict=True):
            assert 70 <= teacher.record.num_sequences <= 130
            assert (use.url, use.missing) == (teacher.url, "")
            assert use.num_sequences == teacher.record.num_sequences
            assert use.num_tokens == 4 * use.num_sequences
            assert use.bytes_sent > teacher.record.bytes_in > 0  # with the probe
            assert use.bytes_received > teacher.record.bytes_out > 0
            assert use.num_taken_back == 0
        assert first.record.num_sequences + second.record.num_sequences == 200
        assert client.bytes_sent == sum(use.bytes_sent for use in client.replicas)


async def test_the_window_is_for_all_replicas_together(teacher_types):
    async with (
        teacher_types[0](Script(hold_answers_until=1000)) as first,
        teacher_types[1](Script(hold_answers_until=1000)) as second,
        TeacherClient([first.url, second.url], window=15) as client,
        client.open_stream() as scores,
    ):
        tasks = [asyncio.create_task(scores.submit(sequence(index))) for index in range(60)]
        await until(lambda: first.record.num_sequences + second.record.num_sequences == 16)
        await asyncio.sleep(0.1)
        assert first.record.num_sequences == second.record.num_sequences == 8  # half of 15, rounded up
        for task in tasks:
            task.cancel()


async def test_a_group_with_one_context_stays_together(teacher_type):
    contexts = [np.arange(50) + start for start in range(10)]
    asked = [SequenceToScore(context, np.arange(5) + index) for context in contexts for index in range(8)]
    async with (
        teacher_type(Script(hold_answers_until=40)) as first,
        teacher_type(Script(hold_answers_until=40)) as second,
    ):
        async with TeacherClient([first.url, second.url], window=100) as client:
            await submit_all(client, asked)
            uses = client.replicas
        assert [use.num_sequences for use in uses] == [40, 40]
        if teacher_type is FakeTeacher:  # over HTTP a context comes with each of its sequences
            assert [len(teacher.record.contexts(0)) for teacher in (first, second)] == [5, 5]


class OneAtATime(FakeEngine):
    """Each sequence takes as long, and no two at once: as an engine that is busy."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._turn = asyncio.Lock()

    async def score(self, request: ScoreRequest) -> Scores:
        async with self._turn:
            await asyncio.sleep(self._seconds)
        return await super().score(request)


def formula_sequences(num_sequences: int) -> list[SequenceToScore]:
    rng = np.random.default_rng(0)
    return [SequenceToScore(rng.integers(0, 300, 12), rng.integers(0, 300, 9)) for _ in range(num_sequences)]


async def test_a_slow_replica_gets_less():
    asked = formula_sequences(150)
    async with (
        fake_teacher(OneAtATime(0.004)) as fast,
        fake_teacher(OneAtATime(0.016)) as slow,
        TeacherClient([slow.url, fast.server.http_url], window=10) as client,
        client.open_stream() as scores,
    ):
        for answer, question in zip(await asyncio.gather(*map(scores.submit, asked)), asked, strict=True):
            expected_TV = fake_logprobs_TV(question.context_ids, question.completion_ids)
            np.testing.assert_allclose(
                answer.sampled_logprobs_T, expected_TV[range(9), question.completion_ids], atol=1e-5
            )
        slow_use, fast_use = client.replicas
    assert slow_use.num_sequences + fast_use.num_sequences == 150
    assert slow_use.num_sequences < 60  # 30 if it were all by speed, 75 if by turns


async def test_unary_requests_are_spread_as_well(teacher_types):
    asked = [sequence(index) for index in range(160)]
    async with (
        teacher_types[0]() as first,
        teacher_types[1]() as second,
        TeacherClient([first.url, second.url]) as client,
    ):
        for answer, question in zip(await client.score(asked), asked, strict=True):
            assert_answers(answer, question)
    assert min(len(first.record.score_requests), len(second.record.score_requests)) >= 6  # of 20
    assert first.record.num_sequences + second.record.num_sequences == 160


async def test_one_url_has_one_stream_and_is_not_probed(connected):
    async with connected() as (teacher, client):
        await submit_all(client, [sequence(index) for index in range(50)])
        await client.score([sequence()])
        [use] = client.replicas
        assert (teacher.record.num_probes, teacher.record.num_info_calls, len(teacher.record.streams)) in (
            (0, 1, 1),
            (0, 1, 2),  # over HTTP a request of one sequence passes for a stream
        )
        assert (use.num_sequences, use.bytes_sent) == (51, client.bytes_sent)


# ---------------------------------------------------------------- replicas that go and come


async def test_another_replica_takes_over_what_is_unanswered_and_nothing_else(teacher_types):
    asked = [sequence(index) for index in range(60)]
    async with (
        teacher_types[0](Script(hold_answers_until=1000)) as first,
        teacher_types[1]() as second,
        TeacherClient([first.url, second.url], window=40) as client,
        client.open_stream() as scores,
    ):
        tasks = [asyncio.create_task(scores.submit(question)) for question in asked]
        await until(lambda: sum(task.done() for task in tasks) == 40 == 60 - first.record.num_sequences)
        lost_s = time.monotonic()
        await first.stop()
        for answer, question in zip(await asyncio.gather(*tasks), asked, strict=True):
            assert_answers(answer, question)
        assert time.monotonic() - lost_s < 5.0  # no time-out is waited for
        assert second.record.num_sequences == 60  # each once
        assert [use.num_taken_back for use in client.replicas] == [20, 0]
        assert why_missing(client, first)


async def test_a_replica_that_comes_back_is_used_again_and_asked_whether_it_agrees(teacher_types):
    async with (
        teacher_types[0]() as first,
        teacher_types[1]() as second,
        TeacherClient([first.url, second.url]) as client,
        client.open_stream() as scores,
    ):
        await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)))
        for teacher in (first, second):
            await teacher.stop()
            await client.score([sequence()] * 8)  # over HTTP nobody notices before something is asked
            await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)))
            await until(lambda: why_missing(client, teacher))  # noqa: B023
            num_probes, num_sequences = teacher.record.num_probes, teacher.record.num_sequences
            await teacher.start()
            await until(lambda: not why_missing(client, teacher))  # noqa: B023
            assert teacher.record.num_probes == num_probes + 1
            asked = [sequence(index, num_contexts=50) for index in range(50)]
            for answer, question in zip(await asyncio.gather(*map(scores.submit, asked)), asked, strict=True):
                assert_answers(answer, question)
            assert teacher.record.num_sequences > num_sequences


async def test_a_replica_that_is_down_at_the_start_is_told_of_and_joins_later(teacher_types, caplog):
    async with teacher_types[0]() as late:
        pass
    async with teacher_types[1](Script(hold_answers_until=1000)) as there:
        async with TeacherClient([late.url, there.url]) as client, client.open_stream() as scores:
            assert f"teacher replica {late.url} is missing: connection refused" in caplog.text
            assert why_missing(client, late) == "connection refused"
            assert client.waiting_reason == ""  # nobody waits
            tasks = [asyncio.create_task(scores.submit(sequence(index, num_contexts=50))) for index in range(50)]
            await until(lambda: there.record.num_sequences == 50)
            assert client.waiting_reason.startswith(
                f"1 of 2 teacher replicas missing: {late.url}: connection refused ("
            )
            await late.start()
            await until(lambda: not why_missing(client, late))
            assert client.waiting_reason == ""
            more = await asyncio.gather(*(scores.submit(sequence(index, num_contexts=50)) for index in range(20)))
            assert len(more) == 20
            assert late.record.num_sequences == 20  # the other one had 50 to do
            for task in tasks:
                task.cancel()
        await late.stop()


async def test_nobody_there_is_waited_for_until_the_time_is_up_and_then_named():
    async with FakeTeacher() as first, FakeTeacher() as second:
        client = TeacherClient([first.url, second.url], timeout_s=1.0)
        await client.connect()
    async with client.open_stream() as scores:
        with pytest.raises(TeacherUnavailableError, match="no progress of the teacher for 1 s; last: 2 of 2 teacher"):
            await scores.submit(sequence())
    await client.close()


async def test_a_draining_replica_is_left_for_the_other_one(teacher_types):
    async with teacher_types[0]() as leaving, teacher_types[1]() as staying:
        async with TeacherClient([leaving.url, staying.url], window=20) as client:
            leaving.script.refuse_sequence.extend([UNAVAILABLE] * 1000)
            await submit_all(client, [sequence(index) for index in range(50)])
            assert len(leaving.script.refuse_sequence) <= 1000 - 1
        assert staying.record.num_sequences == 50
        assert staying.record.num_info_calls == 1


async def test_unary_requests_fail_over(teacher_types):
    async with teacher_types[0]() as first, teacher_types[1]() as second:
        async with TeacherClient([first.url, second.url]) as client:
            first.script.refuse_score.extend([UNAVAILABLE] * 1000)
            asked = [sequence(index) for index in range(80)]
            for answer, question in zip(await client.score(asked), asked, strict=True):
                assert_answers(answer, question)
        assert second.record.num_sequences == 80


# ---------------------------------------------------------------- replicas that say nothing


@pytest.fixture
def soon_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENT_AFTER_S", 0.3)
    monkeypatch.setattr(stream, "LOOK_EVERY_S", 0.05)


@pytest.mark.usefixtures("soon_silent")
async def test_a_silent_replica_holds_nothing_up_and_is_used_again_once_it_speaks(teacher_types):
    async with (
        teacher_types[0]() as silent,
        teacher_types[1]() as other,
        TeacherClient([silent.url, other.url], window=20) as client,
        client.open_stream() as scores,
    ):
        silent.script.answer_nothing = True
        asked = [sequence(index, num_contexts=50) for index in range(50)]
        for answer, question in zip(await asyncio.gather(*map(scores.submit, asked)), asked, strict=True):
            assert_answers(answer, question)
        assert 0 < silent.record.num_sequences <= 10
        assert other.record.num_sequences == 50
        await until(lambda: why_missing(client, silent) == "answered nothing for 0.3 s")
        num_asked = silent.record.num_sequences
        await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)))
        assert silent.record.num_sequences == num_asked  # its probe is not answered, so nothing else is asked
        silent.script.answer_nothing = False
        await silent.stop()
        await silent.start()
        await until(lambda: not why_missing(client, silent))
        await asyncio.gather(*(scores.submit(sequence(index, num_contexts=50)) for index in range(20)))
        assert silent.record.num_sequences > num_asked


@pytest.mark.usefixtures("soon_silent")
async def test_of_two_answers_to_one_sequence_the_first_counts():
    """A replica that was only slow: what others were asked as well comes twice, and each future has one answer."""
    slow, other = FakeEngine(), FakeEngine()
    asked = formula_sequences(12)
    async with (
        fake_teacher(slow) as first,
        fake_teacher(other) as second,
        TeacherClient([first.url, second.url], window=12) as client,
        client.open_stream() as scores,
    ):
        slow.hold()
        other.hold()
        answers = [asyncio.create_task(scores.submit(question)) for question in asked]
        await until(lambda: slow.num_running == other.num_running == 6)
        other.let_go()
        await until(lambda: sum(answer.done() for answer in answers) == 6)
        other.hold()
        await until(lambda: other.num_running == 6)  # what the slow one owes
        slow.let_go()
        for answer, question in zip(await asyncio.gather(*answers), asked, strict=True):
            expected_TV = fake_logprobs_TV(question.context_ids, question.completion_ids)
            np.testing.assert_allclose(
                answer.sampled_logprobs_T, expected_TV[range(9), question.completion_ids], atol=1e-5
            )
        assert [use.num_sequences for use in client.replicas] == [6, 6]
        other.let_go()
        more = await asyncio.gather(*(scores.submit(question) for question in formula_sequences(8)))
        assert len(more) == 8
        assert [use.num_sequences for use in client.replicas] != [6, 14]  # the slow one is asked again


async def test_everybody_slow_is_left_alone(soon_silent):
    engines = [FakeEngine(), FakeEngine()]
    async with (
        fake_teacher(engines[0]) as first,
        fake_teacher(engines[1]) as second,
        TeacherClient([first.url, second.url], window=12) as client,
        client.open_stream() as scores,
    ):
        for engine in engines:
            engine.hold()
        answers = [asyncio.create_task(scores.submit(question)) for question in formula_sequences(12)]
        await until(lambda: sum(engine.num_running for engine in engines) == 12)
        await asyncio.sleep(0.8)
        assert [len(engine.requests) for engine in engines] == [7, 7]  # with the probe
        for engine in engines:
            engine.let_go()
        await asyncio.gather(*answers)
        assert [use.num_taken_back for use in client.replicas] == [0, 0]


# ---------------------------------------------------------------- replicas that are not the same


async def test_a_replica_of_another_revision_is_refused_at_the_start(teacher_types):
    async with teacher_types[0]() as first, teacher_types[1](Script(model_revision="revision-2")) as second:
        with pytest.raises(HandshakeError, match="revision 'revision-1' -> 'revision-2'"):
            async with TeacherClient([first.url, second.url]):
                pass
    assert second.record.num_probes == 0


async def test_other_weights_under_the_same_revision_are_refused_at_the_start_with_the_facts(teacher_types):
    async with teacher_types[0]() as first, teacher_types[1](Script(change_answer=score_lower)) as second:
        with pytest.raises(HandshakeError) as caught:
            async with TeacherClient([first.url, second.url]):
                pass
    assert str(caught.value).startswith(
        f"{second.url} and {first.url} both say model revision 'revision-1', but score the same 56 tokens differently: "
        "by 0.5 nats on average and 0.5 at most; float32 allows 0.01 and 0.1."
    )
    assert (first.record.num_probes, second.record.num_probes) == (1, 1)


async def test_a_replica_that_changes_is_left_out_and_taken_in_again_when_it_has_changed_back(teacher_types, caplog):
    async with (
        teacher_types[0]() as changing,
        teacher_types[1]() as other,
        TeacherClient([changing.url, other.url]) as client,
        client.open_stream() as scores,
    ):
        await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)))
        await changing.stop()
        await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)))
        changing.script.change_answer = score_lower
        await changing.start()
        await until(lambda: "both say model revision 'revision-1'" in why_missing(client, changing))
        assert f"{changing.url} is missing: {changing.url} and" in caplog.text
        num_asked = changing.record.num_sequences
        for index, answer in enumerate(await asyncio.gather(*(scores.submit(sequence(i)) for i in range(20)))):
            assert_answers(answer, sequence(index))
        assert changing.record.num_sequences == num_asked
        changing.script.change_answer = None
        await until(lambda: not why_missing(client, changing))
        await asyncio.gather(*(scores.submit(sequence(index, num_contexts=50)) for index in range(20)))
        assert changing.record.num_sequences > num_asked


async def test_when_all_have_changed_that_is_the_error(teacher_types):
    async with (
        teacher_types[0]() as first,
        teacher_types[1]() as second,
        TeacherClient([first.url, second.url]) as client,
        client.open_stream() as scores,
    ):
        await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)))
        for teacher in (first, second):
            await teacher.stop()
            teacher.script.model_revision = "revision-2"
            await teacher.start()
        with pytest.raises(HandshakeError, match=r"'revision-1' (->|to) 'revision-2'"):
            await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)))
        with pytest.raises(HandshakeError, match=r"'revision-1' (->|to) 'revision-2'"):
            await client.score([sequence()])


async def test_a_replica_that_breaks_streams_is_given_up_and_the_error_is_told_when_all_do(caplog):
    broken = Refusal(grpc.StatusCode.INTERNAL, "out of order")
    async with (
        FakeTeacher() as first,
        FakeTeacher() as second,
        TeacherClient([first.url, second.url]) as client,
        client.open_stream() as scores,
    ):
        first.script.refuse_stream.append(broken)
        for index, answer in enumerate(await asyncio.gather(*(scores.submit(sequence(i)) for i in range(20)))):
            assert_answers(answer, sequence(index))
        assert f"teacher replica {first.url} is given up for this stream" in caplog.text
        second.script.refuse_stream.append(broken)
        await second.stop()
        await second.start()
        with pytest.raises(TeacherInternalError, match="out of order"):
            await scores.submit(sequence())


async def test_a_sequence_that_can_never_be_scored_fails_alone(teacher_types):
    async with (
        teacher_types[0]() as first,
        teacher_types[1]() as second,
        TeacherClient([first.url, second.url]) as client,
        client.open_stream() as scores,
    ):
        first.script.refuse_sequence.append(Refusal(grpc.StatusCode.INVALID_ARGUMENT, "too long"))
        results = await asyncio.gather(*(scores.submit(sequence(index)) for index in range(20)), return_exceptions=True)
        assert Counter(type(result).__name__ for result in results) == {
            "SequenceScores": 19,
            TeacherRequestError.__name__: 1,
        }


async def test_any_order_of_losses_answers_each_sequence_once(teacher_types):
    """Replicas go and come at random while 300 sequences are asked for, a fifth of which are given up."""
    rng = np.random.default_rng(7)
    async with AsyncExitStack() as stack:
        teachers: list[Any] = [await stack.enter_async_context(kind()) for kind in (*teacher_types, FakeTeacher)]
        client = await stack.enter_async_context(TeacherClient([each.url for each in teachers], window=24))
        scores = await stack.enter_async_context(client.open_stream())
        asked = [sequence(index, num_contexts=40) for index in range(300)]
        tasks = []
        for position, question in enumerate(asked):
            tasks.append(asyncio.create_task(scores.submit(question)))
            if position % 30 == 29:
                teacher = teachers[rng.integers(3)]
                await teacher.stop()
                await asyncio.sleep(float(rng.uniform(0, 0.05)))
                await teacher.start()
            if position % 5 == 4:
                tasks[rng.integers(max(0, position - 20), position + 1)].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result, question in zip(results, asked, strict=True):
            if not isinstance(result, asyncio.CancelledError):
                assert_answers(result, question)  # type: ignore[arg-type]
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) <= 60
