"""What a server in a process of its own takes of memory for requests that are meant to take all of it.

Not in the test's process: what the sender needs would hide what the server does, and the highest mark of a process
that has run other tests before is out of reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx2
import pytest
from grpc import aio

from teacher_process import RunningTeacher, spawn
from vopd_proto import teacher_pb2 as pb
from wire_client import JSON, PROTOBUF, SERVICE, Question, WireClient, connect, score_request

HELD_TEACHER = str(Path(__file__).parent.parent / "held_teacher.py")
LIMIT_BYTES = 2**22
BOMB_BYTES = 200 * 2**20
# Of any attempt: a few messages of the largest size, and what allocators and garbage collection leave lying about.
MOST_GROWTH_BYTES = 48 * 2**20
CONTEXTS: list[Sequence[int]] = [[1, 2, 3]]
GOOD = Question([5, 6], name="good")


@pytest.fixture(scope="module")
def teacher() -> Iterator[RunningTeacher]:
    limits = ["--max-message-bytes", str(LIMIT_BYTES), "--max-tokens-per-request", "4096", "--max-top-k", "64"]
    with spawn([HELD_TEACHER, "--port", "0", *limits]) as teacher:
        teacher.wait_until_ready()
        teacher.send_signal(signal.SIGUSR1)  # its engine answers
        yield teacher


class Memory:
    """How much more a process has had than at the start. What is seen every few milliseconds, and the kernel's own
    high-water mark where that has risen: nothing that is higher than ever before is missed."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._before = self._seen = self._read("VmRSS")
        self._mark_before = self._read("VmHWM")

    def _read(self, name: str) -> int:
        return int(self._status.read_text().partition(f"{name}:")[2].split()[0]) * 1024

    async def watch(self) -> None:
        while True:
            self._seen = max(self._seen, self._read("VmRSS"))
            await asyncio.sleep(0.005)

    @property
    def growth(self) -> int:
        mark = self._read("VmHWM")
        return max(self._seen, mark if mark > self._mark_before else 0) - self._before


@contextlib.asynccontextmanager
async def little_memory_for(teacher: RunningTeacher, what: str) -> AsyncIterator[WireClient]:
    """A client of a server that takes little memory inside, and answers as ever afterwards."""
    async with connect(teacher.url, teacher.http_url) as client:
        for _ in range(20):  # what is made once is there before
            await client.score(CONTEXTS, [GOOD])
            await client.score_http_json(CONTEXTS, [GOOD])
        memory = Memory(teacher.pid)
        watching = asyncio.create_task(memory.watch())
        yield client
        watching.cancel()
        assert memory.growth < MOST_GROWTH_BYTES, f"{memory.growth} bytes for {what}"
        assert await client.score(CONTEXTS, [GOOD])
        assert await client.score_http_json(CONTEXTS, [GOOD])


@pytest.mark.parametrize("content_type", [JSON, PROTOBUF])
async def test_a_compressed_body_is_not_inflated(teacher: RunningTeacher, content_type: str) -> None:
    bomb = gzip.compress(bytes(BOMB_BYTES), compresslevel=1)
    assert len(bomb) < LIMIT_BYTES, "what comes over the wire is within the limit"
    async with little_memory_for(teacher, f"a gzip body of {BOMB_BYTES} bytes") as client:
        headers = {"Content-Type": content_type, "Content-Encoding": "gzip"}
        response = await client.http.post("/v1/score", content=bomb, headers=headers)
        assert (response.status_code, response.json()["error"]["field"]) == (415, "Content-Encoding")


