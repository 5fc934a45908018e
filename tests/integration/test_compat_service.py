"""Other trainers' requests are calls like any other: keys, bounds, deadlines, metrics, logs, errors. Real sockets."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compat_requests import WAYS, Way, edited
from fake_engine import FakeEngine, fake_logprobs_TV, until
from fake_server import FakeTeacher, fake_teacher
from teacher_process import RunningTeacher, spawn
from tenants import shared_teacher
from vopd_server.compat import scoring
from vopd_server.tenancy import TenantLimits
from wire_client import CODES_OF_STATUS, Refusal, checked_response, refusal_of_response

PROMPT = [17, 289, 204, 3, 100, 5]
HEALTH = ["/health", "/health_generate"]
MODELS = ["/v1/models", "/get_model_info"]

each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.method)


@pytest.fixture
async def teacher() -> AsyncIterator[FakeTeacher]:
    engine = FakeEngine(max_context_length=64)
    async with fake_teacher(
        engine, max_tokens_per_request=128, queue_tokens=128, max_top_k=16, max_sequences_per_request=8
    ) as running:
        yield running
        await until(lambda: running.reserved_tokens == 0)


async def ask(http: httpx2.AsyncClient, way: Way, temperature: float = 1.0, **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await http.post(way.path, json=way.body(PROMPT, temperature), headers=named)
    answer: dict[str, Any] = checked_response(response).json()
    return answer


async def refusal_to(teacher: FakeTeacher, way: Way, body: object) -> Refusal:
    return refusal_of_response(await teacher.client.http.post(way.path, json=body))


# ---------------------------------------------------------------- whose call it is


@each_way
async def test_a_call_needs_a_key_where_there_are_keys(way: Way, tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, {"a": TenantLimits()}) as shared:
        async with shared.connect_with("") as stranger, shared.connect("a") as tenant:
            for path in HEALTH:
                assert (await stranger.http.get(path)).status_code == 200
            for path in MODELS:
                assert refusal_of_response(await stranger.http.get(path)).http_status == 401
                checked_response(await tenant.http.get(path))
            refusal = refusal_of_response(await stranger.http.post(way.path, json=way.body(PROMPT, 1.0)))
            assert (refusal.http_status, refusal.code) == (401, grpc.StatusCode.UNAUTHENTICATED)
            assert shared.engine.requests == []
            await ask(tenant.http, way)
        (request,) = shared.engine.requests
        assert request.cache_salt != ""  # the tenant's own


async def test_a_client_that_can_be_told_a_url_only_has_its_key_in_it(tmp_path: Path) -> None:
    """Which HTTP clients send as Basic authorization, as TRL's do."""
    async with shared_teacher(tmp_path, {"a": TenantLimits()}) as shared:
        key, url = shared.keys["a"], shared.teacher.server.http_url

        async def status(userinfo: str) -> int:
            async with httpx2.AsyncClient(trust_env=False) as http:
                return (await http.get(f"{url.replace('://', f'://{userinfo}@')}/v1/models")).status_code

        assert [await status(userinfo) for userinfo in (f"job:{key}", f":{key}", key)] == [200] * 3
        assert [await status(userinfo) for userinfo in (f"{key}:x", f"job:{key}x", "a", ":")] == [401] * 4
        async with shared.connect_with(f"Basic {key}") as not_base64, shared.connect_with("Basic /w==") as no_text:
            for client in (not_base64, no_text):
                assert refusal_of_response(await client.http.get("/v1/models")).http_status == 401


@each_way
async def test_a_tenant_s_own_limits_hold(way: Way, tmp_path: Path) -> None:
    limits = {"a": TenantLimits(queue_tokens=5)}
    async with shared_teacher(tmp_path, limits) as shared, shared.connect("a") as tenant:
        refusal = refusal_of_response(await tenant.http.post(way.path, json=way.body(PROMPT, 1.0)))
    assert (refusal.http_status, refusal.field) == (422, way.prompt_field)
    assert refusal.message == f"{way.prompt_field}: context 1 + completion 5 tokens > max_context_length 5"


