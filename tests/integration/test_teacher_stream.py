"""The client's stream of sequences against a scripted teacher: order, faults, restarts, answers that are not right."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from asking import FakeTime, assert_answers, connected_to, sequence, until
from fake_teacher import FakeTeacher, Refusal, Script
from vopd_client.errors import (
    AlignmentError,
    NonFiniteError,
    TeacherInternalError,
    TeacherPermissionError,
    TeacherRequestError,
    TeacherUnavailableError,
)
from vopd_client.teacher.patience import Timing
from vopd_client.types import Candidates, SequenceScores, SequenceToScore
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import pack_floats, pack_uints

UNAVAILABLE = Refusal(grpc.StatusCode.UNAVAILABLE)


async def test_a_thousand_sequences_pass_through_one_stream(connected):
    asked = [sequence(index) for index in range(1000)]
    async with connected() as (teacher, client), client.open_stream(temperature=2.0) as stream:
        scores = await asyncio.gather(*map(stream.submit, asked))
        for answer, question in zip(scores, asked, strict=True):
            assert_answers(answer, question, 2.0)
        assert len(teacher.record.streams) == 1
        assert len(teacher.record.sequences(0)) == 1000
        assert client.bytes_sent == teacher.record.bytes_in
        assert client.bytes_received == teacher.record.bytes_out > 1000 * 4 * 4


async def test_a_context_that_several_sequences_share_is_sent_once():
    async with connected_to(FakeTeacher) as (teacher, client), client.open_stream() as stream:
        teacher.script.refuse_sequence.append(Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"))
        await asyncio.gather(*(stream.submit(sequence(index)) for index in range(100)))
        assert len(teacher.record.sequences(0)) == 101
        assert len(teacher.record.contexts(0)) == 3


async def test_answers_may_come_in_any_order_and_in_row_chunks(connected):
    script = Script(hold_answers_until=30, answer_in_reverse=True, rows_per_chunk=3)
    asked = [sequence(index) for index in range(30)]
    async with connected(script) as (_, client), client.open_stream() as stream:
        scores = await asyncio.gather(*map(stream.submit, asked))
        for answer, question in zip(scores, asked, strict=True):
            assert_answers(answer, question)


async def test_sixteen_thousand_tokens_with_a_hundred_candidates_each_pass_both_ways(connected):
    num_rows = 16_000
    candidates = Candidates(np.tile(np.arange(100), num_rows), np.full(num_rows, 100))
    long = SequenceToScore(np.arange(3), np.arange(num_rows) % 900, candidates)
    async with connected(Script(rows_per_chunk=2500)) as (_, client), client.open_stream() as stream:
        assert_answers(await stream.submit(long), long)
        [scores] = await client.score([long])
        assert_answers(scores, long)


async def test_no_more_than_the_window_is_unanswered(connected):
    script = Script(hold_answers_until=5)
    async with connected(script, window=5) as (teacher, client), client.open_stream() as stream:
        await asyncio.gather(*(stream.submit(sequence(index)) for index in range(100)))
        assert teacher.record.max_outstanding == 5


async def test_contexts_that_are_done_with_are_released():
    async with connected_to(FakeTeacher, window=4) as (teacher, client), client.open_stream() as stream:
        await asyncio.gather(*(stream.submit(sequence(index, num_contexts=100)) for index in range(100)))
        assert len(teacher.record.contexts(0)) == 100
        assert teacher.record.max_contexts_held <= 4 + 8 + 1


async def test_a_failed_sequence_fails_alone(connected):
    async with connected() as (teacher, client), client.open_stream() as stream:
        teacher.script.refuse_sequence.append(
            Refusal(grpc.StatusCode.INVALID_ARGUMENT, "too long", field="completion_ids")
        )
        with pytest.raises(TeacherRequestError, match="completion_ids: too long"):
            await stream.submit(sequence(1))
        assert_answers(await stream.submit(sequence(2)), sequence(2))
        assert len(teacher.record.streams) == 1


async def test_impossible_ids_fail_alone_and_before_they_travel(connected):
    async with connected() as (_, client), client.open_stream() as stream:
        with pytest.raises(TeacherRequestError, match="context_ids"):
            await stream.submit(SequenceToScore(np.array([-1]), np.array([1])))
        assert_answers(await stream.submit(sequence()), sequence())


async def test_a_refused_sequence_is_sent_again_after_the_delay_on_the_same_stream(connected):
    time = FakeTime()
    async with connected(timing=time.timing) as (teacher, client), client.open_stream() as stream:
        full = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_delay_s=3.0)
        teacher.script.refuse_sequence.extend([full, full])
        assert_answers(await stream.submit(sequence(1)), sequence(1))
        assert len(teacher.record.streams) == 1
        assert len(teacher.record.sequences(0)) == 3
        assert [3.0 <= slept <= 3.75 for slept in time.slept_s] == [True, True]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_refused_stream_is_opened_again_after_the_delay(code):
    time = FakeTime()
    async with connected_to(FakeTeacher, timing=time.timing) as (teacher, client), client.open_stream() as stream:
        teacher.script.refuse_stream.append(Refusal(code, retry_delay_s=4.0))
        assert_answers(await stream.submit(sequence()), sequence())
        assert len(teacher.record.streams) == 2
        assert time.slept_s[0] >= 4.0


async def test_another_error_of_the_stream_fails_everything_at_once(connected):
    async with connected() as (teacher, client), client.open_stream() as stream:
        teacher.script.refuse_stream.append(Refusal(grpc.StatusCode.PERMISSION_DENIED, "not you"))
        results = await asyncio.gather(*(stream.submit(sequence(index)) for index in range(5)), return_exceptions=True)
        assert [type(result) for result in results] == [TeacherPermissionError] * 5
        with pytest.raises(TeacherPermissionError, match="not you"):
            await stream.submit(sequence())
        assert len(teacher.record.streams) == 1


async def test_a_stream_that_ends_early_is_taken_up_where_it_broke(connected):
    script = Script()
    script.end_stream_after.extend([20, 0, 7])
    async with connected(script, window=16) as (teacher, client), client.open_stream() as stream:
        asked = [sequence(index) for index in range(100)]
        scores = await asyncio.gather(*map(stream.submit, asked))
        for answer, question in zip(scores, asked, strict=True):
            assert_answers(answer, question)
        assert len(teacher.record.streams) == 4
        ids = [[message.sequence_id for message in teacher.record.sequences(stream)] for stream in range(4)]
        assert all(len(set(sent)) == len(sent) for sent in ids)  # once on every stream
        # Answers on their way when a stream ends may be lost with it, and are asked for again.
        assert 100 - 20 - 7 <= len(ids[3]) <= 100
        assert teacher.record.num_info_calls == 4  # a handshake before each


async def test_a_teacher_that_is_restarted_in_the_middle_costs_nothing_but_the_wait(connected):
    script = Script(hold_answers_until=8, rows_per_chunk=1)
    async with connected(script, window=16, timing=Timing()) as (teacher, client), client.open_stream() as stream:
        asked = [sequence(index) for index in range(100)]
        tasks = [asyncio.create_task(stream.submit(question)) for question in asked]
        await until(lambda: sum(task.done() for task in tasks) >= 24)
        script.hold_answers_until = 1000  # so that some are surely unanswered when it goes
        await until(lambda: len(teacher.record.sequences(0)) > sum(task.done() for task in tasks))
        await teacher.stop()
        await until(lambda: client.waiting_reason)
        num_answered = sum(task.done() for task in tasks)
        script.hold_answers_until = 0
        await teacher.start()
        scores = await asyncio.gather(*tasks)
        for answer, question in zip(scores, asked, strict=True):
            assert_answers(answer, question)
        assert num_answered < 100
        assert len(teacher.record.sequences(-1)) == 100 - num_answered
        assert client.waiting_reason == ""


async def test_an_idle_stream_survives_a_restart(connected):
    async with connected(timing=Timing()) as (teacher, client), client.open_stream() as stream:
        await stream.submit(sequence(1))
        await teacher.stop()
        await teacher.start()
        assert_answers(await stream.submit(sequence(2)), sequence(2))


async def test_a_cancelled_submit_leaves_the_others_alone(connected):
    script = Script(hold_answers_until=3)
    async with connected(script, window=3) as (_, client), client.open_stream() as stream:
        tasks = [asyncio.create_task(stream.submit(sequence(index))) for index in range(6)]
        await asyncio.sleep(0)
        tasks[4].cancel()  # before it is sent: it waits for a place in the window
        script.hold_answers_until = 1
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for index, result in enumerate(results):
            if index == 4:
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert isinstance(result, SequenceScores)
                assert_answers(result, sequence(index))


async def test_an_answer_that_nobody_waits_for_any_more_is_thrown_away(connected):
    script = Script(hold_answers_until=2)
    async with connected(script) as (teacher, client), client.open_stream() as stream:
        given_up = asyncio.create_task(stream.submit(sequence(0)))
        await until(lambda: teacher.record.streams and teacher.record.sequences(0))
        given_up.cancel()
        assert_answers(await stream.submit(sequence(1)), sequence(1))


async def test_closing_fails_what_is_pending(connected):
    async with connected(Script(answer_nothing=True)) as (teacher, client):
        stream = client.open_stream()
        tasks = [asyncio.create_task(stream.submit(sequence(index))) for index in range(3)]
        scoring = asyncio.create_task(client.score([sequence()]))
        await until(lambda: teacher.record.num_sequences == 4)
        await client.close()
        results = await asyncio.gather(*tasks, scoring, return_exceptions=True)
        assert [str(result) for result in results] == ["the teacher client was closed"] * 4
        assert {type(result) for result in results} == {TeacherUnavailableError}


# ---------------------------------------------------------------- answers that are not right


def nan_row(scores: pb.SequenceScores) -> None:
    scores.sampled_logprobs.CopyFrom(pack_floats(np.full(scores.num_rows, np.nan), pb.FLOAT32))


def impossible_token(scores: pb.SequenceScores) -> None:
    scores.sampled_logprobs.CopyFrom(pack_floats(np.full(scores.num_rows, -np.inf), pb.FLOAT32))


def one_row_short(scores: pb.SequenceScores) -> None:
    scores.num_rows -= 1
    scores.sampled_logprobs.CopyFrom(pack_floats(np.zeros(scores.num_rows), pb.FLOAT32))


def foreign_ids(scores: pb.SequenceScores) -> None:
    scores.support_ids.CopyFrom(pack_uints(np.full(scores.num_rows * scores.k, 5000)))


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (nan_row, NonFiniteError, "log-probability nan of token 1 at position 0"),
        (impossible_token, NonFiniteError, "log-probability -inf of token 1 at position 0"),
        (one_row_short, AlignmentError, "3 rows of scores for a completion of 4 tokens"),
        (foreign_ids, AlignmentError, "id 5000 of 1000"),
    ],
)
async def test_wrong_answers_fail_their_sequence_and_never_become_scores(change, error, complaint, connected):
    async with connected(Script(change_answer=change)) as (teacher, client), client.open_stream() as stream:
        with pytest.raises(error, match=complaint):
            await stream.submit(sequence(1))
        with pytest.raises(error, match=complaint):
            await client.score([sequence(1)])
        teacher.script.change_answer = None
        assert_answers(await stream.submit(sequence(1)), sequence(1))


async def test_an_answer_to_another_question_is_refused(connected):
    def rename(scores: pb.SequenceScores) -> None:
        scores.sequence_id = "nobody"

    async with connected(Script(change_answer=rename)) as (_, client), client.open_stream() as stream:
        with pytest.raises((TeacherInternalError, AlignmentError), match="'nobody'"):
            await stream.submit(sequence())
        with pytest.raises(AlignmentError, match="nobody"):
            await client.score([sequence()])
