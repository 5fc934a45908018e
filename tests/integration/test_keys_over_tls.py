"""The client library with keys over TLS: who is let in, how soon a wrong key is told, and when a right one is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from fake_engine import fake_logprobs_TV, until
from tenants import SharedTeacher, shared_teacher, write_key
from vopd_client.errors import TeacherPermissionError
from vopd_client.teacher.client import TeacherClient
from vopd_client.types import SequenceToScore
from vopd_proto import teacher_pb2 as pb
from vopd_server.key_file import utc_now, with_revoked
from vopd_server.key_storage import change_key_file
from vopd_server.tenancy import TenantLimits
from wire_client import (
    JSON,
    PROTOBUF,
    Question,
    RefusedError,
    WireClient,
    refusal_of,
    score_request,
    stream_context,
    stream_sequence,
    stream_settings,
)

ASKED = SequenceToScore(np.array([1, 2, 3]), np.array([5, 6]))
CONTEXTS = [[1, 2, 3]]
NO_LIMITS = TenantLimits()
SCHEMES = ["grpcs", "https"]


@pytest.fixture(scope="module")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and cert.pem with key.pem for 127.0.0.1."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    return directory


@asynccontextmanager
async def teacher_with_tls(directory: Path, tls_dir: Path, *tenant_ids: str) -> AsyncIterator[SharedTeacher]:
    files = {"tls_cert_file": tls_dir / "cert.pem", "tls_key_file": tls_dir / "key.pem"}
    async with shared_teacher(directory, dict.fromkeys(tenant_ids, NO_LIMITS), **files) as shared:
        yield shared


def library_client(shared: SharedTeacher, scheme: str, key: str, tls_dir: Path) -> TeacherClient:
    server = shared.teacher.server
    url = {"grpcs": server.url, "https": server.http_url}[scheme]
    assert url.startswith(scheme + "://")
    return TeacherClient(url, api_key=key, tls_ca_file=tls_dir / "ca.pem", timeout_s=600)


def count(shared: SharedTeacher, name: str, **labels: str) -> float:
    """The sum of a metric over its series with these labels."""
    families = shared.teacher.server.service.metrics.registry.collect()
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_key_opens_over_tls_and_a_wrong_one_is_told_after_one_try(
    tmp_path: Path, tls_dir: Path, scheme: str
) -> None:
    async with teacher_with_tls(tmp_path, tls_dir, "a", "b") as shared:
        async with library_client(shared, scheme, shared.keys["a"], tls_dir) as client:
            (scores,) = await client.score([ASKED])
        expected_TV = fake_logprobs_TV(ASKED.context_ids, ASKED.completion_ids)
        np.testing.assert_allclose(scores.sampled_logprobs_T, expected_TV[[0, 1], ASKED.completion_ids], atol=1e-5)
        secret_of_a = shared.keys["a"].partition(".")[2]
        for wrong in ("a.wrong", f"b.{secret_of_a}"):
            before = count(shared, "vopd_calls_total", code="UNAUTHENTICATED")
            with pytest.raises(TeacherPermissionError, match="not known here, or it was revoked"):
                await library_client(shared, scheme, wrong, tls_dir).connect()
            assert count(shared, "vopd_calls_total", code="UNAUTHENTICATED") - before == 1, "it was tried again"
        assert [request.completion_ids.tolist() for request in shared.engine.requests] == [[5, 6]]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_key_that_is_revoked_amid_a_stream_is_told_and_not_waited_for(
    tmp_path: Path, tls_dir: Path, scheme: str
) -> None:
    """`timeout_s` is 600: a client that took it for an absent teacher would outlast this test's own time."""
    async with (
        teacher_with_tls(tmp_path, tls_dir, "a", "b") as shared,
        library_client(shared, scheme, shared.keys["b"], tls_dir) as b,
        library_client(shared, scheme, shared.keys["a"], tls_dir) as a,
        b.open_stream() as stream_of_b,
    ):
        async with a.open_stream() as stream:
            await stream.submit(ASKED)
            shared.revoke("a")
            with pytest.raises(TeacherPermissionError):
                await stream.submit(ASKED)
        await stream_of_b.submit(ASKED)
        assert [len(request.completion_ids) for request in shared.engine.requests] == [2, 2], "a's first, b's"
        await until(lambda: shared.is_empty)