async def test_a_tenant_s_models_are_as_long_as_its_own_limits(tmp_path: Path) -> None:
    limits = {"a": TenantLimits(queue_tokens=50)}
    async with shared_teacher(tmp_path, limits) as shared, shared.connect("a") as tenant:
        assert (await tenant.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 50


# ---------------------------------------------------------------- the queue, the engine, the clock


@each_way
async def test_over_the_queue_bound_a_call_is_told_when_to_come_again(way: Way, teacher: FakeTeacher) -> None:
    """The bound is 128 tokens: 21 prompts of six wait, one more is too many."""
    teacher.engine.hold()
    waiting = [asyncio.create_task(ask(teacher.client.http, way)) for _ in range(21)]
    await until(lambda: teacher.reserved_tokens == 21 * 6)
    response = await teacher.client.http.post(way.path, json=way.body(PROMPT, 1.0))
    refusal = refusal_of_response(response)
    assert (refusal.http_status, refusal.code) == (429, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert refusal.retry_delay_s is not None
    assert int(response.headers["Retry-After"]) >= refusal.retry_delay_s
    teacher.engine.let_go()
    assert len(await asyncio.gather(*waiting)) == 21


@each_way
async def test_a_deadline_that_passes_takes_the_call_out_of_the_engine(way: Way, teacher: FakeTeacher) -> None:
    teacher.engine.hold()
    body = way.body(PROMPT, 1.0)
    response = await teacher.client.http.post(way.path, json=body, headers={"Request-Timeout": "0.2"})
    assert refusal_of_response(response).http_status == 504
    assert (teacher.engine.num_cancelled, teacher.reserved_tokens) == (1, 0)
    teacher.engine.let_go()


async def test_a_teacher_that_still_loads_says_so_and_is_not_healthy() -> None:
    async with fake_teacher() as teacher:
        teacher.server.service.drain()
        for path in HEALTH:
            response = await teacher.client.http.get(path)
            assert (response.status_code, response.text) == (503, "draining\n")
        for way in WAYS:
            refusal = await refusal_to(teacher, way, way.body(PROMPT, 1.0))
            assert (refusal.http_status, refusal.retry_delay_s) == (503, 1.0)


@each_way
async def test_an_engine_s_failure_is_an_error_and_tells_nothing_of_it(way: Way, teacher: FakeTeacher) -> None:
    teacher.engine.fail(lambda _: RuntimeError("secret"))
    refusal = await refusal_to(teacher, way, way.body(PROMPT, 1.0))
    assert (refusal.http_status, refusal.code) == (500, grpc.StatusCode.INTERNAL)
    assert refusal.request_id != ""
    assert "secret" not in refusal.message


@each_way
async def test_an_answer_too_large_for_json_is_refused_before_any_work(
    way: Way, teacher: FakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_JSON_BYTES", 100)
    refusal = await refusal_to(teacher, way, way.body(PROMPT, 1.0))
    assert (refusal.http_status, refusal.field) == (422, way.prompt_field)
    assert "> the bound on answers in JSON 100" in refusal.message
    assert teacher.engine.requests == []


# ---------------------------------------------------------------- temperature


@each_way
async def test_a_temperature_divides_the_logits(way: Way, teacher: FakeTeacher) -> None:
    logprobs_TV = fake_logprobs_TV(np.asarray(PROMPT[:1]), np.asarray(PROMPT[1:]), temperature=0.5)
    realised = way.realised(await ask(teacher.client.http, way, 0.5), PROMPT)
    np.testing.assert_array_equal(realised, logprobs_TV[np.arange(5), PROMPT[1:]])


@each_way
async def test_temperature_zero_is_of_a_token_that_is_never_chosen_so_scores_are_at_one(
    way: Way, teacher: FakeTeacher
) -> None:
    at_zero = way.realised(await ask(teacher.client.http, way, 0), PROMPT)
    np.testing.assert_array_equal(at_zero, way.realised(await ask(teacher.client.http, way, 1), PROMPT))


@each_way
async def test_a_temperature_that_the_engine_cannot_apply_is_refused(way: Way) -> None:
    async with fake_teacher(FakeEngine(any_temperature=False)) as teacher:
        refusal = await refusal_to(teacher, way, way.body(PROMPT, 0.7))
        assert (refusal.http_status, refusal.code) == (409, grpc.StatusCode.FAILED_PRECONDITION)
        assert refusal.message == "temperature 0.7: engine fake scores at temperature 1 only"
        for temperature in (0, 1):
            await ask(teacher.client.http, way, temperature)


@each_way
async def test_what_is_no_temperature_is_refused_by_its_name(way: Way, teacher: FakeTeacher) -> None:
    for temperature in (-1, 1e-9, 1e39):
        refusal = await refusal_to(teacher, way, way.body(PROMPT, temperature))
        assert (refusal.http_status, refusal.field) == (422, way.temperature_field)


# ---------------------------------------------------------------- what is wrong

WRONG: list[tuple[object, str, str]] = [
    ([1, 300], "[1]", "300 is no id in [0, 300)"),
    ([1] * 65, "", "context 1 + completion 64 tokens > max_context_length 64"),
    ([[1, 2]] * 9, "", "9 sequences > max_sequences_per_request 8"),
    ([[1, 2], [1] * 65], "[1]", "context 1 + completion 64 tokens > max_context_length 64"),
    ([[1] * 50] * 3, "", "150 tokens > max_tokens_per_request 128"),
]


@each_way
async def test_a_wrong_prompt_is_refused_by_its_name_and_nothing_is_scored(way: Way, teacher: FakeTeacher) -> None:
    for prompt, where, words in WRONG:
        if way.method == "Generate" and isinstance(prompt, list) and isinstance(prompt[0], list):
            continue  # it has one prompt
        refusal = await refusal_to(teacher, way, way.body(PROMPT, 1.0) | {way.prompt_field: prompt})
        assert (refusal.http_status, refusal.field) == (422, way.prompt_field + where)
        assert words in refusal.message
    assert teacher.engine.requests == []


@each_way
async def test_generation_and_a_stream_are_refused(way: Way, teacher: FakeTeacher) -> None:
    name = "max_new_tokens" if way.method == "SglangGenerate" else "max_tokens"
    path = [name] if way.method == "Completions" else ["sampling_params", name]
    for body in (edited(way.body(PROMPT, 1.0), path, 16), way.body(PROMPT, 1.0) | {"stream": True}):
        refusal = await refusal_to(teacher, way, body)
        assert (refusal.http_status, refusal.code) == (422, grpc.StatusCode.INVALID_ARGUMENT)
        assert "this is a scoring service, which generates nothing: send" in refusal.message
    assert teacher.engine.requests == []


@each_way
async def test_a_body_that_is_not_json_or_too_large_is_refused(way: Way, teacher: FakeTeacher) -> None:
    http = teacher.client.http
    assert refusal_of_response(await http.post(way.path, content=b"{}")).http_status == 415
    headers = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        assert refusal_of_response(await http.post(way.path, content=body, headers=headers)).http_status == 422
    large = b" " * (16 * 2**20 + 1)
    assert refusal_of_response(await http.post(way.path, content=large, headers=headers)).http_status == 413


# ---------------------------------------------------------------- what is told of it


@each_way
async def test_a_call_is_counted_and_logged_under_its_own_name(
    way: Way, teacher: FakeTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        await ask(teacher.client.http, way)
        await refusal_to(teacher, way, way.body([], 1.0))
    answered, refused = (vars(record) for record in caplog.records if record.getMessage() == way.method)
    assert (answered["transport"], answered["code"], answered["num_sequences"], answered["num_tokens"]) == (
        "http",
        "OK",
        1,
        6,
    )
    assert refused["code"] == "INVALID_ARGUMENT"
    metrics = teacher.server.service.metrics.exposition(teacher.server.service.status())[0].decode()
    for code in ("OK", "INVALID_ARGUMENT"):
        assert f'vopd_calls_total{{code="{code}",method="{way.method}",tenant="open",transport="http"}} 1.0' in metrics
    assert 'vopd_tokens_total{part="completion",tenant="open"} 5.0' in metrics
    assert 'vopd_stage_seconds_count{stage="encode",tenant="open"} 1.0' in metrics


# ---------------------------------------------------------------- whatever is sent


@pytest.fixture(scope="module")
def running() -> Iterator[RunningTeacher]:
    with spawn([str(Path(__file__).parent.parent / "held_teacher.py")]) as teacher:
        teacher.wait_until_ready()
        teacher.send_signal(signal.SIGUSR1)  # let go
        yield teacher


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path
    for name, inner in items:
        yield from places(inner, (*path, name))


@each_way
def test_whatever_stands_in_any_place_of_a_body_is_scored_or_refused(way: Way, running: RunningTeacher) -> None:
    """Never a 500, and the teacher is as well afterwards."""
    body = way.body([1, 2, 3], 1.0)
    if way.method == "Generate":
        body["sampling_params"] |= {"prompt_logprob_token_ids": [[1, -1], [2, 3]], "prompt_logprob_start": 0}
        del body["sampling_params"]["prompt_logprobs"]
    statuses: list[int] = []

    with httpx2.Client(base_url=running.http_url, trust_env=False) as http:

        @settings(
            max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
        )
        @given(place=st.sampled_from([place for place in places(body) if place]), value=ANYTHING, extra=ANYTHING)
        def tried(place: tuple[Any, ...], value: object, extra: object) -> None:
            sent = json.loads(json.dumps(body))
            inner = sent
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = value
            sent["extra"] = extra if len(statuses) % 2 else None
            # Infinity and NaN are no JSON, and some libraries write them all the same.
            response = http.post(way.path, content=json.dumps(sent), headers={"Content-Type": "application/json"})
            statuses.append(response.status_code)
            if response.status_code != 200:
                assert response.status_code in (404, 409, 422), response.text
                assert response.json()["error"]["code"] in CODES_OF_STATUS[response.status_code]

        tried()
        assert 200 in statuses
        assert 422 in statuses
        checked_response(http.post(way.path, json=way.body([1, 2, 3], 1.0)))
