"""Tests that need the real vLLM, which lives in an environment of its own: `make test-vllm`.

Where vLLM is not installed nothing here is collected. Starting it takes a minute and more on two cores, so every
module starts one engine and shares it.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import torch

# For vLLM and its processes; read when it is imported.
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
if not torch.cuda.is_available():
    collect_ignore_glob.append("*_gpu.py")

START_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))
            # What vLLM and its dependencies warn of is not ours to be strict about.
            item.add_marker(pytest.mark.filterwarnings("default"))


def running_engine_cores() -> list[int]:
    """The pids of vLLM's processes that this one has started and that still run."""
    engine_cores = [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]
    return [process.pid for process in engine_cores if process.pid is not None]


@pytest.fixture
def engine_core_pids() -> Callable[[], list[int]]:
    return running_engine_cores


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_engine(demo_model_dir: Path) -> AsyncIterator[Callable[..., Awaitable[object]]]:
    """Starts VllmEngine on the demo model; at the end it is closed and has left no process behind."""
    from vopd_server.engines.vllm import VllmEngine

    engines: list[VllmEngine] = []

    async def start(
        *, dtype: str, max_context_length: int, hang_timeout_s: float = 120.0, **engine_args: object
    ) -> VllmEngine:
        engine = VllmEngine(
            model=str(demo_model_dir),
            dtype=dtype,
            max_context_length=max_context_length,
            max_top_k=100,
            hang_timeout_s=hang_timeout_s,
            # Compiled kernels cost minutes here and change nothing about what is tested.
            engine_args={"enforce_eager": True, **engine_args},
        )
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.close()
    assert running_engine_cores() == []
