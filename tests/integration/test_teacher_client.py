"""The teacher client over real sockets, against a scripted teacher: handshake, requests, connecting."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path

import grpc
import numpy as np
import pytest

from asking import FakeTime, assert_answers, sequence, until
from fake_teacher import TOKENS, Refusal, Script
from vopd_client.errors import (
    HandshakeError,
    TeacherInternalError,
    TeacherPermissionError,
    TeacherRequestError,
    TeacherUnavailableError,
    TeacherUnsupportedError,
)
from vopd_client.teacher import TeacherClient
from vopd_client.teacher.patience import Timing
from vopd_client.teacher.transport import CallFailed
from vopd_client.types import SequenceToScore, TeacherTopK

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
        assert time.slept_s[0] == 0.0  # later ones are before the absent replica is tried again


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
