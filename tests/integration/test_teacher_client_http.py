"""What is particular to a teacher over HTTP: gateways, connections that break one by one, and other servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from asking import FakeTime, assert_answers, sequence, until
from fake_http_teacher import OCTETS, FakeHttpTeacher, Reply
from fake_teacher import HEAD, FakeTeacher, Script
from vopd_client.errors import (
    AlignmentError,
    HandshakeError,
    TeacherInternalError,
    TeacherPermissionError,
    TeacherRequestError,
    TeacherUnavailableError,
)
from vopd_client.teacher import TeacherClient, http_transport
from vopd_proto import teacher_pb2 as pb

HTML = {"Content-Type": "text/html; charset=utf-8"}


@asynccontextmanager
async def connected(
    script: Script | None = None, **settings: Any
) -> AsyncIterator[tuple[FakeHttpTeacher, TeacherClient]]:
    async with FakeHttpTeacher(script) as teacher:
        settings.setdefault("timing", FakeTime().timing)
        async with TeacherClient(teacher.url, **settings) as client:
            yield teacher, client


# ---------------------------------------------------------------- requests


async def test_a_teacher_behind_a_path_prefix_is_reached():
    async with FakeHttpTeacher(prefix="/team/a") as teacher, TeacherClient(f"{teacher.url}/team/a/") as client:
        [scores] = await client.score([sequence()])
        assert_answers(scores, sequence())
        async with client.open_stream() as stream:
            assert_answers(await stream.submit(sequence(1)), sequence(1))


async def test_every_request_says_what_it_wants_and_who_asks():
    async with connected() as (teacher, client):
        await client.score([sequence()])
        for headers in teacher.record.metadata:
            assert headers["accept"] == "application/x-protobuf"
            assert headers["accept-encoding"] == "identity"
            assert headers["user-agent"].startswith("vopd-client/")
            assert "authorization" not in headers
        assert teacher.record.metadata[-1]["content-type"] == "application/x-protobuf"


async def test_connections_are_used_again_and_no_more_than_the_window_are_made():
    async with connected(window=6) as (teacher, client), client.open_stream() as stream:
        await asyncio.gather(*(stream.submit(sequence(index)) for index in range(200)))
        assert len(teacher.record.sequences(0)) == 200
        assert teacher.num_connections <= 6


async def test_a_stream_that_is_closed_leaves_no_task_and_no_request_behind():
    async with connected(Script(answer_nothing=True)) as (teacher, client):
        before = asyncio.all_tasks()
        stream = client.open_stream()
        asked = [asyncio.create_task(stream.submit(sequence(index))) for index in range(5)]
        await until(lambda: teacher.record.num_sequences == 5)
        serving = {task for task in asyncio.all_tasks() if task.get_coro().__qualname__.startswith("FakeHttpTeacher")}
        await stream.close()
        await asyncio.gather(*asked, return_exceptions=True)
        assert asyncio.all_tasks() - before - serving == set()


# ---------------------------------------------------------------- gateways


@pytest.mark.parametrize(("status", "who"), [(429, "busy"), (503, "unavailable")])
async def test_a_gateway_that_says_when_is_not_asked_sooner(status, who):
    time = FakeTime()
    async with connected(timing=time.timing) as (teacher, client):
        teacher.gateway["/v1/score"].append(Reply(b"<html>", status, {**HTML, "Retry-After": "7"}))
        [scores] = await client.score([sequence()])
        assert_answers(scores, sequence())
        async with client.open_stream() as stream:
            teacher.gateway["/v1/score"].append(Reply(b"<html>", status, {**HTML, "Retry-After": "7"}))
            assert_answers(await stream.submit(sequence(1)), sequence(1))
        assert [7.0 <= slept <= 7.0 * 1.25 for slept in time.slept_s] == [True, True]


async def test_a_gateway_without_a_teacher_is_left_for_another_replica():
    async with (
        FakeHttpTeacher() as first,
        FakeHttpTeacher() as second,
        TeacherClient([first.url, second.url]) as client,
        client.open_stream() as stream,
    ):
        first.gateway["/v1/score"].extend([Reply(b"", 502, HTML)] * 100)
        for index, scores in enumerate(await asyncio.gather(*(stream.submit(sequence(i)) for i in range(20)))):
            assert_answers(scores, sequence(index))
        assert len(second.record.sequences(0)) == 20


async def test_a_gateway_that_wants_another_key_ends_the_stream():
    async with connected() as (teacher, client), client.open_stream() as stream:
        teacher.gateway["/v1/score"].append(Reply(b"", 401, HTML))
        with pytest.raises(TeacherPermissionError, match="HTTP 401 Unauthorized"):
            await stream.submit(sequence())
        with pytest.raises(TeacherPermissionError, match="HTTP 401 Unauthorized"):
            await stream.submit(sequence())
        assert teacher.record.num_sequences == 1


async def test_a_body_that_a_gateway_finds_too_large_fails_its_sequence_alone():
    async with connected() as (teacher, client), client.open_stream() as stream:
        teacher.gateway["/v1/score"].append(Reply(b"", 413, HTML))
        with pytest.raises(TeacherRequestError, match="HTTP 413"):
            await stream.submit(sequence())
        assert_answers(await stream.submit(sequence()), sequence())


# ---------------------------------------------------------------- connections that break


async def test_a_connection_that_breaks_in_mid_answer_costs_its_own_sequence_only():
    async with connected(Script(hold_answers_until=1000)) as (teacher, client), client.open_stream() as stream:
        cut = pb.ScoreResponse(model_revision="revision-1").SerializeToString()
        teacher.gateway["/v1/score"].append(Reply(cut, cut_after=len(cut) // 2))
        tasks = [asyncio.create_task(stream.submit(sequence(index))) for index in range(4)]
        await until(lambda: (teacher.num_cut, teacher.num_held) == (1, 3))
        await asyncio.sleep(0.05)  # in which a client that gives up on all four would ask again
        teacher.release()
        for index, scores in enumerate(await asyncio.gather(*tasks)):
            assert_answers(scores, sequence(index))
        assert [len(teacher.record.sequences(handshake)) for handshake in range(2)] == [4, 1]
        assert teacher.record.num_info_calls == 2


async def test_a_teacher_that_hangs_up_without_a_word_is_asked_again():
    async with connected() as (teacher, client):
        teacher.gateway["/v1/score"].append(Reply(b"1", cut_after=0))
        [scores] = await client.score([sequence()])
        assert_answers(scores, sequence())
        assert teacher.record.num_info_calls == 2


# ---------------------------------------------------------------- answers that are not right


@pytest.mark.parametrize(
    ("answer", "error", "complaint"),
    [
        (pb.ScoreResponse(model_revision="revision-1"), AlignmentError, r"answered with ids \[\]"),
        (
            pb.ScoreResponse(model_revision="revision-1", scores=[pb.SequenceScores(sequence_id="0")] * 2),
            AlignmentError,
            r"answered with ids \['0', '0'\]",
        ),
        (pb.ScoreResponse(model_revision="revision-2"), HandshakeError, "'revision-1' to 'revision-2'"),
    ],
)
async def test_an_answer_to_something_else_ends_the_stream(answer, error, complaint):
    async with connected() as (teacher, client), client.open_stream() as stream:
        teacher.gateway["/v1/score"].append(Reply(answer.SerializeToString()))
        with pytest.raises(error, match=complaint):
            await stream.submit(sequence())
        with pytest.raises(error, match=complaint):
            await stream.submit(sequence())
        assert teacher.record.num_sequences == 1


async def test_bytes_that_are_no_message_are_an_error_at_once():
    async with connected() as (teacher, client):
        teacher.gateway["/v1/score"].append(Reply(b"\xff\xff"))
        with pytest.raises(TeacherInternalError, match="2 bytes that are no ScoreResponse"):
            await client.score([sequence()])
        assert teacher.record.num_sequences == 1


async def test_an_answer_without_end_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(http_transport, "MAX_MESSAGE_BYTES", 1000)
    async with connected() as (teacher, client):
        teacher.gateway["/v1/score"].append(Reply(bytes(2**20)))
        with pytest.raises(TeacherRequestError, match="larger than max"):
            await client.score([sequence()])


# ---------------------------------------------------------------- the output head


async def test_a_head_whose_size_a_gateway_hides_is_known_by_its_checksum(tmp_path: Path):
    async with connected(Script(head=HEAD)) as (teacher, client):
        teacher.gateway["/v1/head"].append(Reply(HEAD, headers=OCTETS, chunked=True))
        assert (await client.head_file(tmp_path)).read_bytes() == HEAD
        assert teacher.record.metadata[-1]["accept"] == "application/octet-stream"


async def test_a_gateway_without_a_teacher_is_asked_for_the_head_again(tmp_path: Path):
    time = FakeTime()
    async with connected(Script(head=HEAD), timing=time.timing) as (teacher, client):
        teacher.gateway["/v1/head"].append(Reply(b"<html>", 502, HTML))
        teacher.gateway["/v1/head"].append(Reply(b"<html>", 429, {**HTML, "Retry-After": "7"}))
        assert (await client.head_file(tmp_path)).read_bytes() == HEAD
        assert 7.0 <= time.slept_s[1] <= 7.0 * 1.25


@pytest.mark.parametrize(
    ("reply", "error", "shown"),
    [
        (Reply(b"<html>", 200, HTML), TeacherInternalError, "HTTP 200 OK, text/html"),
        (Reply(b"", 200), TeacherInternalError, "HTTP 200 OK, application/x-protobuf"),
        (Reply(b"", 401, HTML), TeacherPermissionError, "HTTP 401"),
        (Reply(HEAD, 404, OCTETS), TeacherRequestError, "HTTP 404"),
    ],
)
async def test_another_answer_is_no_head(reply, error, shown, tmp_path: Path):
    async with connected(Script(head=HEAD)) as (teacher, client):
        teacher.gateway["/v1/head"].append(reply)
        with pytest.raises(error, match=shown):
            await client.head_file(tmp_path)
        assert client.head_bytes_received == 0


# ---------------------------------------------------------------- other servers


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (Reply(b"<html>", 404, HTML), "HTTP 404 Not Found, text/html"),
        (Reply(b"<html>", 200, HTML), "HTTP 200 OK, text/html"),
        (Reply(b"Bad", 400, {"Content-Type": "text/plain"}), "HTTP 400 Bad Request, text/plain, 'Bad'"),
        (Reply(b"", 301, {"Location": "https://there/"}), "HTTP 301 Moved Permanently, to https://there/"),
        (Reply(b'{"error": {"code": "no_such_model", "message": "?"}}', 404, HTML), "HTTP 404 Not Found"),
        (Reply(b'{"error": {"code": "NOT_FOUND", "message": "Not Found"}}', 404, HTML), "HTTP 404 Not Found"),
    ],
)
async def test_something_else_than_a_teacher_is_refused_at_once(reply, shown):
    async with FakeHttpTeacher() as teacher:
        teacher.gateway["/v1/info"].append(reply)
        with pytest.raises(HandshakeError, match="does not look like a vopd teacher: GET /v1/info was") as caught:
            await TeacherClient(teacher.url).connect()
        assert shown in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of a key and of its certificate, from an authority that nobody knows."""
    directory = tmp_path_factory.mktemp("tls")
    key, chain = directory / "key.pem", directory / "chain.pem"
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(key)
    for blob in issued.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    return key, chain


