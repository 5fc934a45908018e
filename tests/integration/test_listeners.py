"""Where a teacher listens: readiness as probes see it, the admin listener, ports that are taken, TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx2
import numpy as np
import pytest
import trustme
from grpc import aio

from fake_engine import FakeEngine, until
from fake_server import fake_teacher
from vopd_server.config import ServerConfig
from vopd_server.errors import ConfigError
from vopd_server.http_listener import bind
from vopd_server.lifecycle import TeacherServer
from wire_client import Question, RefusedError, WireClient, connect, refusal_of_response

CONTEXTS = [[1, 2, 3]]
GOOD = Question([5, 6], name="good")


async def test_readiness_follows_the_engine_and_liveness_does_not() -> None:
    engine = FakeEngine()
    engine.hold()
    server = TeacherServer(ServerConfig(model="fake", port=0, http_port=0, admin_port=0), engine)
    await server.start()
    loading = asyncio.create_task(server.load())
    try:
        async with connect(server.url, server.http_url) as client, httpx2.AsyncClient(trust_env=False) as admin:

            async def told() -> list[tuple[int, str]]:
                responses = [
                    await http.get(f"{url}{path}")
                    for http, url in ((client.http, ""), (admin, server.admin_url))
                    for path in ("/healthz", "/readyz")
                ]
                return [(response.status_code, response.text) for response in responses]

            assert await told() == [(200, "ok\n"), (503, "starting\n")] * 2
            refusal = refusal_of_response(await client.http.get("/v1/info"))
            assert (refusal.http_status, refusal.retry_delay_s) == (503, 2.0)
            engine.let_go()
            await loading
            assert await told() == [(200, "ok\n"), (200, "ready\n")] * 2
            engine.hold()
            asking = asyncio.create_task(client.score_http_json(CONTEXTS, [GOOD]))
            await until(lambda: engine.num_running == 1)
            draining = asyncio.create_task(server.drain(10))
            await until(lambda: server.service.state == "draining")
            assert await told() == [(200, "ok\n"), (503, "draining\n")] * 2
            with pytest.raises(RefusedError, match="shutting down"):
                await client.score_http_json(CONTEXTS, [GOOD])
            engine.let_go()
            await asking
            assert await draining
    finally:
        await server.close()


async def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_own_head() -> None:
    """On a connection that is kept, every answer would: 40 ms each."""
    listening = bind("127.0.0.1", 0)
    serving = await asyncio.start_server(lambda _reader, writer: accepted.set_result(writer), sock=listening)
    accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
    async with serving:
        _, client = await asyncio.open_connection(*listening.getsockname())
        writer = await accepted
        assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        client.close()
        writer.close()


async def test_the_admin_listener_has_the_metrics_and_clients_do_not() -> None:
    async with fake_teacher(admin_port=0) as teacher, httpx2.AsyncClient(trust_env=False) as admin:
        await teacher.client.score(CONTEXTS, [GOOD])
        await teacher.client.score_http_json(CONTEXTS, [GOOD, GOOD])
        with pytest.raises(RefusedError):
            await teacher.client.score_http_json(CONTEXTS, [Question([999])])
        response = await admin.get(f"{teacher.server.admin_url}/metrics")
        numbers = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in response.text.splitlines()
            if not line.startswith("#")
        }
        assert response.headers["content-type"].startswith("text/plain")
        assert numbers['vopd_calls_total{code="OK",method="Score",tenant="open",transport="grpc"}'] == 1
        assert numbers['vopd_calls_total{code="OK",method="Score",tenant="open",transport="http"}'] == 1
        assert numbers['vopd_calls_total{code="INVALID_ARGUMENT",method="Score",tenant="open",transport="http"}'] == 1
        assert numbers['vopd_rejections_total{code="INVALID_ARGUMENT",tenant="open"}'] == 1
        assert numbers['vopd_sequences_scored_total{tenant="open"}'] == 3
        assert numbers['vopd_tokens_total{part="context",tenant="open"}'] == 9
        assert numbers['vopd_tokens_total{part="completion",tenant="open"}'] == 6
        assert numbers['vopd_stage_seconds_sum{stage="engine",tenant="open"}'] == 1.5
        assert numbers['vopd_stage_seconds_count{stage="encode",tenant="open"}'] == 2
        assert numbers['vopd_transport_bytes_total{direction="sent",tenant="open",transport="grpc"}'] > 0
        assert (numbers["vopd_ready"], numbers["vopd_reserved_tokens"]) == (1, 0)
        assert "process_resident_memory_bytes" in numbers
        assert (await teacher.client.http.get("/metrics")).status_code == 404
        assert (await admin.get(f"{teacher.server.admin_url}/v1/info")).status_code == 404


@pytest.mark.parametrize("listener", ["http_port", "admin_port"])
async def test_a_port_that_is_taken_is_found_at_the_start(listener: str) -> None:
    async with fake_teacher() as first:
        taken = urlsplit(first.server.http_url).port
        ports = {"port": 0, "http_port": 0, "admin_port": 0, listener: taken}
        second = TeacherServer(ServerConfig(model="fake", **ports), FakeEngine())
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{taken}: Address already in use"):
            await second.start()
        await second.close()


async def test_http_can_be_left_out() -> None:
    async with fake_teacher(http_port=None) as teacher:
        assert teacher.server.http_url == teacher.server.admin_url == ""
        assert "http" not in teacher.server.describe()
        await teacher.client.score(CONTEXTS, [GOOD])


@pytest.fixture(scope="module")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and cert.pem with key.pem for 127.0.0.1."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    return directory


async def test_with_a_certificate_both_transports_speak_tls_and_nothing_else(tls_dir: Path) -> None:
    config = ServerConfig(
        model="fake",
        port=0,
        http_port=0,
        admin_port=None,
        tls_cert_file=tls_dir / "cert.pem",
        tls_key_file=tls_dir / "key.pem",
    )
    server = TeacherServer(config, FakeEngine())
    await server.start()
    await server.load()
    try:
        assert (server.url[:8], server.http_url[:8]) == ("grpcs://", "https://")
        roots = ssl.create_default_context(cafile=str(tls_dir / "ca.pem"))
        target = server.url.removeprefix("grpcs://")
        credentials = grpc.ssl_channel_credentials((tls_dir / "ca.pem").read_bytes())
        async with (
            aio.secure_channel(target, credentials) as channel,
            httpx2.AsyncClient(base_url=server.http_url, verify=roots, trust_env=False) as http,
        ):
            client = WireClient(channel, http)
            over_grpc, over_http = await client.score(CONTEXTS, [GOOD]), await client.score_http_json(CONTEXTS, [GOOD])
            np.testing.assert_array_equal(over_grpc[0].sampled_T, over_http[0].sampled_T)
        async with httpx2.AsyncClient(trust_env=False) as plain:
            with pytest.raises(httpx2.TransportError):
                await plain.get(server.http_url.replace("https", "http") + "/healthz")
    finally:
        await server.close()


@pytest.mark.parametrize("broken", ["tls_cert_file", "tls_key_file"])
async def test_a_certificate_that_cannot_be_used_is_found_at_the_start(
    tls_dir: Path, tmp_path: Path, broken: str
) -> None:
    path = tmp_path / "file.pem"

    def start() -> None:
        files = {"tls_cert_file": tls_dir / "cert.pem", "tls_key_file": tls_dir / "key.pem", broken: path}
        TeacherServer(ServerConfig(model="fake", **files), FakeEngine())

    with pytest.raises(ConfigError, match=rf"{broken} .*file\.pem: No such file"):
        start()
    path.write_text("no PEM")
    with pytest.raises(ConfigError, match="not PEM, or damaged"):
        start()
    other = trustme.CA().issue_cert("127.0.0.1")
    (other.cert_chain_pems[0] if broken == "tls_cert_file" else other.private_key_pem).write_to_path(path)
    with pytest.raises(ConfigError, match="the key is not the certificate's"):
        start()