async def test_a_new_key_of_a_tenant_ends_what_was_opened_with_its_old_one(tmp_path: Path) -> None:
    """Also when the file is looked at only after both: whoever has a stolen key keeps no stream by it."""
    async with shared_teacher(tmp_path, {"a": NO_LIMITS}) as shared, shared.connect("a") as old:
        stream = old.stream()
        for message in (stream_settings(), stream_context(0, CONTEXTS[0]), stream_sequence(Question([5]), CONTEXTS)):
            await stream.write(message)
        assert [(await stream.read()).WhichOneof("message") for _ in range(2)] == ["opened", "chunk"]
        change_key_file(shared.keys_file, lambda file: with_revoked(file, "a", revoked_at=utc_now()))
        shared.keys["a"] = write_key(shared.keys_file, "a", NO_LIMITS)
        shared.teacher.server.service.refresh_tenants()
        await stream.write(stream_sequence(Question([5]), CONTEXTS))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stream.read()
        assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with shared.connect("a") as new:
            assert await new.score(CONTEXTS, [Question([5])])
        assert shared.is_empty


async def test_limits_that_were_edited_leave_an_open_stream_open(tmp_path: Path) -> None:
    async with shared_teacher(tmp_path, {"a": NO_LIMITS}) as shared, shared.connect("a") as client:
        stream = client.stream()
        for message in (stream_settings(), stream_context(0, CONTEXTS[0])):
            await stream.write(message)
        assert (await stream.read()).WhichOneof("message") == "opened"
        text = shared.keys_file.read_text()
        shared.keys_file.write_text(text.replace('"weight": 1.0', '"weight": 2.5'))
        shared.teacher.server.service.refresh_tenants()
        assert shared.teacher.server.service.admission.scheduler.queues["a"].limits.weight == 2.5
        await stream.write(stream_sequence(Question([5]), CONTEXTS))
        assert (await stream.read()).WhichOneof("message") == "chunk"


async def test_nothing_of_what_a_stranger_sends_is_taken_in(tmp_path: Path) -> None:
    request = score_request(CONTEXTS, [Question([5] * 50_000)])
    async with shared_teacher(tmp_path, {"a": NO_LIMITS}) as shared:
        for authorization in ("", "Bearer a.wrong"):
            async with shared.connect_with(authorization) as client:
                json_call = client.score_http_json(CONTEXTS, [Question([5] * 1000)])
                calls = [client.send_score(request), client.post_score(request), json_call, open_stream(client)]
                for call in calls:
                    with pytest.raises(RefusedError) as refused:
                        await call
                    assert refused.value.refusal.code is grpc.StatusCode.UNAUTHENTICATED
        assert count(shared, "vopd_calls_total", code="UNAUTHENTICATED") == 8
        assert count(shared, "vopd_transport_bytes_total", direction="received") == 0
        async with shared.connect("a") as client:
            await client.send_score(request)
        assert count(shared, "vopd_transport_bytes_total", direction="received") == request.ByteSize()


async def open_stream(client: WireClient) -> None:
    """A stream on which nothing is sent: a write when the status arrives would hide it (grpc/grpc#36066)."""
    call = client.stream()
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        raise RefusedError(refusal_of(error)) from error


async def test_requests_of_one_id_by_two_tenants_are_answered_each_with_its_own(tmp_path: Path) -> None:
    async with (
        shared_teacher(tmp_path, {"a": NO_LIMITS, "b": NO_LIMITS}) as shared,
        shared.connect("a") as a,
        shared.connect("b") as b,
    ):
        shared.engine.hold()
        questions = [Question([5, 6]), Question([7, 8])]
        asked: list[Any] = [
            asyncio.ensure_future(client.score(CONTEXTS, [question], request_id="same"))
            for client, question in zip((a, b), questions, strict=True)
        ]
        await until(lambda: shared.engine.num_running == 2)
        shared.engine.let_go()
        for (answer,), question in zip(await asyncio.gather(*asked), questions, strict=True):
            expected_TV = fake_logprobs_TV(np.asarray(CONTEXTS[0]), np.asarray(question.completion))
            np.testing.assert_allclose(answer.sampled_T, expected_TV[[0, 1], question.completion], atol=1e-6)


@pytest.mark.parametrize("accept", [JSON, PROTOBUF])
async def test_a_tenants_limits_are_told_over_http_too(tmp_path: Path, accept: str) -> None:
    tenants = {"small": TenantLimits(queue_tokens=40, max_top_k=3)}
    async with shared_teacher(tmp_path, tenants) as shared, shared.connect("small") as client:
        response = await client.http.get("/v1/info", headers={"Accept": accept})
        if accept == PROTOBUF:
            limits = pb.GetInfoResponse.FromString(response.content).limits
            told = (limits.max_tokens_per_request, limits.max_support_size)
        else:
            told = tuple(response.json()["limits"][name] for name in ("max_tokens_per_request", "max_support_size"))
        assert told == (40, 3)
