"""The process: what it prints, how it starts, how it ends.

Where a request must be in flight at a certain moment the process is held_teacher.py: the real life cycle around
an engine that answers when it is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx2
import psutil
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fake_engine import FakeEngine, until
from fake_server import fake_teacher
from teacher_process import RunningTeacher, spawn, start_teacher
from vopd_server.config import ServerConfig
from vopd_server.errors import ConfigError
from vopd_server.lifecycle import ENGINE_DEAD, HEALTH_NAMES, TeacherServer
from vopd_server.main import main
from wire_client import Question, RefusedError, WireClient, connect, score_request, stream_settings

HELD_TEACHER = str(Path(__file__).parent.parent / "held_teacher.py")
CONTEXTS = [[1, 2, 3]]
QUESTION = Question([5, 6], name="q")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(client: WireClient) -> set[int]:
    """The status of the server as a whole and of the service by name."""
    stub = health_pb2_grpc.HealthStub(client.channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in HEALTH_NAMES}


@pytest.fixture
def held_teacher(request: pytest.FixtureRequest) -> Iterator[RunningTeacher]:
    """Its requests wait in the engine until SIGUSR1, and it dies at SIGUSR2; flags come from an indirect parameter."""
    with spawn([HELD_TEACHER, *getattr(request, "param", ())]) as teacher:
        teacher.wait_until_ready()
        yield teacher


async def in_flight(client: WireClient, teacher: RunningTeacher) -> asyncio.Future[list[object]]:
    """A request that has reached the engine."""
    asking = asyncio.ensure_future(client.score(CONTEXTS, [QUESTION]))
    await until(lambda: "in the engine" in teacher.log())
    return asking


def has_ended(process: psutil.Process) -> bool:
    """Also when nobody has looked at its exit code yet: an orphan's zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---------------------------------------------------------------- it starts


async def test_it_says_what_it_serves_and_where_and_logs_calls_without_their_text(tiny_model_dir: Path) -> None:
    flags = ["--dtype", "float32", "--max-top-k", "77", "--log-format", "json"]
    with start_teacher(tiny_model_dir, *flags, afresh=True) as teacher:
        (line,) = [line for line in teacher.log().splitlines() if "ready at" in line]
        for told in (str(tiny_model_dir), "engine transformers", "dtype float32", "32768 tokens a sequence", "77 ids"):
            assert told in line
        assert teacher.url == f"grpc://127.0.0.1:{teacher.port}"
        async with connect(teacher.url) as client:
            assert await health(client) == {SERVING}
            request = score_request(CONTEXTS, [Question([201, 202, 203])])
            request.request_id = "find-me"
            await client.send_score(request)
        assert teacher.terminate() == 0
        logged = [json.loads(line) for line in teacher.log().splitlines() if line.startswith("{")]
        (call,) = [entry for entry in logged if entry.get("request_id") == "find-me"]
        assert (call["message"], call["code"], call["num_sequences"], call["num_tokens"]) == ("Score", "OK", 1, 6)
        assert not any("201" in str(value) for value in call.values() if isinstance(value, str))


def files_of_heads(place: Path) -> list[bytes]:
    return [path.read_bytes() for path in place.glob("vopd-head-*/*")]


