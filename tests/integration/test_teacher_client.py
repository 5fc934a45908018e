"""The teacher client over real sockets: a scripted teacher for every fault, and the real one for the rest."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.torch import load_file

from asking import FakeTime, assert_answers, connected_to, sequence, until
from fake_teacher import HEAD, TOKENS, FakeTeacher, Refusal, Script
from teacher_process import RunningTeacher, start_teacher
from vopd_client.errors import (
    AlignmentError,
    HandshakeError,
    NonFiniteError,
    TeacherInternalError,
    TeacherPermissionError,
    TeacherRequestError,
    TeacherUnavailableError,
    TeacherUnsupportedError,
)
from vopd_client.teacher import RemoteTeacher, TeacherClient
from vopd_client.teacher.patience import Timing
from vopd_client.teacher.transport import CallFailed
from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import pack_floats, pack_uints

UNAVAILABLE = Refusal(grpc.StatusCode.UNAVAILABLE)


# ---------------------------------------------------------------- what it is


async def test_the_handshake_tells_what_the_teacher_is(connected):
    async with connected() as (_, client):
        assert client.info.model_revision == "revision-1"
        assert client.info.supports == {"sampled", "teacher_top_k", "candidates"}
        assert client.info.end_ids == (1, 2)
        assert client.info.max_support_size == 200


async def test_the_tokenizer_comes_with_its_table(connected):
    async with connected() as (_, client):
        assert await client.tokenizer() == (TOKENS, "{}")


async def test_a_table_without_the_announced_fingerprint_is_refused(connected):
    async with connected(Script(info={"tokenizer.fingerprint": "another"})) as (_, client):
        with pytest.raises(HandshakeError, match="fingerprint that it announced"):
            await client.tokenizer()


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        ({"expected_fingerprint": "f"}, "tokenizer fingerprint .* instead of 'f'"),
        ({"expected_revision": "0"}, "model revision 'revision-1' instead of '0'"),
    ],
)
async def test_another_teacher_than_expected_is_refused_at_once(expected, complaint, teacher_type):
    async with teacher_type() as teacher:
        with pytest.raises(HandshakeError, match=complaint):
            await TeacherClient(teacher.url, **expected).connect()


async def test_the_key_goes_with_every_call(connected):
    async with connected(api_key="id.secret") as (teacher, client):
        await client.score([sequence()])
        async with client.open_stream() as stream:
            await stream.submit(sequence())
        assert len(teacher.record.metadata) == 3
        assert all(call["authorization"] == "Bearer id.secret" for call in teacher.record.metadata)


# ---------------------------------------------------------------- unary


@pytest.mark.parametrize("temperature", [1.0, 0.5])
async def test_a_list_is_scored_in_its_order_whatever_the_requests(temperature, connected):
    asked = [sequence(index) for index in range(30)]
    async with connected() as (teacher, client):
        scores = await client.score(asked, temperature=temperature)
        for answer, question in zip(scores, asked, strict=True):
            assert_answers(answer, question, temperature)
        requests = teacher.record.score_requests
        assert all(len(request.sequences) <= 8 for request in requests)  # the teacher's limit
        assert sum(len(request.sequences) for request in requests) == 30
        assert sum(len(request.contexts) for request in requests) < 10


async def test_an_empty_list_asks_nothing(connected):
    async with connected() as (teacher, client):
        assert await client.score([]) == []
        assert teacher.record.score_requests == []


async def test_an_empty_completion_has_an_empty_answer(connected):
    empty = SequenceToScore(np.array([1]), np.empty(0, np.int64), TeacherTopK(2))
    async with connected() as (_, client):
        [unary] = await client.score([empty])
        async with client.open_stream() as stream:
            streamed = await stream.submit(empty)
        assert len(unary.sampled_logprobs_T) == len(streamed.sampled_logprobs_T) == 0


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_refused_request_is_asked_again_after_the_delay_the_server_wants(code, connected):
    time = FakeTime()
    async with connected(timing=time.timing) as (teacher, client):
        teacher.script.refuse_score.extend([Refusal(code, retry_delay_s=7.5)] * 2)
        [scores] = await client.score([sequence()])
        assert_answers(scores, sequence())
        assert len(teacher.record.score_requests) == 3
        assert [7.5 <= slept <= 7.5 * 1.25 for slept in time.slept_s] == [True, True]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, TeacherRequestError),
        (grpc.StatusCode.FAILED_PRECONDITION, TeacherUnsupportedError),
        (grpc.StatusCode.UNAUTHENTICATED, TeacherPermissionError),
        (grpc.StatusCode.PERMISSION_DENIED, TeacherPermissionError),
        (grpc.StatusCode.INTERNAL, TeacherInternalError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, TeacherUnavailableError),
        (grpc.StatusCode.CANCELLED, TeacherUnavailableError),
    ],
)
async def test_everything_else_is_an_error_at_once_with_its_cause(code, error, connected):
    async with connected() as (teacher, client):
        teacher.script.refuse_score.append(Refusal(code, "because"))
        with pytest.raises(error, match="because") as caught:
            await client.score([sequence()])
        assert isinstance(caught.value.__cause__, CallFailed)
        assert len(teacher.record.score_requests) == 1


async def test_one_failing_request_fails_the_list_and_the_next_list_is_scored(connected):
    async with connected() as (teacher, client):
        teacher.script.refuse_score.append(Refusal(grpc.StatusCode.INVALID_ARGUMENT, "no"))
        with pytest.raises(TeacherRequestError):
            await client.score([sequence(index) for index in range(40)])
        assert len(await client.score([sequence(index) for index in range(40)])) == 40


async def test_a_request_that_is_too_large_is_refused_before_it_is_sent(connected):
    async with connected(Script(info={"limits.max_message_bytes": 2000})) as (teacher, client):
        large = SequenceToScore(np.arange(1), np.arange(2000))
        with pytest.raises(TeacherRequestError, match="exceeds the teacher's limit of 2000"):
            await client.score([large])
        async with client.open_stream() as stream:
            with pytest.raises(TeacherRequestError, match="exceeds the teacher's limit"):
                await stream.submit(large)
            with pytest.raises(TeacherRequestError, match="exceeds the teacher's limit"):
                await stream.submit(SequenceToScore(np.arange(2000), np.arange(1)))
            assert teacher.record.num_sequences == 0
            assert_answers(await stream.submit(sequence()), sequence())


async def test_a_server_that_takes_less_than_it_says_is_not_asked_for_ever(teacher_type):
    async with teacher_type(max_message_bytes=1000) as teacher, TeacherClient(teacher.url) as client:
        with pytest.raises(TeacherRequestError, match="larger than max"):
            await client.score([SequenceToScore(np.arange(1), np.arange(2000))])


async def test_an_answer_of_another_revision_is_refused(connected):
    async with connected() as (teacher, client):
        teacher.script.model_revision = "revision-2"
        with pytest.raises(HandshakeError, match="'revision-1' to 'revision-2'"):
            await client.score([sequence()])
        async with client.open_stream() as stream:
            with pytest.raises(HandshakeError, match="'revision-1' to 'revision-2'"):
                await stream.submit(sequence())


async def test_a_teacher_that_says_nothing_is_given_up_when_the_time_is_up(connected):
    script = Script(answer_nothing=True)
    async with connected(script, timeout_s=0.2, timing=Timing()) as (_, client):
        with pytest.raises(TeacherUnavailableError, match=r"no progress of the teacher for 0\.2 s"):
            await client.score([sequence()])
        async with client.open_stream() as stream:
            with pytest.raises(TeacherUnavailableError, match=r"no progress of the teacher for 0\.2 s"):
                await stream.submit(sequence())


# ---------------------------------------------------------------- connecting


async def test_a_teacher_that_is_not_there_is_waited_for_until_the_time_is_up(teacher_type):
    async with teacher_type() as teacher:
        url = teacher.url
    time = FakeTime()
    with pytest.raises(TeacherUnavailableError, match="for 60 s; last: connection refused") as caught:
        await TeacherClient(url, timeout_s=60, timing=time.timing).connect()
    assert time.now_s == pytest.approx(60)
    assert isinstance(caught.value.__cause__, CallFailed)


async def test_a_teacher_that_comes_late_is_found(teacher_type):
    teacher = teacher_type()
    async with teacher:
        pass
    client = TeacherClient(teacher.url, timeout_s=60)
    connecting = asyncio.create_task(client.connect())
    await until(lambda: "connection refused, retrying" in client.waiting_reason)
    async with teacher:
        assert (await connecting).model_id == "fake"
        assert client.waiting_reason == ""
        await client.close()


async def test_a_starting_teacher_is_asked_again_when_it_said(teacher_type):
    time = FakeTime()
    async with teacher_type(Script()) as teacher:
        teacher.script.refuse_info.append(Refusal(grpc.StatusCode.UNAVAILABLE, "loading", retry_delay_s=2.0))
        async with TeacherClient(teacher.url, timing=time.timing):
            assert teacher.record.num_info_calls == 2
            assert time.slept_s[0] >= 2.0


async def test_a_wrong_key_is_an_error_at_once(teacher_type):
    async with teacher_type() as teacher:
        teacher.script.refuse_info.append(Refusal(grpc.StatusCode.UNAUTHENTICATED, "unknown key"))
        with pytest.raises(TeacherPermissionError, match="unknown key"):
            await TeacherClient(teacher.url).connect()
        assert teacher.record.num_info_calls == 1


async def test_the_first_replica_that_answers_is_taken_without_a_pause(teacher_type):
    async with teacher_type() as gone:
        pass
    time = FakeTime()
    async with (
        teacher_type() as teacher,
        TeacherClient([gone.url, teacher.url], timing=time.timing) as client,
    ):
        assert client.info.model_id == "fake"
        assert sum(time.slept_s) == 0.0


@pytest.fixture
def key_and_certificate(tmp_path: Path) -> tuple[Path, Path]:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(
        ["openssl", *request.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
    )
    return key, certificate


async def test_tls_with_the_servers_own_authority(key_and_certificate: tuple[Path, Path], teacher_type):
    _, certificate = key_and_certificate
    teacher = teacher_type()
    await teacher.start(key_and_certificate)
    url = teacher.url.replace("127.0.0.1", "localhost")
    async with TeacherClient(url, api_key="id.secret", tls_ca_file=certificate) as client:
        [scores] = await client.score([sequence()])
        assert_answers(scores, sequence())
    with pytest.raises(TeacherUnavailableError, match=r"last: (Tls handshake failed: )?certificate not trusted"):
        await TeacherClient(url, timeout_s=1, timing=FakeTime().timing).connect()  # not a public authority
    await teacher.stop()


# ---------------------------------------------------------------- streams


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


async def test_a_draining_replica_is_left_for_the_next_one(teacher_type):
    async with teacher_type() as leaving, teacher_type() as staying:
        async with TeacherClient([leaving.url, staying.url], timing=FakeTime().timing) as client:
            leaving.script.refuse_sequence.extend([UNAVAILABLE] * 100)
            async with client.open_stream() as stream:
                scores = await asyncio.gather(*(stream.submit(sequence(index)) for index in range(50)))
        for index, answer in enumerate(scores):
            assert_answers(answer, sequence(index))
        assert len(staying.record.sequences(0)) == 50
        assert staying.record.num_info_calls == 1  # the handshake comes first


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


async def test_another_replica_takes_over_what_is_unanswered(teacher_type):
    async with (
        teacher_type(Script(hold_answers_until=1000)) as first,
        teacher_type() as second,
        TeacherClient([first.url, second.url]) as client,
        client.open_stream() as stream,
    ):
        tasks = [asyncio.create_task(stream.submit(sequence(index))) for index in range(10)]
        await until(lambda: first.record.streams and len(first.record.sequences(0)) == 10)
        await first.stop()
        for index, scores in enumerate(await asyncio.gather(*tasks)):
            assert_answers(scores, sequence(index))
        assert len(second.record.sequences(0)) == 10


async def test_a_replica_with_other_weights_is_refused(teacher_type):
    other = Script(model_revision="revision-2")
    async with teacher_type(Script(hold_answers_until=9)) as first, teacher_type(other) as second:
        async with TeacherClient([first.url, second.url]) as client, client.open_stream() as stream:
            task = asyncio.create_task(stream.submit(sequence()))
            await until(lambda: first.record.streams and first.record.sequences(0))
            await first.stop()
            with pytest.raises(HandshakeError, match="revision 'revision-1' -> 'revision-2'"):
                await task
            with pytest.raises(HandshakeError):
                await stream.submit(sequence())
        assert second.record.streams == []


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


# ---------------------------------------------------------------- the blocking facade


class TeacherThread:
    """A scripted teacher in a thread of its own, for tests that block."""

    def __init__(self, teacher_type: type[FakeTeacher], script: Script) -> None:
        self.teacher = teacher_type(script)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> FakeTeacher:
        self._thread.start()
        self.call(self.teacher.start())
        return self.teacher

    def __exit__(self, *_exception: object) -> None:
        self.call(self.teacher.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_the_blocking_facade_scores_from_many_threads(teacher_type):
    with (
        TeacherThread(teacher_type, Script()) as server,
        RemoteTeacher.connect([server.url], temperature=0.5) as teacher,
    ):
        futures: dict[int, Future[SequenceScores]] = {}

        def submit(first: int) -> None:
            futures.update({index: teacher.submit(sequence(index)) for index in range(first, first + 50)})

        threads = [threading.Thread(target=submit, args=(first,)) for first in range(0, 200, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, future in futures.items():
            assert_answers(future.result(), sequence(index), 0.5)
        assert len(futures) == 200
        assert teacher.info.model_id == "fake"
        assert teacher.tokenizer()[0] == TOKENS
        [scores] = teacher.score([sequence(7)])
        assert_answers(scores, sequence(7), 0.5)
        assert teacher.bytes_sent > 0
        assert teacher.bytes_received > 0
        assert teacher.waiting_reason == ""


def test_the_blocking_facade_fetches_the_output_head(teacher_type, tmp_path: Path):
    with (
        TeacherThread(teacher_type, Script(head=HEAD)) as server,
        RemoteTeacher.connect(server.url) as teacher,
    ):
        path = teacher.head_file(tmp_path)
        assert path.read_bytes() == HEAD
        assert teacher.head_file(tmp_path) == path
        assert (teacher.head_bytes_received, teacher.bytes_received) == (len(HEAD), 0)


def test_futures_fail_when_the_time_is_up(teacher_type):
    script = Script(answer_nothing=True)
    with TeacherThread(teacher_type, script) as server, RemoteTeacher.connect(server.url, timeout_s=0.2) as teacher:
        futures = [teacher.submit(sequence(index)) for index in range(3)]
        for future in futures:
            with pytest.raises(TeacherUnavailableError, match="no progress"):
                future.result()


def test_closing_the_facade_fails_pending_futures_and_refuses_new_ones(teacher_type):
    with TeacherThread(teacher_type, Script(answer_nothing=True)) as server:
        teacher = RemoteTeacher.connect(server.url)
        futures = [teacher.submit(sequence(index)) for index in range(3)]
        teacher.close()
        teacher.close()
        for future in futures:
            with pytest.raises(TeacherUnavailableError, match="closed"):
                future.result()
        with pytest.raises(TeacherUnavailableError, match="closed"):
            teacher.submit(sequence())


def test_a_cancelled_future_gives_up_its_answer_only(teacher_type):
    with (
        TeacherThread(teacher_type, Script(hold_answers_until=2)) as server,
        RemoteTeacher.connect(server.url) as teacher,
    ):
        given_up = teacher.submit(sequence(0))
        assert given_up.cancel()
        kept = teacher.submit(sequence(1))
        server.script.hold_answers_until = 1
        assert_answers(teacher.submit(sequence(2)).result(), sequence(2))
        assert_answers(kept.result(), sequence(1))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_an_interrupt_while_waiting_for_a_teacher_ends_the_program_quietly(scheme):
    program = (
        "import signal, threading, os\n"
        "from vopd_client.teacher import RemoteTeacher\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        f"    RemoteTeacher.connect('{scheme}://127.0.0.1:1', timeout_s=600)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("interrupted\n", "", 0)


def test_a_program_that_forgets_to_close_its_teacher_ends_quietly(teacher_type):
    with TeacherThread(teacher_type, Script()) as server:
        program = (
            "import numpy as np\n"
            "from vopd_client.teacher import RemoteTeacher\n"
            "from vopd_client.types import SequenceToScore\n"
            f"teacher = RemoteTeacher.connect({server.url!r})\n"
            "teacher.submit(SequenceToScore(np.arange(3), np.arange(3))).result()\n"
            "print('done')\n"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert (ended.stdout, ended.stderr, ended.returncode) == ("done\n", "", 0)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_who_waits_for_a_connection_when_the_client_closes_is_told(scheme):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = TeacherClient(f"{scheme}://127.0.0.1:{unused.getsockname()[1]}", timeout_s=600)
        waiting = asyncio.create_task(client.connect())
        await until(lambda: client.waiting_reason != "")
        await client.close()
        with pytest.raises(TeacherUnavailableError, match="closed"):
            await waiting


def test_a_loopback_teacher_is_not_asked_through_a_proxy(monkeypatch, teacher_type):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with TeacherThread(teacher_type, Script()) as server, RemoteTeacher.connect(server.url, timeout_s=20) as teacher:
        assert teacher.info.vocab_size > 0


# ---------------------------------------------------------------- the real teacher


@pytest.fixture(params=["grpc", "http"])
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def url_of(server: RunningTeacher, scheme: str) -> str:
    return server.url if scheme == "grpc" else server.http_url


def ports_of(server: RunningTeacher) -> dict[str, int]:
    return {"port": server.port, "http_port": int(server.http_url.rpartition(":")[2])}


def real_sequences() -> list[SequenceToScore]:
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 256, 20) for _ in range(4)]
    supports = (
        NoSupport(),
        TeacherTopK(5),
        Candidates(rng.integers(0, 256, 60), np.full(30, 2)),
    )
    return [SequenceToScore(contexts[index % 4], rng.integers(0, 256, 30), supports[index % 3]) for index in range(60)]


def assert_equal_scores(first: list[SequenceScores], second: list[SequenceScores], tolerance_nats: float) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one.sampled_logprobs_T, other.sampled_logprobs_T, atol=tolerance_nats, rtol=0)
        np.testing.assert_allclose(one.support_logprobs, other.support_logprobs, atol=tolerance_nats, rtol=0)
        np.testing.assert_array_equal(one.support_ids, other.support_ids)


def test_a_real_teacher_gives_the_same_scores_by_request_and_by_stream(scheme: str, tiny_model_dir: Path):
    asked = real_sequences()
    with start_teacher(tiny_model_dir) as server, RemoteTeacher.connect(url_of(server, scheme), window=16) as teacher:
        streamed = [future.result() for future in [teacher.submit(question) for question in asked]]
        assert_equal_scores(teacher.score(asked), streamed, tolerance_nats=1e-4)
        assert streamed[1].counts_T.tolist() == [5] * 30
        assert teacher.info.num_ids == 259
        tokens, tokenizer_json = teacher.tokenizer()
        assert len(tokens) == 259
        assert tokenizer_json


def test_a_real_teacher_killed_in_the_middle_and_restarted_gives_the_same_bits(scheme: str, tiny_model_dir: Path):
    asked = real_sequences()
    with start_teacher(tiny_model_dir, "--deterministic") as server:
        with RemoteTeacher.connect(url_of(server, scheme), window=8) as teacher:
            undisturbed = [future.result() for future in [teacher.submit(question) for question in asked]]
            futures = [teacher.submit(question) for question in asked]
            futures[5].result()
            server.kill()
            with start_teacher(tiny_model_dir, "--deterministic", **ports_of(server)):
                disturbed = [future.result() for future in futures]
        assert_equal_scores(undisturbed, disturbed, tolerance_nats=0)


def test_a_real_teacher_that_drains_answers_what_it_took_and_the_rest_waits(scheme: str, tiny_model_dir: Path):
    asked = real_sequences()
    with start_teacher(tiny_model_dir) as server, RemoteTeacher.connect(url_of(server, scheme), window=8) as teacher:
        futures = [teacher.submit(question) for question in asked]
        futures[5].result()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        with start_teacher(tiny_model_dir, **ports_of(server)):
            answers = [future.result() for future in futures]
        assert [len(answer.sampled_logprobs_T) for answer in answers] == [30] * 60


def test_a_real_teacher_with_other_weights_is_refused_after_a_restart(
    scheme: str, tiny_model_dir: Path, tmp_path: Path
):
    from tiny_model import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1)
    with start_teacher(tiny_model_dir) as server, RemoteTeacher.connect(url_of(server, scheme)) as teacher:
        teacher.submit(real_sequences()[0]).result()
        server.kill()
        with start_teacher(other, **ports_of(server)), pytest.raises(HandshakeError, match="model revision"):
            teacher.submit(real_sequences()[0]).result()


def test_a_real_teachers_hidden_states_and_head_are_its_whole_distribution(
    scheme: str, tiny_model_dir: Path, tmp_path: Path
):
    rng = np.random.default_rng(1)
    context, completion = rng.integers(0, 256, 20), rng.integers(0, 256, 30)
    temperature, k = 0.7, 259
    with (
        start_teacher(tiny_model_dir, "--allow-full-vocab") as server,
        RemoteTeacher.connect(url_of(server, scheme), temperature=temperature) as teacher,
    ):
        asked = SequenceToScore(context, completion, HiddenStates())
        [scores, whole] = teacher.score([asked, SequenceToScore(context, completion, TeacherTopK(k))])
        streamed = teacher.submit(asked).result()
        path = teacher.head_file(tmp_path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem == teacher.info.head_sha256
        assert teacher.head_bytes_received == path.stat().st_size
    weight_VH = load_file(path)["weight"].float().numpy()
    for answer in (scores, streamed):
        assert answer.hidden_states_TH is not None
        logits_TV = answer.hidden_states_TH @ weight_VH.T / temperature
        logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
        np.testing.assert_allclose(
            np.take_along_axis(logprobs_TV, whole.support_ids.reshape(30, k), axis=1).reshape(-1),
            whole.support_logprobs,
            atol=1e-4,
            rtol=0,
        )


def test_a_real_teacher_that_was_not_told_to_keeps_its_head(scheme: str, tiny_model_dir: Path, tmp_path: Path):
    with start_teacher(tiny_model_dir) as server, RemoteTeacher.connect(url_of(server, scheme)) as teacher:
        with pytest.raises(TeacherUnsupportedError, match="--allow-full-vocab"):
            teacher.head_file(tmp_path)
        with pytest.raises(TeacherUnsupportedError, match="hidden_states"):
            teacher.submit(SequenceToScore(np.arange(3), np.arange(3), HiddenStates())).result()


def test_a_real_teacher_names_the_field_that_is_wrong(scheme: str, tiny_model_dir: Path):
    with start_teacher(tiny_model_dir) as server, RemoteTeacher.connect(url_of(server, scheme)) as teacher:
        wrong = SequenceToScore(np.array([1]), np.array([100_000]))
        with pytest.raises(TeacherRequestError, match="completion_ids"):
            teacher.submit(wrong).result()
        with pytest.raises(TeacherRequestError, match="completion_ids"):
            teacher.score([wrong])
        with pytest.raises(TeacherRequestError, match="context"):
            teacher.submit(SequenceToScore(np.empty(0, np.int64), np.array([1]))).result()
        assert len(teacher.submit(real_sequences()[0]).result().sampled_logprobs_T) == 30
