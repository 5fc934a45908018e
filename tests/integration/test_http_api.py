"""What only HTTP has: bodies, content types, headers, paths, clients that hang up.

The real server on real sockets. What HTTP shares with gRPC is in test_bad_input.py and tests/contract.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx2
import numpy as np
import pytest

from fake_engine import FakeEngine, fake_hidden_TH, fake_logprobs_TV, fake_scores, until
from fake_server import FakeTeacher, fake_teacher
from vopd_proto import teacher_pb2 as pb
from vopd_server import calls
from vopd_server.types import ScoreRequest, Scores
from wire_client import JSON, PROTOBUF, Question, RefusedError, checked_response, refusal_of_response, score_request

CONTEXTS = [[1, 2, 3]]
GOOD = Question([5, 6], name="good")
GOOD_BODY = {"contexts": CONTEXTS, "sequences": [{"completion_ids": [5, 6], "sequence_id": "good"}]}


@pytest.fixture
async def teacher() -> AsyncIterator[FakeTeacher]:
    """A small teacher; whatever was done to it, it answers afterwards and holds nothing."""
    engine = FakeEngine(max_context_length=64)
    async with fake_teacher(engine, max_tokens_per_request=128, queue_tokens=256, max_top_k=16) as running:
        yield running
        await until(lambda: running.reserved_tokens == 0)
        (answer,) = await running.client.score_http_json(CONTEXTS, [GOOD])
        expected_TV = fake_logprobs_TV(np.asarray(CONTEXTS[0]), np.asarray(GOOD.completion))
        np.testing.assert_array_equal(answer.sampled_T, expected_TV[[0, 1], [5, 6]])


async def post(teacher: FakeTeacher, body: bytes | str, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await teacher.client.http.post("/v1/score", content=body, headers={"Content-Type": JSON, **named})


# ---------------------------------------------------------------- JSON


def sequence(**fields: Any) -> str:
    return json.dumps({"contexts": CONTEXTS, "sequences": [{"completion_ids": [5], **fields}]})


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ("", "ScoreRequest", "Invalid JSON"),
        ("{", "ScoreRequest", "Invalid JSON: EOF"),
        ("\x00\xff", "ScoreRequest", "Invalid JSON"),
        ("[1, 2]", "ScoreRequest", "Input should be an object"),
        ("[" * 100_000, "ScoreRequest", "recursion limit"),
        ("{}", "contexts", "Field required; sequences: Field required"),
        (json.dumps(GOOD_BODY | {"context": 1}), "context", "Extra inputs are not permitted"),
        (sequence(prompt="text"), "sequences[0].prompt", "Extra inputs are not permitted"),
        (sequence(completion_ids=[1, "2"]), "sequences[0].completion_ids[1]", "valid integer"),
        (sequence(completion_ids=[1.5]), "sequences[0].completion_ids[0]", "valid integer"),
        (sequence(completion_ids=[True]), "sequences[0].completion_ids[0]", "valid integer"),
        (sequence(completion_ids=[-1]), "sequences[0].completion_ids[0]", "greater than or equal to 0"),
        (sequence(completion_ids=[2**32]), "sequences[0].completion_ids[0]", "less than 4294967296"),
        (sequence(completion_ids=[10**400]), "sequences[0].completion_ids[0]", "less than 4294967296"),
        (sequence(completion_ids=None), "sequences[0].completion_ids", "valid array"),
        (sequence(candidates=[1]), "sequences[0].candidates[0]", "valid array"),
        (sequence(candidates=[[1], [2]]), "sequences[0].candidates.counts", "2 counts for 1 completion tokens"),
        (sequence(teacher_top_k="3"), "sequences[0].teacher_top_k", "valid integer"),
        (sequence(teacher_top_k=0), "sequences[0].teacher_top_k.k", "it must lie in [1, 16]"),
        (sequence(teacher_top_k=1, candidates=[[1]]), "sequences[0]", "a sequence has one support"),
        (sequence(context_index=1), "sequences[0].context_index", "1; the request holds 1 contexts"),
        (sequence(sequence_id="x" * 257), "sequences[0].sequence_id", "at most 256 characters"),
        (json.dumps(GOOD_BODY | {"temperature": "1"}), "temperature", "valid number"),
        ('{"contexts": [[1]], "sequences": [{"completion_ids": [5], "sequence_id": "\\ud800"}]}', "ScoreRequest", ""),
    ],
)
async def test_json_that_is_wrong_is_refused_by_the_field(
    teacher: FakeTeacher, body: str, field: str, words: str
) -> None:
    refusal = refusal_of_response(await post(teacher, body.encode("latin-1")))
    assert (refusal.http_status, refusal.code, refusal.field) == (422, grpc.StatusCode.INVALID_ARGUMENT, field)
    assert words in refusal.message
    assert len(refusal.message) <= 1024
    assert teacher.engine.requests == []


async def test_hidden_states_are_refused_by_naming_what_there_is(teacher: FakeTeacher) -> None:
    refusal = refusal_of_response(await post(teacher, sequence(hidden_states=True)))
    assert (refusal.http_status, refusal.code) == (409, grpc.StatusCode.FAILED_PRECONDITION)
    assert "it has candidates, sampled, teacher_top_k" in refusal.message


async def test_hidden_states_are_lists_of_numbers() -> None:
    async with fake_teacher(FakeEngine(gives_head=True)) as teacher:
        body = {"contexts": CONTEXTS, "sequences": [{"completion_ids": [5, 6], "hidden_states": True}]}
        (scores,) = checked_response(await post(teacher, json.dumps(body))).json()["scores"]
    expected_TH = fake_hidden_TH(np.asarray(CONTEXTS[0]), np.asarray([5, 6]))
    assert [len(row) for row in scores["hidden_states"]] == [8, 8]
    np.testing.assert_array_equal(np.asarray(scores["hidden_states"], np.float32), expected_TH)
    assert (scores["support_logprobs"], scores["support_ids"]) == (None, None)


async def test_hidden_states_of_16_bits_are_bounded_in_json_as_numbers_of_32() -> None:
    engine = FakeEngine(gives_head=True, dtype="bfloat16")
    async with fake_teacher(engine, max_tokens_per_request=500_000) as teacher:
        body = {"contexts": [[1]], "sequences": [{"completion_ids": [1] * 60_000, "hidden_states": True}] * 8}
        refusal = refusal_of_response(await post(teacher, json.dumps(body)))
        assert f"an answer of up to {8 * (60_000 * 36 + 1280)} bytes > the bound on answers in JSON" in refusal.message


async def test_a_request_id_is_echoed_and_otherwise_made(teacher: FakeTeacher) -> None:
    named = checked_response(await post(teacher, json.dumps(GOOD_BODY | {"request_id": "find-me"}))).json()
    made = checked_response(await post(teacher, json.dumps(GOOD_BODY))).json()
    assert named["request_id"] == "find-me"
    assert len(made["request_id"]) == 32


async def test_every_float32_comes_back_as_it_was_and_minus_infinity_is_a_string(teacher: FakeTeacher) -> None:
    """Every bit pattern is hard to show; thousands of random ones are."""
    bits = np.random.default_rng(3).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    logprobs = -np.abs(bits[np.isfinite(bits)])[:50].astype(np.float32)
    logprobs[7] = -np.inf

    def answer(request: ScoreRequest) -> Scores:
        return Scores(logprobs)

    teacher.engine.answer(answer)
    question = Question([1] * 50)
    (told,) = await teacher.client.score_http_json(CONTEXTS, [question])
    body = {"contexts": CONTEXTS, "sequences": [{"completion_ids": [1] * 50}]}
    raw = checked_response(await post(teacher, json.dumps(body))).json()
    teacher.engine.answer(fake_scores)
    np.testing.assert_array_equal(told.sampled_T, logprobs)
    assert raw["scores"][0]["sampled_logprobs"][7] == "-Infinity"


# ---------------------------------------------------------------- bodies and headers


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/jsonx", "multipart/form-data; boundary=x"])
async def test_another_content_type_is_refused_by_naming_ours(teacher: FakeTeacher, content_type: str) -> None:
    refusal = refusal_of_response(await post(teacher, json.dumps(GOOD_BODY), Content_Type=content_type))
    assert (refusal.http_status, refusal.field) == (415, "Content-Type")
    assert "send application/json or application/x-protobuf" in refusal.message


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_compressed_body_is_refused_unread(teacher: FakeTeacher, coding: str) -> None:
    refusal = refusal_of_response(await post(teacher, b"\x1f\x8b" + b"\0" * 100, Content_Encoding=coding))
    assert (refusal.http_status, refusal.field) == (415, "Content-Encoding")


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_a_content_type_may_be_written_in_other_ways(teacher: FakeTeacher, media_type: str) -> None:
    checked_response(await post(teacher, json.dumps(GOOD_BODY), Content_Type=media_type))


@pytest.mark.parametrize(
    ("accept", "answered"),
    [("*/*", JSON), ("", JSON), (PROTOBUF, PROTOBUF), (f"text/html, {PROTOBUF};q=0.5", PROTOBUF), (JSON, JSON)],
)
async def test_an_answer_comes_as_accept_asks_and_otherwise_as_the_request(
    teacher: FakeTeacher, accept: str, answered: str
) -> None:
    response = checked_response(await post(teacher, json.dumps(GOOD_BODY), Accept=accept), answered)
    if answered == PROTOBUF:
        assert pb.ScoreResponse.FromString(response.content).scores[0].num_rows == 2
    packed = score_request(CONTEXTS, [GOOD]).SerializeToString()
    default = answered if accept in (PROTOBUF, JSON) or "," in accept else PROTOBUF
    checked_response(await post(teacher, packed, Content_Type=PROTOBUF, Accept=accept), default)


@pytest.mark.parametrize("is_declared", [True, False], ids=["with a length", "in chunks"])
async def test_a_body_over_the_limit_is_refused_and_the_server_lives_on(is_declared: bool) -> None:
    settings = {"max_message_bytes": 2**21, "max_tokens_per_request": 128, "max_sequences_per_request": 8}
    async with fake_teacher(FakeEngine(), **settings) as teacher:

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b" " * 2**16

        for media_type in (JSON, PROTOBUF):
            content: Any = b" " * (2**21 + 1) if is_declared else chunks()
            refusal = refusal_of_response(
                await teacher.client.http.post("/v1/score", content=content, headers={"Content-Type": media_type})
            )
            assert (refusal.http_status, refusal.field) == (413, "body")
            assert f"> {2**21}" in refusal.message
        await teacher.client.score_http_json(CONTEXTS, [GOOD])


async def test_json_is_bounded_more_tightly_than_protobuf_both_ways() -> None:
    async with fake_teacher(FakeEngine()) as teacher:
        refusal = refusal_of_response(await post(teacher, b" " * (2**24 + 1)))
        assert (refusal.http_status, refusal.field) == (413, "body")
        question = Question([1] * 8192, k=256)  # 16.8 MB of protobuf
        with pytest.raises(RefusedError, match="the bound on answers in JSON 16777216"):
            await teacher.client.score_http_json(CONTEXTS, [question])
        assert teacher.engine.requests == []
        (answer,) = await teacher.client.score_http_protobuf(CONTEXTS, [question])
        assert answer.support is not None
        assert answer.support.shape == (8192, 256)


async def send_raw(teacher: FakeTeacher, *parts: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(teacher.server.http_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    return reader, writer


def head(length: int, **headers: str) -> bytes:
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {length}\r\n{more}\r\n".encode()
    )


async def test_a_body_that_never_ends_is_given_up() -> None:
    async with fake_teacher(FakeEngine(), answer_timeout_s=0.2) as teacher:
        reader, writer = await send_raw(teacher, head(1000), b'{"contexts"')
        status, body = (await reader.readline()).split()[1], b""
        while not body.endswith(b"\r\n\r\n") and (line := await reader.readline()):
            body += line
        assert status == b"504"
        writer.close()
        await until(lambda: teacher.server.service.is_idle)


async def test_bytes_that_are_no_http_hurt_nobody(teacher: FakeTeacher) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0" * 4096,
        b"PRI * HTTP/2.0\r\n\r\nSM",
    ):
        reader, writer = await send_raw(teacher, garbage)
        writer.write_eof()
        answer = await reader.read()
        assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
        writer.close()


@pytest.mark.parametrize("told", ["soon", "nan", "inf", "0", "-1", "1s"])
async def test_a_timeout_that_is_no_number_of_seconds_is_refused(teacher: FakeTeacher, told: str) -> None:
    refusal = refusal_of_response(await post(teacher, json.dumps(GOOD_BODY), Request_Timeout=told))
    assert (refusal.http_status, refusal.field) == (422, "Request-Timeout")


async def test_a_client_that_hangs_up_gives_its_budget_back(teacher: FakeTeacher) -> None:
    teacher.engine.hold()
    body = json.dumps(GOOD_BODY).encode()
    _, writer = await send_raw(teacher, head(len(body)), body)
    await until(lambda: teacher.engine.num_running == 1)
    assert teacher.reserved_tokens == 5
    writer.close()
    await until(lambda: teacher.engine.num_cancelled == 1 and teacher.reserved_tokens == 0)
    assert teacher.server.service.is_idle
    teacher.engine.let_go()


async def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_error_of_the_server(
    teacher: FakeTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps(GOOD_BODY).encode()
    _, writer = await send_raw(teacher, head(len(body)), body[:5])
    await until(lambda: not teacher.server.service.is_idle)
    writer.close()
    await until(lambda: teacher.server.service.is_idle)
    assert teacher.server.service.status().tenants[0].rejections == {}
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_one_connection_serves_many_requests(teacher: FakeTeacher) -> None:
    body = json.dumps(GOOD_BODY).encode()
    reader, writer = await send_raw(teacher, *[head(len(body)), body] * 3)
    for _ in range(3):
        headers = await reader.readuntil(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200")
        length = next(line for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
    writer.close()


async def test_a_call_is_logged_with_its_id_and_size_and_without_its_tokens(
    teacher: FakeTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [271, 272]
    body = {
        "contexts": [ids],
        "sequences": [{"completion_ids": ids, "candidates": [ids, ids]}],
        "request_id": "find-me",
    }
    with caplog.at_level("DEBUG"):
        checked_response(await post(teacher, json.dumps(body)))
        refusal_of_response(await post(teacher, json.dumps(body | {"sequences": [{"completion_ids": [27100]}]})))
    answered, wrong = (vars(record) for record in caplog.records if record.getMessage() == "Score")
    assert (answered["transport"], answered["request_id"], answered["code"]) == ("http", "find-me", "OK")
    assert (answered["num_sequences"], answered["num_tokens"]) == (1, 4)
    assert (wrong["request_id"], wrong["code"]) == ("find-me", "INVALID_ARGUMENT")
    told = [value for record in caplog.records for value in vars(record).values() if isinstance(value, str)]
    assert not any("271" in value for value in told)


# ---------------------------------------------------------------- the head

LARGE_HEAD_BYTES = 32 * 2**20  # more than a connection buffers


@pytest.fixture
async def large_head() -> AsyncIterator[FakeTeacher]:
    """A teacher whose head takes a while to send; it sends it afterwards, too, and nothing hangs on."""
    async with fake_teacher(FakeEngine(gives_head=True), answer_timeout_s=2) as running:
        running.engine.lengthen_head(LARGE_HEAD_BYTES)
        yield running
        await until(lambda: running.server.service.is_idle)
        assert len((await running.client.head_http()).content) == LARGE_HEAD_BYTES


async def ask_for_head(teacher: FakeTeacher, **headers: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The answer's headers have been read, and of its body nothing."""
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    reader, writer = await send_raw(teacher, f"GET /v1/head HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    return reader, writer


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ("ETAG", 304),
        ("W/ETAG", 304),
        ('"another", ETAG', 304),
        ("*", 304),
        ('"another"', 200),
        ("sha256", 200),  # without its quotes it is no tag
        ("", 200),
    ],
)
async def test_a_client_that_has_the_head_is_not_sent_it_again(told: str, status: int) -> None:
    async with fake_teacher(FakeEngine(gives_head=True)) as teacher:
        head = teacher.engine.info.head
        assert head is not None
        sent = told.replace("ETAG", f'"{head.sha256}"').replace("sha256", head.sha256)
        response = await teacher.client.head_http(If_None_Match=sent)
        assert response.status_code == status
        assert response.headers["etag"] == f'"{head.sha256}"'
        assert response.content == (b"" if status == 304 else head.path.read_bytes())
        await until(lambda: teacher.server.service.is_idle)