async def test_the_head_that_it_gives_away_is_there_while_it_serves_and_no_longer(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    flags = ["--engine", "transformers", "--allow-full-vocab"]
    with start_teacher(tiny_model_dir, *flags, env={"TMPDIR": str(tmp_path)}) as teacher:
        (written,) = files_of_heads(tmp_path)
        async with connect(teacher.url, teacher.http_url) as client:
            data = await client.head()
            assert (await client.info()).head_sha256 == hashlib.sha256(data).hexdigest()
            assert (await client.head_http()).content == data
        assert written == data
        assert "the output head is given away" in teacher.log()
        assert teacher.terminate() == 0
        assert files_of_heads(tmp_path) == []


async def test_a_teacher_that_was_killed_comes_back_on_the_same_port(held_teacher: RunningTeacher) -> None:
    async with connect(held_teacher.url) as client:
        asking = await in_flight(client, held_teacher)
        held_teacher.kill()
        with pytest.raises(RefusedError) as lost:
            await asking
        assert lost.value.refusal.code is grpc.StatusCode.UNAVAILABLE
        with spawn([HELD_TEACHER, "--port", str(held_teacher.port)]) as second:
            second.wait_until_ready()
            assert second.url == held_teacher.url
            async with connect(second.url) as other_client:
                asking = await in_flight(other_client, second)
                second.send_signal(signal.SIGUSR1)
                await asking


async def test_health_says_not_serving_and_calls_are_sent_away_until_the_engine_is_warm() -> None:
    engine = FakeEngine()
    engine.hold()
    server = TeacherServer(ServerConfig(model="fake", port=0, http_port=0, admin_port=0), engine)
    await server.start()
    async with connect(server.url) as client:
        loading = asyncio.create_task(server.load())
        assert await health(client) == {NOT_SERVING}
        with pytest.raises(RefusedError) as refused:
            await client.send_score(score_request(CONTEXTS, [QUESTION]))
        assert refused.value.refusal.code is grpc.StatusCode.UNAVAILABLE
        assert refused.value.refusal.retry_delay_s == 2.0
        with pytest.raises(aio.AioRpcError) as unavailable:
            await client.info()
        assert unavailable.value.code() is grpc.StatusCode.UNAVAILABLE
        engine.let_go()
        await loading
        assert await health(client) == {SERVING}
        await client.score(CONTEXTS, [QUESTION])
    await server.close()
    assert engine.is_closed


async def test_a_port_that_is_taken_is_an_error_rather_than_shared() -> None:
    async with fake_teacher() as teacher:
        port = int(teacher.url.rpartition(":")[2])
        second = TeacherServer(ServerConfig(model="fake", port=port, http_port=0, admin_port=0), FakeEngine())
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            await second.start()
        await second.close()


async def test_a_tokenizer_that_fits_no_message_is_found_at_the_start() -> None:
    engine = FakeEngine(vocab_size=300_000)
    settings = ServerConfig(
        model="fake", port=0, max_message_bytes=2**21, max_tokens_per_request=100, max_sequences_per_request=1
    )
    server = TeacherServer(settings, engine)
    await server.start()
    with pytest.raises(ConfigError, match=r"max_message_bytes 2097152 < .* the tokenizer's table"):
        await server.load()
    await server.close()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "m", "--max-topk", "3"], "did you mean '--max-top-k'"),
        ([], "--model is required"),
        (["--model", "m", "--port", "x"], "--port: "),
        (["--model", "m", "--host", "0.0.0.0"], "host 0.0.0.0 can be reached from other machines"),
        (["--model", "m", "--queue-tokens", "10"], "max_tokens_per_request 131072 > queue_tokens 10"),
        (["--model", "m", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("vopd-server: ")
    assert words in told.err
    assert told.err.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the teacher ended with 2 before it was ready:") as failed:
        start_teacher(tmp_path / "no-such-model", afresh=True)
    told = str(failed.value)
    assert "Traceback" not in told
    assert f"vopd-server: cannot load the model '{tmp_path}/no-such-model'" in told


def test_help_says_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for name in ServerConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in told
    assert "default: 50051" in told


# ---------------------------------------------------------------- it ends


async def test_sigterm_finishes_what_is_in_flight_and_takes_nothing_new(held_teacher: RunningTeacher) -> None:
    async with connect(held_teacher.url) as client:
        asking = await in_flight(client, held_teacher)
        stream = client.stream()
        await stream.write(stream_settings())
        await stream.read()
        held_teacher.send_signal(signal.SIGTERM)
        await until(lambda: "draining" in held_teacher.log())
        assert await health(client) == {NOT_SERVING}
        with pytest.raises(RefusedError) as refused:
            await client.send_score(score_request(CONTEXTS, [QUESTION]))
        assert refused.value.refusal.code is grpc.StatusCode.UNAVAILABLE
        assert refused.value.refusal.retry_delay_s == 1.0
        with pytest.raises(aio.AioRpcError) as ended:
            await stream.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        held_teacher.send_signal(signal.SIGUSR1)
        (answer,) = await asking
        assert len(answer.sampled_T) == 2  # type: ignore[attr-defined]
    assert held_teacher.wait() == 0


@pytest.mark.parametrize("held_teacher", [["--port", "0", "--drain-timeout-s", "0.2"]], indirect=True)
async def test_what_does_not_finish_within_the_drain_time_is_cut_off(held_teacher: RunningTeacher) -> None:
    async with connect(held_teacher.url) as client:
        asking = await in_flight(client, held_teacher)
        held_teacher.send_signal(signal.SIGINT)
        with pytest.raises(RefusedError) as cut_off:
            await asking
        assert cut_off.value.refusal.code is grpc.StatusCode.UNAVAILABLE
    assert held_teacher.wait() == 1
    assert "drain_timeout_s 0.2 is over" in held_teacher.log()


@pytest.mark.parametrize("held_teacher", [["child"]], indirect=True)
async def test_a_second_signal_exits_at_once_and_so_do_the_engines_processes(held_teacher: RunningTeacher) -> None:
    started = psutil.Process(held_teacher.pid).children()
    async with connect(held_teacher.url) as client:
        asking = await in_flight(client, held_teacher)
        held_teacher.send_signal(signal.SIGTERM)
        await until(lambda: "draining" in held_teacher.log())
        held_teacher.send_signal(signal.SIGTERM)
        assert held_teacher.wait() == 128 + signal.SIGTERM
        with pytest.raises(RefusedError) as lost:
            await asking
        assert lost.value.refusal.code is grpc.StatusCode.UNAVAILABLE
    assert len(started) == 2  # the engine's process, and multiprocessing's own, which ends when this one has
    await until(lambda: all(has_ended(process) for process in started))


async def test_an_engine_that_dies_fails_what_it_was_asked_and_ends_the_process(held_teacher: RunningTeacher) -> None:
    async with connect(held_teacher.url) as client:
        watch = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        asking = await in_flight(client, held_teacher)
        held_teacher.send_signal(signal.SIGUSR2)
        assert (await watch.read()).status == NOT_SERVING
        with pytest.raises(RefusedError) as lost:
            await asking
        assert lost.value.refusal.code is grpc.StatusCode.UNAVAILABLE
        assert "killed by its test" in lost.value.refusal.message
        assert lost.value.refusal.retry_delay_s is not None
    assert held_teacher.wait() == ENGINE_DEAD
    assert "the engine cannot go on, and so this process ends: killed by its test" in held_teacher.log()


async def test_readiness_is_false_from_the_death_of_the_engine_on() -> None:
    async with fake_teacher(admin_port=0) as teacher:
        dying = asyncio.create_task(teacher.server.wait_until_dead())
        assert (await teacher.client.http.get("/readyz")).status_code == 200
        teacher.engine.die("killed by its test")
        assert str(await dying) == "killed by its test"
        assert await health(teacher.client) == {NOT_SERVING}
        ready = await teacher.client.http.get("/readyz")
        assert (ready.status_code, ready.text) == (503, "dead\n")
        async with httpx2.AsyncClient() as admin:
            assert (await admin.get(teacher.server.admin_url + "/readyz")).status_code == 503
        with pytest.raises(RefusedError) as refused:
            await teacher.client.score(CONTEXTS, [QUESTION])
        assert refused.value.refusal.code is grpc.StatusCode.UNAVAILABLE


def test_sigterm_while_the_model_loads_ends_the_process() -> None:
    with spawn([HELD_TEACHER, "load"]) as teacher:
        while "loading" not in teacher.log():
            assert teacher.is_running
        assert teacher.terminate() == 0
        assert "stopped while loading" in teacher.log()


def test_the_environment_of_the_caller_reaches_the_process(tiny_model_dir: Path) -> None:
    with pytest.raises(RuntimeError, match=r"VOPD_SERVER_MAX_TOPK.*did you mean 'VOPD_SERVER_MAX_TOP_K'"):
        start_teacher(tiny_model_dir, env={"VOPD_SERVER_MAX_TOPK": "3"})
    assert "VOPD_SERVER_MAX_TOPK" not in os.environ


async def test_the_health_service_knows_the_teacher_by_its_name_and_no_other() -> None:
    async with fake_teacher() as teacher:
        assert HEALTH_NAMES == ("", "vopd.teacher.v1.Teacher")
        stub = health_pb2_grpc.HealthStub(teacher.client.channel)
        with pytest.raises(aio.AioRpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="another"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
