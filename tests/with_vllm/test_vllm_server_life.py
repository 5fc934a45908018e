"""`vopd-server serve --engine vllm` as a process: signals let it finish, and a dead or hung EngineCore ends it.

A request is kept in flight by stopping EngineCore (SIGSTOP): what other signals it gets meanwhile wait for it.
Every server here ends in its own way, so each case starts one.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx2
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fake_engine import until
from teacher_process import RunningTeacher, start_teacher
from tiny_model import write_tiny_model
from vopd_server.lifecycle import DRAINED, ENGINE_DEAD
from wire_client import Answer, Question, RefusedError, WireClient, connect

# Three blocks of 128 tokens, one of which vLLM keeps for itself.
ENGINE_ARGS = {
    "enforce_eager": True,
    "max_num_batched_tokens": 128,
    "block_size": 128,
    "num_gpu_blocks_override": 3,
}
KV_CACHE_TOKENS = 256
START_TIMEOUT_S = 300
# vLLM's workers take 5 s to end even when asked; see EXIT_GRACE_S in vllm_backend for the rest.
END_TIMEOUT_S = 40
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
CONTEXT = [1, 2, 3]
# With its context the longest that the KV cache holds beside the token that vLLM generates.
LONGEST = Question([5] * (KV_CACHE_TOKENS - 1 - len(CONTEXT)), k=3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 32, the smallest that vLLM's CPU attention has."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=128, max_length=512)


class VllmServer:
    """A running server, seen from outside."""

    def __init__(self, teacher: RunningTeacher, client: WireClient) -> None:
        self.teacher = teacher
        self.client = client
        self.processes = psutil.Process(teacher.pid).children(recursive=True)
        [self.engine_core] = [process for process in self.processes if process.name() == "VLLM::EngineCore"]

    async def ask_and_wait_until_in_flight(self) -> asyncio.Task[list[Answer]]:
        asking = asyncio.create_task(self.client.score([CONTEXT], [LONGEST]))
        while "vopd_reserved_tokens 255.0" not in await self.get("/metrics"):  # noqa: ASYNC110  # there is nothing to wait for
            await asyncio.sleep(0.05)
        return asking

    async def get(self, path: str) -> str:
        """An answer of the admin listener: status and text."""
        async with httpx2.AsyncClient() as client:
            response = await client.get(self.teacher.admin_url + path)
        return f"{response.status_code} {response.text}"

    async def wait_for_end(self) -> int:
        """The exit code; by then every process has gone as well."""
        code = await asyncio.to_thread(self.teacher.wait, END_TIMEOUT_S)
        await asyncio.sleep(0.5)  # multiprocessing's tracker of shared memory ends when we have
        left = [process for process in self.processes if process.is_running()]
        assert [process.cmdline() for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
        return code


@asynccontextmanager
async def serving(model_dir: Path, *flags: str) -> AsyncIterator[VllmServer]:
    arguments = ["--engine", "vllm", "--engine-args", json.dumps(ENGINE_ARGS), *flags]
    with await asyncio.to_thread(start_teacher, model_dir, *arguments, timeout_s=START_TIMEOUT_S) as teacher:
        async with connect(teacher.url, teacher.http_url) as client:
            yield VllmServer(teacher, client)


@pytest.mark.parametrize(
    ("engine_args", "flags", "words"),
    [
        ({"tensor_paralel_size": 2}, [], "did you mean tensor_parallel_size?"),
        (
            ENGINE_ARGS,
            ["--max-context-length", "300"],
            "length 300: the KV cache holds a sequence of 255 tokens; lower",
        ),
    ],
    ids=["no such argument", "KV cache too small"],
)
def test_what_vllm_does_not_take_or_cannot_hold_is_one_line_at_the_start(
    model_dir: Path, engine_args: dict[str, object], flags: list[str], words: str
) -> None:
    arguments = ["--engine", "vllm", "--engine-args", json.dumps(engine_args), *flags]
    with pytest.raises(RuntimeError, match="the teacher ended with 2 before it was ready") as failed:
        start_teacher(model_dir, *arguments, timeout_s=START_TIMEOUT_S)
    (told,) = [line for line in str(failed.value).splitlines() if line.startswith("vopd-server: ")]
    assert words in told
    assert "Traceback" not in str(failed.value)


def test_check_compares_arguments_with_vllms_own(model_dir: Path) -> None:
    def check(engine_args: dict[str, int]) -> subprocess.CompletedProcess[str]:
        flags = ["--model", str(model_dir), "--engine", "vllm", "--engine-args", json.dumps(engine_args)]
        command = [sys.executable, "-m", "vopd_server.main", "check", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    wrong = check({"tensor_paralel_size": 2})
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean tensor_parallel_size?" in wrong.stderr
    right = check({"tensor_parallel_size": 2})
    assert right.returncode == 0
    assert "tensor_parallel_size=2" in right.stdout
    assert "up to 511 tokens" in right.stdout


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
async def test_a_signal_lets_what_is_in_flight_finish(model_dir: Path, name: str) -> None:
    """SIGINT to everybody, as Ctrl-C in a terminal; SIGTERM to the server alone, as from a supervisor."""
    async with serving(model_dir) as server:
        assert "255 tokens a sequence" in server.teacher.log()  # the model has 512
        server.engine_core.suspend()
        asking = await server.ask_and_wait_until_in_flight()
        if name == "SIGINT":
            server.teacher.send_group_signal(signal.SIGINT)
        else:
            server.teacher.send_signal(signal.SIGTERM)
        await until(lambda: "draining" in server.teacher.log())
        server.engine_core.resume()
        [answer] = await asking
        assert answer.sampled_T.shape == (252,)
        assert await server.wait_for_end() == DRAINED


@pytest.mark.parametrize("how", ["killed", "hung"])
async def test_an_engine_that_is_dead_or_hung_ends_the_server_for_another_to_take_its_place(
    model_dir: Path, how: str
) -> None:
    """A stopped EngineCore does not hear SIGTERM either."""
    async with serving(model_dir, "--engine-hang-timeout-s", "5") as server:
        health = health_pb2_grpc.HealthStub(server.client.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == SERVING
        assert await server.get("/readyz") == "200 ready\n"
        server.engine_core.suspend()
        asking = await server.ask_and_wait_until_in_flight()
        began_s = time.monotonic()
        if how == "killed":
            server.engine_core.kill()
        assert (await health.read()).status == NOT_SERVING
        assert await server.get("/readyz") == "503 dead\n"
        with pytest.raises(RefusedError) as lost:
            await asking
        assert lost.value.refusal.code is grpc.StatusCode.UNAVAILABLE  # which clients send again
        assert await server.wait_for_end() == ENGINE_DEAD
        print(f"{how}: gone after {time.monotonic() - began_s:.0f} s")  # noqa: T201