@pytest.mark.parametrize(
    ("serves", "with_tls", "scheme", "reason"),
    [
        (FakeHttpTeacher, False, "https", "127.0.0.1:PORT does not speak TLS: http:// and grpc:// are without"),
        (FakeHttpTeacher, True, "http", "127.0.0.1:PORT hung up before it answered; https:// is for TLS"),
        (FakeHttpTeacher, False, "grpc", "HTTP/1.1 is spoken there, not gRPC: write http://"),
        (FakeHttpTeacher, True, "https", "certificate not trusted: "),
        (
            FakeTeacher,
            False,
            "http",
            "127.0.0.1:PORT does not speak HTTP/1.1: the port of gRPC is reached with grpc://",
        ),
        (FakeTeacher, False, "https", "127.0.0.1:PORT does not speak TLS"),
        (FakeTeacher, True, "http", "127.0.0.1:PORT hung up before it answered; https:// is for TLS"),
        (FakeTeacher, True, "grpc", "127.0.0.1:PORT hung up before it answered; grpcs:// is for TLS"),
    ],
)
async def test_the_wrong_scheme_is_hinted_at_in_one_line(certificate, serves, with_tls, scheme, reason):
    teacher = serves()
    await teacher.start(certificate if with_tls else None)
    client = TeacherClient(f"{scheme}://127.0.0.1:{teacher.port}", timeout_s=5, timing=FakeTime().timing)
    try:
        with pytest.raises(TeacherUnavailableError) as caught:
            await client.connect()
    finally:
        await teacher.stop()
    assert f"last: {reason.replace('PORT', str(teacher.port))}" in str(caught.value)
    assert "\n" not in str(caught.value)
