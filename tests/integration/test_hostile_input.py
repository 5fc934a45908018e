"""Ten thousand malformed requests: none brings the server down, or slows it afterwards."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import grpc
from grpc import aio

from fake_engine import FakeEngine, until
from fake_server import FakeTeacher, fake_teacher
from vopd_proto import teacher_pb2 as pb
from wire_client import JSON, PROTOBUF, SERVICE, Question, score_body, score_request, stream_context, stream_sequence

NUM_REQUESTS = 10_000
CONCURRENT = 24
CONTEXTS: list[Sequence[int]] = [[1, 2, 3], [4] * 50]
QUESTIONS = [
    Question([5, 6], name="plain"),
    Question([7] * 20, k=5, context=1, name="top-k"),
    Question([8, 9], candidates=[[1, 2], [3]], name="candidates"),
]
GOOD = Question([5, 6], name="good")
NEVER = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNIMPLEMENTED"}


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` with bits flipped, bytes inserted, removed, repeated, cut off, or lengths blown up."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        where = rng.randrange(len(changed) + 1)
        match rng.randrange(7):
            case 0 if changed:
                changed[where % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[where:where] = rng.randbytes(rng.randint(1, 8))
            case 2:
                del changed[where : where + rng.randint(1, 8)]
            case 3:
                changed[where:where] = changed[where : where + rng.randint(1, 40)]
            case 4:
                del changed[where:]
            case 5:
                changed[where : where + 1] = b"\xff\xff\xff\xff\x0f"  # a varint of four thousand millions
            case _:
                changed = bytearray(rng.randbytes(rng.randint(0, 60)))
    return bytes(changed)


def attempts(rng: random.Random, teacher: FakeTeacher) -> Iterator[Callable[[], Awaitable[str]]]:
    """Each sends one malformed request, and returns the code of its answer."""
    request = score_request(CONTEXTS, QUESTIONS).SerializeToString()
    body = json.dumps(score_body(CONTEXTS, QUESTIONS)).encode()
    settings = pb.ScoreStreamRequest(settings=pb.StreamSettings()).SerializeToString()
    messages = [stream_context(0, CONTEXTS[0]), *(stream_sequence(question, CONTEXTS) for question in QUESTIONS)]
    stream = [message.SerializeToString() for message in messages]
    for _ in range(NUM_REQUESTS):
        match rng.randrange(10):
            case 0 | 1 | 2:
                data = mutated(rng, request)
                yield lambda data=data: unary(teacher, "Score", data)
            case 3:
                data = rng.randbytes(rng.randint(1, 30))
                method = rng.choice(["GetInfo", "GetTokenizer", "Score"])
                yield lambda data=data, method=method: unary(teacher, method, data)
            case 4 | 5:
                sent = [settings if rng.random() < 0.9 else mutated(rng, settings)]
                sent += [mutated(rng, part) if rng.random() < 0.5 else part for part in stream]
                yield lambda sent=sent: streamed(teacher, sent)
            case 6 | 7:
                data = mutated(rng, request)
                yield lambda data=data: posted(teacher, data, PROTOBUF)
            case _:
                data = mutated(rng, body)
                yield lambda data=data: posted(teacher, data, JSON)


async def unary(teacher: FakeTeacher, method: str, data: bytes) -> str:
    try:
        await teacher.client.channel.unary_unary(SERVICE + method)(data, timeout=60)
    except aio.AioRpcError as error:
        return code_of(error)
    return "OK"


async def streamed(teacher: FakeTeacher, messages: Sequence[bytes]) -> str:
    async def outgoing() -> object:
        for message in messages:
            yield message

    try:
        async for data in teacher.client.channel.stream_stream(SERVICE + "ScoreStream")(outgoing(), timeout=60):
            response = pb.ScoreStreamResponse.FromString(data)
            if response.HasField("failure"):
                assert response.failure.code != grpc.StatusCode.INTERNAL.value[0], response.failure
    except aio.AioRpcError as error:
        return code_of(error)
    return "OK"


def code_of(error: aio.AioRpcError) -> str:
    """What grpc.aio makes of a write to a call that has just ended is its own (grpc/grpc#36066)."""
    if error.details() == "Internal error from Core":
        return "ended while writing"
    return error.code().name


async def posted(teacher: FakeTeacher, data: bytes, content_type: str) -> str:
    response = await teacher.client.http.post("/v1/score", content=data, headers={"Content-Type": content_type})
    if response.status_code == 200:
        return "OK"
    code: str = response.json()["error"]["code"]
    return code


async def seconds_of_a_good_request(teacher: FakeTeacher, number: int = 60) -> float:
    """The median, of the processor: server, engine and clients are this process, whatever else the machine does."""
    found = []
    for _ in range(number):
        began_s = time.process_time()
        await teacher.client.score(CONTEXTS, [GOOD])
        await teacher.client.score_http_json(CONTEXTS, [GOOD])
        found.append(time.process_time() - began_s)
    return statistics.median(found)


def memory_bytes() -> int:
    """Resident at this moment: server, engine and clients are this process."""
    [pages] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line]
    return int(pages) * 1024


async def test_ten_thousand_malformed_requests_do_no_harm() -> None:
    rng = random.Random(20261125)
    async with fake_teacher(FakeEngine(max_context_length=200)) as teacher:
        await seconds_of_a_good_request(teacher)
        before_s = await seconds_of_a_good_request(teacher)
        memory_before = memory_bytes()
        codes: Counter[str] = Counter()
        waiting = attempts(rng, teacher)

        async def work() -> None:
            for attempt in waiting:
                codes[await attempt()] += 1

        await asyncio.gather(*(work() for _ in range(CONCURRENT)))
        assert codes.total() == NUM_REQUESTS
        assert not NEVER & set(codes), codes
        assert codes["INVALID_ARGUMENT"] > NUM_REQUESTS / 2, "most of them were not malformed"
        await until(lambda: teacher.reserved_tokens == 0 and teacher.num_waiting == 0)
        assert teacher.server.service.is_idle
        assert memory_bytes() - memory_before < 100 * 2**20
        after_s = await seconds_of_a_good_request(teacher)
        assert after_s < 2 * before_s, f"{before_s:.4f} s before, {after_s:.4f} s after"
