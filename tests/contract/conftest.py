"""What the contract suites share: every teacher, every way to ask it, the server processes and reference models."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import REPOSITORY
from teacher_process import RunningTeacher, start_teacher
from teachers import TEACHERS, TRANSPORTS, Ask, Teacher
from tiny_model import write_tiny_model


@pytest.fixture(params=TEACHERS, ids=lambda make: make.__name__)
async def teacher(request: pytest.FixtureRequest) -> AsyncIterator[Teacher]:
    async with AsyncExitStack() as stack:
        yield await request.param(stack, request)


@pytest.fixture(params=TRANSPORTS)
def ask(request: pytest.FixtureRequest, teacher: Teacher) -> Ask:
    return partial(TRANSPORTS[request.param], teacher.client)


def float32_model(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


TINY_FLAGS = ["--engine", "transformers", "--device", "cpu", "--allow-full-vocab"]


@pytest.fixture(scope="session")
def tiny_process(tiny_model_dir: Path) -> Iterator[RunningTeacher]:
    with start_teacher(tiny_model_dir, *TINY_FLAGS, "--dtype", "float32") as process:
        yield process
        process.terminate()  # not killed, so that the file of its head goes with it


@pytest.fixture(scope="session")
def tiny_bfloat16_process(tiny_model_dir: Path) -> Iterator[RunningTeacher]:
    with start_teacher(tiny_model_dir, *TINY_FLAGS, "--dtype", "bfloat16", "--deterministic") as process:
        yield process
        process.terminate()


@pytest.fixture(scope="session")
def tiny_reference_model(tiny_model_dir: Path) -> torch.nn.Module:
    return float32_model(tiny_model_dir)


# ---------------------------------------------------------------- with vLLM


@pytest.fixture(scope="session")
def vllm_process(demo_model_dir: Path) -> Iterator[RunningTeacher]:
    """A real language model; `auto` finds vLLM. Compiled kernels cost minutes here and change no number."""
    flags = ["--dtype", "float32", "--max-context-length", "1024", "--max-top-k", "49152"]
    engine_args = json.dumps({"enforce_eager": True, "max_num_batched_tokens": 512})
    with start_teacher(demo_model_dir, *flags, "--engine-args", engine_args, env=VLLM_ENVIRONMENT) as process:
        yield process


@pytest.fixture(scope="session")
def vllm_reference_model(demo_model_dir: Path) -> torch.nn.Module:
    return float32_model(demo_model_dir)


@pytest.fixture(scope="session")
def vllm_v2_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the smallest that vLLM's CPU attention has."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-for-vllm", hidden_size=128, max_length=256)


@pytest.fixture(scope="session")
def vllm_v2_process(vllm_v2_model_dir: Path) -> Iterator[RunningTeacher]:
    environment = {
        **VLLM_ENVIRONMENT,
        "PYTHONPATH": str(REPOSITORY / "tests" / "with_vllm" / "triton_cpu_stub"),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    flags = ["--dtype", "float32", "--engine", "vllm", "--engine-args", json.dumps({"enforce_eager": True})]
    with start_teacher(vllm_v2_model_dir, *flags, env=environment) as process:
        yield process
        assert_nothing_outlives(process)


@pytest.fixture(scope="session")
def vllm_v2_reference_model(vllm_v2_model_dir: Path) -> torch.nn.Module:
    return float32_model(vllm_v2_model_dir)


def assert_nothing_outlives(teacher: RunningTeacher) -> None:
    """vLLM's processes, which hold the model and the device, end with a server that was killed."""
    import psutil  # comes with vLLM

    from vopd_server.engines.vllm_processes import is_alive

    children = psutil.Process(teacher.pid).children(recursive=True)
    assert len(children) >= 2, "EngineCore and its worker"
    os.kill(teacher.pid, signal.SIGKILL)  # the server alone, not its process group
    give_up_s = time.monotonic() + 30
    while any(map(is_alive, children)):
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


VLLM_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
