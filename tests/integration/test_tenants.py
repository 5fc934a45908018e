"""Several tenants of one real server, by gRPC and by HTTP: who is let in, whom a bound concerns, what nobody learns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import wire_client
from fake_engine import FakeEngine, fake_logprobs_TV, until
from tenants import SharedTeacher, shared_teacher, write_key
from vopd_client.errors import TeacherPermissionError
from vopd_client.teacher.client import TeacherClient
from vopd_server.tenancy import TenantLimits
from wire_client import (
    Question,
    Refusal,
    RefusedError,
    WireClient,
    score_request,
    stream_context,
    stream_sequence,
    stream_settings,
)

CONTEXTS: list[Sequence[int]] = [[1, 2, 3]]
GOOD = Question([5, 6], name="good")
WAYS: list[Any] = [
    WireClient.score,
    WireClient.score_stream,
    WireClient.score_http_protobuf,
    WireClient.score_http_json,
]
NO_LIMITS = TenantLimits()
TWO = {"a": NO_LIMITS, "b": NO_LIMITS}


async def assert_scores(client: WireClient) -> None:
    for way in WAYS:
        (answer,) = await way(client, CONTEXTS, [GOOD])
        expected_TV = fake_logprobs_TV(np.asarray(CONTEXTS[0]), np.asarray(GOOD.completion))
        np.testing.assert_allclose(answer.sampled_T, expected_TV[[0, 1], GOOD.completion], atol=1e-6)


async def open_stream(client: WireClient, *_asked: object) -> None:
    """A stream on which nothing is sent: a write when the status arrives would hide it (grpc/grpc#36066)."""
    try:
        await client.stream().read()
    except grpc.aio.AioRpcError as error:
        raise RefusedError(wire_client.refusal_of(error)) from error


REFUSED_WAYS: list[Any] = [
    WireClient.score,
    open_stream,
    WireClient.score_http_protobuf,
    WireClient.score_http_json,
]


async def refusal_of(way: Any, client: WireClient) -> Refusal:
    with pytest.raises(RefusedError) as refused:
        await way(client, CONTEXTS, [GOOD])
    return refused.value.refusal


# ---------------------------------------------------------------- who is let in


async def test_wrong_keys_of_every_kind_are_refused_alike_and_nothing_is_admitted(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, {**TWO, "gone": NO_LIMITS}) as shared:
        shared.revoke("gone")
        a_secret = shared.keys["a"].partition(".")[2]
        wrong = [
            f"Bearer {shared.keys['gone']}",  # revoked
            f"Bearer nobody.{a_secret}",  # no such tenant
            "Bearer a.wrong",
            f"Bearer b.{a_secret}",
            "Bearer a",
            "Bearer",
            "Basic YTpi",
            f"Bearer {'x' * 4000}",
        ]
        messages = set()
        for authorization in wrong:
            async with shared.connect_with(authorization) as client:
                for way in REFUSED_WAYS:
                    refusal = await refusal_of(way, client)
                    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
                    messages.add(refusal.message)
                info = await client.http.get("/v1/info")
                assert (info.status_code, info.headers["www-authenticate"]) == (401, "Bearer")
        assert messages == {"this API key is not known here, or it was revoked"}
        async with shared.connect_with("") as client:
            for way in REFUSED_WAYS:
                assert "no API key came with the call" in (await refusal_of(way, client)).message
        assert shared.engine.requests == []
        assert shared.is_empty
        for tenant_id in TWO:
            async with shared.connect(tenant_id) as client:
                await assert_scores(client)


async def test_health_needs_no_key(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, TWO) as shared, shared.connect_with("") as client:
        assert (await client.http.get("/readyz")).status_code == 200
        assert (await client.http.get("/healthz")).status_code == 200
        check = client.channel.unary_unary("/grpc.health.v1.Health/Check", response_deserializer=bytes)
        assert await check(b"") == b"\x08\x01", "SERVING"


async def test_a_key_that_is_made_opens_and_one_that_is_revoked_closes_while_others_go_on(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, TWO) as shared:
        shared.add("new", NO_LIMITS)
        async with shared.connect("new") as new, shared.connect("b") as b:
            await assert_scores(new)
            stream = new.stream()
            for message in (stream_settings(), stream_context(0, CONTEXTS[0]), stream_sequence(GOOD, CONTEXTS)):
                await stream.write(message)
            assert [(await stream.read()).WhichOneof("message") for _ in range(2)] == ["opened", "chunk"]
            shared.revoke("new")
            await stream.write(stream_sequence(GOOD, CONTEXTS))
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await stream.read()
            assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert (await refusal_of(WireClient.score, new)).code is grpc.StatusCode.UNAUTHENTICATED
            await assert_scores(b)
        assert "new" not in shared.sums
        assert shared.is_empty


async def test_the_file_is_looked_at_by_itself_every_second(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, TWO) as shared:
        key = write_key(shared.keys_file, "late", NO_LIMITS)
        await until(lambda: "late" in shared.sums)
        async with shared.connect_with(f"Bearer {key}") as client:
            await assert_scores(client)


async def test_the_client_library_says_at_once_that_its_key_is_wrong(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, TWO) as shared:
        server = shared.teacher.server
        for url in (server.url, server.http_url):
            with pytest.raises(TeacherPermissionError, match="not known here, or it was revoked"):
                await TeacherClient(url, api_key="a.wrong", timeout_s=60).connect()
            async with TeacherClient(url, api_key=shared.keys["a"]) as client:
                assert client.info.model_id == "fake"


# ---------------------------------------------------------------- whom a bound concerns


async def test_a_tenants_own_limits_are_told_in_the_handshake_and_held(tmp_path: Path) -> None:
    tenants = {"small": TenantLimits(queue_tokens=40, max_top_k=3), "b": NO_LIMITS}
    async with shared_teacher(tmp_path, tenants) as shared, shared.connect("small") as small, shared.connect("b") as b:
        limits = (await small.info()).limits
        assert (limits.max_tokens_per_request, limits.max_support_size) == (40, 3)
        assert (await b.info()).limits.max_support_size == 300, "as many as there are ids"
        for question, words in (
            (Question([5], k=4), "it must lie in [1, 3]"),
            (Question([5] * 40), "context 3 + completion 40 tokens > max_context_length 40"),
        ):
            with pytest.raises(RefusedError) as refused:
                await small.score(CONTEXTS, [question])
            assert refused.value.refusal.code is grpc.StatusCode.INVALID_ARGUMENT
            assert words in refused.value.refusal.message
            assert await b.score(CONTEXTS, [question])


async def test_only_the_tenant_over_its_bound_is_refused(tmp_path: Path) -> None:
    tenants = {"a": TenantLimits(queue_tokens=10), "b": NO_LIMITS}
    async with shared_teacher(tmp_path, tenants) as shared, shared.connect("a") as a, shared.connect("b") as b:
        shared.engine.hold()
        first = asyncio.ensure_future(a.score(CONTEXTS, [Question([1] * 5)]))
        await until(lambda: shared.sums["a"][0] == 8)
        for way in (WireClient.score, WireClient.score_http_json, WireClient.score_http_protobuf):
            refusal = await refusal_of(way, a)
            assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "tenant a has queued (queue_tokens 10" in refusal.message
            assert refusal.retry_delay_s
        held = asyncio.ensure_future(a.score_stream(CONTEXTS, [GOOD]))
        others = [asyncio.ensure_future(way(b, CONTEXTS, [GOOD])) for way in WAYS]
        await until(lambda: shared.sums["a"][2] == 1 and shared.sums["b"][4] == len(WAYS))
        shared.engine.let_go()
        await asyncio.gather(first, held, *others)
        assert shared.is_empty


async def test_a_tenant_may_have_so_many_calls_and_another_one_as_many(tmp_path: Path) -> None:
    async with (
        shared_teacher(tmp_path, TWO, calls_per_tenant=2) as shared,
        shared.connect("a") as a,
        shared.connect("b") as b,
    ):
        shared.engine.hold()
        running = [asyncio.ensure_future(way(client, CONTEXTS, [GOOD])) for way in WAYS[:2] for client in (a, b)]
        await until(lambda: shared.engine.num_running == 4)
        refusal = await refusal_of(WireClient.score_http_json, a)
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "tenant a has 2 calls in flight (calls_per_tenant)" in refusal.message
        shared.engine.let_go()
        await asyncio.gather(*running)


# ---------------------------------------------------------------- what nobody learns


async def test_a_request_id_of_another_tenant_is_just_a_name(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, TWO) as shared, shared.connect("a") as a, shared.connect("b") as b:
        shared.engine.hold()
        questions = {a: Question([5, 6]), b: Question([7, 8, 9])}
        asked = [asyncio.ensure_future(one.score(CONTEXTS, [questions[one]], request_id="same")) for one in (a, b)]
        await until(lambda: shared.engine.num_running == 2)
        asked[1].cancel()  # which ends b's, and not a's of the same name
        await until(lambda: shared.engine.num_cancelled == 1)
        assert not asked[0].done()
        shared.engine.let_go()
        (answer,) = await asked[0]
        assert len(answer.sampled_T) == 2


async def test_each_tenants_prefixes_are_cached_under_a_salt_of_its_own(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, TWO) as shared:
        for tenant_id in TWO:
            async with shared.connect(tenant_id) as client:
                await client.score(CONTEXTS, [GOOD])
                await client.score_stream(CONTEXTS, [GOOD])
        salts = [request.cache_salt for request in shared.engine.requests]
        assert salts[0] == salts[1] != salts[2] == salts[3]
        assert all(len(salt) == 64 for salt in salts)


# ---------------------------------------------------------------- whatever happens


async def test_every_budget_is_zero_after_any_mix_of_ends(tmp_path: Path) -> None:
    """Finished, cancelled, past the deadline, failed, wrong, hung up on: of three tenants, both transports, at once."""
    engine = SlowEngine(window_tokens=60)
    tenants = {
        "a": TenantLimits(weight=2, queue_tokens=80),
        "b": TenantLimits(tokens_in_flight=20),
        "c": TenantLimits(tokens_per_minute=100_000),
    }
    async with shared_teacher(tmp_path, tenants, engine) as shared:
        rng = np.random.default_rng(7)
        outcomes = [await_outcome(shared, "abc"[index % 3], int(rng.integers(1 << 30))) for index in range(240)]
        ended = await asyncio.gather(*outcomes)
        await until(lambda: shared.is_empty)
        assert {"answered", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "INVALID_ARGUMENT"} <= set(ended)
        assert shared.engine.num_running == 0
        for tenant_id in tenants:
            async with shared.connect(tenant_id) as client:
                await assert_scores(client)


class SlowEngine(FakeEngine):
    """Takes a few milliseconds, and fails now and then."""

    async def score(self, request: Any) -> Any:
        await asyncio.sleep(0.002 + 0.0005 * request.num_tokens)
        if len(request.completion_ids) == 13:
            raise RuntimeError("unlucky")
        return await super().score(request)


async def await_outcome(shared: SharedTeacher, tenant_id: str, seed: int) -> str:
    """One client's life: what became of its call."""
    rng = np.random.default_rng(seed)
    length = int(rng.choice([1, 5, 13, 25]))
    question = Question([5] * length, name="q")
    await asyncio.sleep(float(rng.uniform(0, 1)))
    async with shared.connect(tenant_id) as client:
        match int(rng.integers(6)):
            case 0:
                call = client.score(CONTEXTS, [question] * 3)
            case 1:
                call = client.score_stream(CONTEXTS, [question] * 4)
            case 2:
                call = client.score_http_json(CONTEXTS, [question])
            case 3:
                call = client.score(CONTEXTS, [Question([10**6])])
            case 4:
                call = client.send_score(score_request(CONTEXTS, [question] * 2), timeout_s=0.05)
            case _:
                call = client.post_score(score_request(CONTEXTS, [question] * 2))
        asking = asyncio.ensure_future(call)
        if rng.random() < 0.25:
            await asyncio.sleep(float(rng.uniform(0, 0.05)))
            asking.cancel()  # hangs up, over HTTP
        try:
            await asking
        except asyncio.CancelledError:
            return "CANCELLED"
        except RefusedError as error:
            return error.refusal.code.name
        return "answered"
