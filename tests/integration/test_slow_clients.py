"""Clients that read or send slowly, or not at all: what they hold is given back, and nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from grpc import aio

from fake_engine import fake_logprobs_TV, until
from fake_server import FakeTeacher, fake_teacher
from tenants import shared_teacher
from vopd_proto import teacher_pb2 as pb
from vopd_server.tenancy import TenantLimits
from wire_client import (
    JSON,
    PROTOBUF,
    Question,
    RefusedError,
    connect,
    score_request,
    stream_context,
    stream_sequence,
    stream_settings,
)

CONTEXTS: list[Sequence[int]] = [[1, 2, 3]]
SMALL = Question([5, 6], name="small")
LARGE = Question([5] * 4000, k=300, name="large")  # an answer of ten megabytes, which no socket buffers whole


async def read_to_the_end(stream: Any) -> None:
    while await stream.read() is not aio.EOF:
        pass


async def assert_right(call: object) -> None:
    (answer,) = await call  # type: ignore[misc]
    expected_TV = fake_logprobs_TV(np.asarray(CONTEXTS[0]), np.asarray(SMALL.completion))
    np.testing.assert_allclose(answer.sampled_T, expected_TV[[0, 1], SMALL.completion], atol=1e-6)


@asynccontextmanager
async def raw_connection(teacher: FakeTeacher) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """To its HTTP port; reset at the end, whatever is still under way."""
    parts = urlsplit(teacher.server.http_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**16)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def head(*lines: str) -> bytes:
    return "\r\n".join(["POST /v1/score HTTP/1.1", "Host: teacher", *lines, "", ""]).encode()


def http_state(teacher: FakeTeacher) -> Any:
    """uvicorn's own: its `connections`, and its `tasks`, one for every request that is being answered."""
    listener = teacher.server._http
    assert listener is not None
    return listener._server.server_state


def bytes_unread(teacher: FakeTeacher) -> int:
    """Of answers over HTTP that wait in the buffers of their connections."""
    return sum(connection.transport.get_write_buffer_size() for connection in http_state(teacher).connections)


# ---------------------------------------------------------------- who reads


async def test_a_stream_that_reads_nothing_is_ended_and_another_tenant_goes_on_meanwhile(tmp_path: Path) -> None:
    tenants = {"stalled": TenantLimits(), "b": TenantLimits()}
    async with (
        shared_teacher(tmp_path, tenants, answer_timeout_s=2) as shared,
        shared.connect("stalled") as stalled,
        shared.connect("b") as b,
    ):
        stream = stalled.stream()
        for message in (stream_settings(), stream_context(0, CONTEXTS[0]), *[stream_sequence(LARGE, CONTEXTS)] * 3):
            await stream.write(message)
        await until(lambda: len(shared.engine.requests) == 3 and shared.engine.num_running == 0)
        held_tokens, num_answered = shared.sums["stalled"][0], 0
        assert held_tokens == 3 * 4003, "the answers are scored and not read"
        while shared.sums["stalled"][0]:
            await assert_right(b.score(CONTEXTS, [SMALL]))
            await assert_right(b.score_http_json(CONTEXTS, [SMALL]))
            num_answered += 1
        assert num_answered >= 5, "b was answered only once the stalled stream had been ended"
        await until(lambda: shared.is_empty and shared.teacher.server.service.is_idle)
        with pytest.raises(aio.AioRpcError) as ended:
            await read_to_the_end(stream)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "left unread for 2 s" in str(ended.value.details())


async def test_a_stream_that_reads_slowly_gets_every_answer_though_all_together_take_longer_than_one_may() -> None:
    async with fake_teacher(answer_timeout_s=1) as teacher:
        stream = teacher.client.stream()
        names = [str(index) for index in range(4)]
        questions = [Question(LARGE.completion, k=300, name=name) for name in names]
        for message in (
            stream_settings(),
            stream_context(0, CONTEXTS[0]),
            *(stream_sequence(question, CONTEXTS) for question in questions),
        ):
            await stream.write(message)
        await stream.done_writing()
        began_s, rows = asyncio.get_running_loop().time(), dict.fromkeys(names, 0)
        while (response := await stream.read()) is not aio.EOF:
            if response.HasField("chunk"):
                rows[response.chunk.scores.sequence_id] += response.chunk.scores.num_rows
                await asyncio.sleep(0.05)
        assert rows == dict.fromkeys(names, 4000)
        assert asyncio.get_running_loop().time() - began_s > 1, "it was no slow reader"
        await until(lambda: teacher.reserved_tokens == 0)