async def test_the_head_is_sent_as_it_is_read_by_the_client(
    large_head: FakeTeacher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read: list[int] = []
    read_piece = calls._read_piece
    monkeypatch.setattr(calls, "_read_piece", lambda *where: read.append(where[1]) or read_piece(*where))
    with caplog.at_level("INFO", logger="vopd_server"):
        reader, writer = await ask_for_head(large_head)
        await asyncio.sleep(0.2)
        assert len(read) < LARGE_HEAD_BYTES // 2**20, "it waits for who does not read"
        assert not large_head.server.service.is_idle
        assert len(await reader.readexactly(LARGE_HEAD_BYTES)) == LARGE_HEAD_BYTES
        await until(lambda: large_head.server.service.is_idle)
    writer.close()
    assert read == list(range(0, LARGE_HEAD_BYTES, 2**20))
    (told,) = (vars(record) for record in caplog.records if record.getMessage() == "GetHead")
    assert (told["transport"], told["code"]) == ("http", "OK")


@pytest.mark.parametrize(
    ("leave", "code"),
    [("hang up", "CANCELLED"), ("deadline", "DEADLINE_EXCEEDED"), ("unread", "DEADLINE_EXCEEDED")],
)
async def test_a_head_that_nobody_waits_for_any_more_ends(
    large_head: FakeTeacher, leave: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut short, which its length tells; never closed with another length."""
    caplog.set_level("INFO", logger="vopd_server")
    headers = {"Request_Timeout": "0.2"} if leave == "deadline" else {}
    reader, writer = await ask_for_head(large_head, **headers)
    if leave == "hang up":
        writer.close()
    await until(lambda: large_head.server.service.is_idle)
    if leave != "hang up":
        assert len(await reader.read()) < LARGE_HEAD_BYTES
        writer.close()
    (told,) = (vars(record) for record in caplog.records if record.getMessage() == "GetHead")
    assert told["code"] == code


async def test_a_head_that_cannot_be_read_is_an_error_and_no_half_answer(teacher: FakeTeacher) -> None:
    async with fake_teacher(FakeEngine(gives_head=True)) as with_head:
        head = with_head.engine.info.head
        assert head is not None
        head.path.unlink()
        with pytest.raises(RefusedError) as refused:
            await with_head.client.head_http()
        assert (refused.value.refusal.http_status, refused.value.refusal.code) == (500, grpc.StatusCode.INTERNAL)
        assert str(head.path) not in refused.value.refusal.message


async def test_a_wrong_timeout_and_a_head_that_is_not_given_away_are_told_like_any_error(teacher: FakeTeacher) -> None:
    with pytest.raises(RefusedError) as refused:
        await teacher.client.head_http(Request_Timeout="soon")
    assert (refused.value.refusal.http_status, refused.value.refusal.field) == (422, "Request-Timeout")
    with pytest.raises(RefusedError, match="no hidden_states support; it has candidates, sampled, teacher_top_k") as no:
        await teacher.client.head_http()
    assert (no.value.refusal.http_status, no.value.refusal.code) == (409, grpc.StatusCode.FAILED_PRECONDITION)


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, grpc.StatusCode.NOT_FOUND),
        ("GET", "/v1/nothing", 404, grpc.StatusCode.NOT_FOUND),
        ("GET", "/docs", 404, grpc.StatusCode.NOT_FOUND),
        ("GET", "/v1/score", 405, grpc.StatusCode.UNIMPLEMENTED),
        ("POST", "/v1/info", 405, grpc.StatusCode.UNIMPLEMENTED),
        ("POST", "/v1/head", 405, grpc.StatusCode.UNIMPLEMENTED),
    ],
)
async def test_another_path_or_method_is_told_like_any_error(
    teacher: FakeTeacher, method: str, path: str, status: int, code: grpc.StatusCode
) -> None:
    refusal = refusal_of_response(await teacher.client.http.request(method, path))
    assert (refusal.http_status, refusal.code) == (status, code)
