"""A student in one environment learns from a vLLM teacher in another, over gRPC and over HTTP, as in production.

vLLM's runner on a CPU scores no given ids: the client must find that out by itself, say so, and go on.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY
from teacher_process import RunningTeacher, start_teacher

CLIENT = REPOSITORY / ".venv" / "bin" / "vopd-client"
DEMO = REPOSITORY / "examples" / "demo"
# Teacher and student take turns: a waiting thread must not spin on the other's core.
SHARED_CORES = {"OMP_WAIT_POLICY": "passive"}
ENGINE_ARGS = json.dumps({"enforce_eager": True, "max_num_batched_tokens": 512})


@pytest.fixture(scope="module")
def teacher(demo_model_dir: Path) -> Iterator[RunningTeacher]:
    flags = ["--engine", "vllm", "--dtype", "bfloat16", "--max-context-length", "512", "--engine-args", ENGINE_ARGS]
    with start_teacher(demo_model_dir, *flags, env=SHARED_CORES) as running:
        yield running
        assert running.terminate() == 0, running.log()


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_student_learns_from_it_with_the_teachers_own_support(
    teacher: RunningTeacher, demo_model_dir: Path, tmp_path: Path, transport: str
) -> None:
    url = teacher.url if transport == "grpc" else teacher.http_url
    flags = ["--student", str(demo_model_dir), "--teacher-url", url, "--output-dir", str(tmp_path), "--name", "run"]
    flags += ["--steps", "2", "--eval-prompts", "None"]
    run = subprocess.run(
        [CLIENT, "train", "--config", DEMO / "run.yaml", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**{name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}, **SHARED_CORES},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "this teacher cannot score the student's own top-k; its own top-k is the support instead" in run.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "kl_nats" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(0.1 < row["kl_nats"] < 5 for row in steps)  # 0.8 at the start of the demo