@pytest.mark.parametrize("media_type", [JSON, PROTOBUF])
async def test_answers_over_http_that_nobody_takes_are_not_kept(media_type: str) -> None:
    """Ten megabytes each; an answer given up leaves a piece of one in the buffer of its connection, no more."""
    async with fake_teacher(answer_timeout_s=1) as teacher, AsyncExitStack() as connections:
        body = score_request(CONTEXTS, [LARGE]).SerializeToString()
        lines = (f"Content-Type: {PROTOBUF}", f"Accept: {media_type}", f"Content-Length: {len(body)}")
        for _ in range(3):
            _, writer = await connections.enter_async_context(raw_connection(teacher))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(head(*lines) + body)
        await until(lambda: bytes_unread(teacher) > 0)
        await assert_right(teacher.client.score_http_json(CONTEXTS, [SMALL]))
        await until(lambda: len(teacher.engine.requests) == 4 and teacher.server.service.is_idle)
        assert teacher.reserved_tokens == 0
        await until(lambda: not http_state(teacher).tasks)  # which hold the rest of their answers
        assert 0 < bytes_unread(teacher) <= 3 * 2**21
        await connections.aclose()
        await until(lambda: bytes_unread(teacher) == 0)


async def test_an_answer_over_http_is_a_call_until_its_last_byte() -> None:
    """For its tenant's number of calls, and for draining."""
    async with fake_teacher(answer_timeout_s=30, calls_per_tenant=1) as teacher, raw_connection(teacher) as connection:
        reader, writer = connection
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        body = score_request(CONTEXTS, [LARGE]).SerializeToString()
        writer.write(head(f"Content-Type: {PROTOBUF}", "Connection: close", f"Content-Length: {len(body)}") + body)
        await until(lambda: bytes_unread(teacher) > 0)
        with pytest.raises(RefusedError, match="1 calls in flight"):
            await teacher.client.score_http_json(CONTEXTS, [SMALL])
        draining = asyncio.create_task(teacher.server.drain(30))
        await asyncio.sleep(0.1)
        assert not draining.done()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        answered = await reader.read()
        assert await draining, "it was cut off"
        assert len(answered) > 4000 * 300 * 4