@pytest.mark.parametrize("method", ["Score", "ScoreStream"])
async def test_a_compressed_message_is_not_inflated_beyond_the_limit(teacher: RunningTeacher, method: str) -> None:
    bomb = pb.ScoreRequest(request_id="x" * BOMB_BYTES).SerializeToString()
    options = [("grpc.max_send_message_length", -1)]
    address = teacher.url.removeprefix("grpc://")
    async with (
        little_memory_for(teacher, f"a gzip message of {BOMB_BYTES} bytes to {method}"),
        aio.insecure_channel(address, options=options, compression=grpc.Compression.Gzip) as channel,
    ):
        with pytest.raises(aio.AioRpcError) as refused:
            await channel.unary_unary(SERVICE + method)(bomb)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, refused.value


async def test_a_message_over_the_limit_is_not_taken_in(teacher: RunningTeacher) -> None:
    async with little_memory_for(teacher, f"a message of {BOMB_BYTES} bytes") as client:
        with pytest.raises(aio.AioRpcError) as refused:
            await client.channel.unary_unary(SERVICE + "Score")(
                random.Random(1).randbytes(2**20) * (BOMB_BYTES // 2**20)
            )
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "undeclared"])
@pytest.mark.parametrize("content_type", [JSON, PROTOBUF])
async def test_a_body_over_the_limit_is_not_kept(teacher: RunningTeacher, content_type: str, is_declared: bool) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(BOMB_BYTES // 2**16):
            yield b"[" * 2**16

    headers = {"Content-Type": content_type} | ({"Content-Length": str(BOMB_BYTES)} if is_declared else {})
    async with little_memory_for(teacher, f"a body of {BOMB_BYTES} bytes") as client:
        try:
            response = await client.http.post("/v1/score", content=body(), headers=headers)
        except httpx2.NetworkError:
            return  # the server hung up on a client that went on sending
        assert response.status_code == 413


async def test_bodies_that_declare_more_than_they_send_hold_nothing(teacher: RunningTeacher) -> None:
    """A hundred that announce the most there may be and send a byte: memory is taken as it comes, not in advance."""
    parts = urlsplit(teacher.http_url)
    lines = [f"Content-Type: {PROTOBUF}", f"Content-Length: {LIMIT_BYTES}"]
    request = "\r\n".join(["POST /v1/score HTTP/1.1", "Host: t", *lines, "", "x"]).encode()
    async with little_memory_for(teacher, "100 bodies that are announced") as client:
        writers = []
        for _ in range(100):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(request)
            writers.append(writer)
        assert await client.score_http_json(CONTEXTS, [GOOD])
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def announcing(rng: random.Random) -> bytes:
    """Arrays and lengths that are said to be huge, and are not."""
    request = score_request(CONTEXTS, [GOOD])
    sequence = request.sequences[0]
    match rng.randrange(5):
        case 0:
            sequence.completion_length = 2**32 - 1
        case 1:
            sequence.num_candidates = 2**32 - 1
            sequence.candidates.counts.data = b"\xff" * 8
            sequence.candidates.counts.bytes_per_item = 4
        case 2:
            sequence.teacher_top_k.k = 2**32 - 1
        case 3:
            sequence.context_length = 2**32 - 1
        case _:
            return b"\x2a\xff\xff\xff\xff\x0f" + request.SerializeToString()
    return request.SerializeToString()


async def test_requests_that_claim_to_be_huge_take_no_memory_for_it(teacher: RunningTeacher) -> None:
    rng = random.Random(5)
    async with little_memory_for(teacher, "600 claims") as client:

        async def over_grpc(data: bytes) -> str:
            with pytest.raises(aio.AioRpcError) as refused:
                await client.channel.unary_unary(SERVICE + "Score")(data)
            return str(refused.value.code().name)

        async def over_http(data: bytes) -> str:
            response = await client.http.post("/v1/score", content=data, headers={"Content-Type": PROTOBUF})
            return str(response.json()["error"]["code"])

        ways: list[Callable[[bytes], Awaitable[str]]] = [over_grpc, over_http]
        for _ in range(15):
            codes = await asyncio.gather(*(ways[index % 2](announcing(rng)) for index in range(40)))
            assert set(codes) == {"INVALID_ARGUMENT"}