async def test_an_answer_over_http_that_is_taken_slowly_arrives_whole() -> None:
    async with fake_teacher(answer_timeout_s=1) as teacher, raw_connection(teacher) as (reader, writer):
        body = score_request(CONTEXTS, [LARGE]).SerializeToString()
        writer.write(head(f"Content-Type: {PROTOBUF}", "Connection: close", f"Content-Length: {len(body)}") + body)
        headers = await reader.readuntil(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200")
        data = bytearray()
        began_s = asyncio.get_running_loop().time()
        while piece := await reader.read(2**18):
            data += piece
            await asyncio.sleep(0.05)
        (scores,) = pb.ScoreResponse.FromString(bytes(data)).scores
        assert (scores.num_rows, len(scores.sampled_logprobs.data)) == (4000, 4 * 4000)
        assert asyncio.get_running_loop().time() - began_s > 1, "it was no slow reader"


async def test_a_client_that_hangs_up_while_it_is_answered_is_no_error_of_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Twelve times: which of two ways the server hears of it is a matter of chance, about one half each."""
    async with fake_teacher() as teacher:
        for index in range(12):
            async with connect(teacher.url) as client:
                stream = client.stream()
                for message in (
                    stream_settings(),
                    stream_context(0, CONTEXTS[0]),
                    *[stream_sequence(LARGE, CONTEXTS)] * 2,
                ):
                    await stream.write(message)
                await stream.read()
                await stream.read()
                await until(lambda: len(teacher.engine.requests) == 2 * (index + 1))  # noqa: B023
            await until(lambda: teacher.server.service.is_idle)
        assert teacher.server.service.status().tenants[0].rejections == {}
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
        assert teacher.reserved_tokens == 0


# ---------------------------------------------------------------- who sends


async def test_a_body_that_dribbles_in_is_given_up_and_its_connection_ended_and_another_is_answered() -> None:
    """A byte now and then is no sign of life: the whole body has `answer_timeout_s`."""
    async with fake_teacher(answer_timeout_s=1) as teacher, raw_connection(teacher) as (reader, writer):
        writer.write(head(f"Content-Type: {JSON}", "Content-Length: 1000000"))
        status = asyncio.ensure_future(reader.readline())
        num_answered = 0
        while not status.done():
            writer.write(b" ")
            await assert_right(teacher.client.score_http_json(CONTEXTS, [SMALL]))
            num_answered += 1
        assert (await status).startswith(b"HTTP/1.1 504"), await status
        assert num_answered >= 5
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 30)  # to the end of the connection
        await until(lambda: teacher.server.service.is_idle)


async def test_a_body_that_dribbles_in_and_arrives_is_answered() -> None:
    async with fake_teacher(answer_timeout_s=30) as teacher, raw_connection(teacher) as (reader, writer):
        body = score_request(CONTEXTS, [SMALL]).SerializeToString()
        writer.write(head(f"Content-Type: {PROTOBUF}", "Connection: close", f"Content-Length: {len(body)}"))
        for byte in body:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
        answered = await reader.read()
        assert answered.startswith(b"HTTP/1.1 200"), answered


REFUSED_UNREAD = {
    "a media type that is not spoken": ("415", "Content-Type: text/plain"),
    "a compressed body": ("415", f"Content-Type: {JSON}\r\nContent-Encoding: gzip"),
    "a timeout that is none": ("422", f"Content-Type: {JSON}\r\nRequest-Timeout: soon"),
    "a deadline": ("504", f"Content-Type: {PROTOBUF}\r\nRequest-Timeout: 0.2"),
    "a body over the limit": ("413", f"Content-Type: {JSON}"),
}


@pytest.mark.parametrize(("status", "lines"), REFUSED_UNREAD.values(), ids=REFUSED_UNREAD)
async def test_a_body_that_is_refused_before_its_end_is_not_read_for_as_long_as_it_comes(
    status: str, lines: str
) -> None:
    async with fake_teacher() as teacher, raw_connection(teacher) as (reader, writer):
        writer.write(head(lines, "Transfer-Encoding: chunked"))
        # A deadline is to be what ends it, and so less than the limit arrives before that.
        size, pause_s = (16, 0.02) if status == "504" else (2**16, 0.0)
        answered = asyncio.ensure_future(reader.readline())

        async def send_on() -> None:
            while True:
                writer.write(f"{size:x}\r\n".encode() + b"x" * size + b"\r\n")
                await writer.drain()
                await asyncio.sleep(pause_s)

        sending = asyncio.create_task(send_on())
        assert (await answered).split()[1] == status.encode()
        await asyncio.wait_for(asyncio.wait({sending}), 30)
        assert isinstance(sending.exception(), OSError), "the server hung up"
        await assert_right(teacher.client.score_http_json(CONTEXTS, [SMALL]))


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /healthz HTTP/1.1", "200"),
        ("GET /v1/info HTTP/1.1", "200"),
        ("POST /nowhere HTTP/1.1", "404"),
        ("PUT /v1/score HTTP/1.1", "405"),
    ],
)
async def test_a_body_that_nobody_asked_for_is_not_read_for_as_long_as_it_comes(line: str, status: str) -> None:
    async with fake_teacher() as teacher, raw_connection(teacher) as (reader, writer):
        writer.write(f"{line}\r\nHost: teacher\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        answered = asyncio.ensure_future(reader.readline())

        async def send_on() -> None:
            while True:
                writer.write(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)

        sending = asyncio.create_task(send_on())
        assert (await answered).split()[1] == status.encode()
        await asyncio.wait_for(asyncio.wait({sending}), 30)
        assert isinstance(sending.exception(), OSError), "the server hung up"


async def test_a_refused_body_that_was_sent_whole_leaves_its_connection_open() -> None:
    async with fake_teacher() as teacher, raw_connection(teacher) as (reader, writer):
        for _ in range(3):
            writer.write(head("Content-Type: text/plain", "Content-Length: 5") + b"hello")
            answered = await reader.readuntil(b"\r\n\r\n")
            assert answered.startswith(b"HTTP/1.1 415")
            length = next(line for line in answered.lower().splitlines() if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
