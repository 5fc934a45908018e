"""Fixtures that several modules of this folder take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from asking import connected_to
from fake_http_teacher import FakeHttpTeacher
from fake_teacher import FakeTeacher
from tiny_model import write_tiny_model
from training_runs import NUM_PROMPTS, Runs


@pytest.fixture(params=[FakeTeacher, FakeHttpTeacher], ids=["grpc", "http"])
def teacher_type(request: pytest.FixtureRequest) -> type[FakeTeacher]:
    """What speaks one of the protocols; a test that takes it, or `connected`, holds for each."""
    kind: type[FakeTeacher] = request.param
    return kind


@pytest.fixture
def connected(teacher_type: type[FakeTeacher]) -> Any:
    return partial(connected_to, teacher_type)


# ---------------------------------------------------------------- training runs


@pytest.fixture
def fresh_process_state() -> Iterator[None]:
    """A run sets process-wide state; each test starts without another's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def report_is_drawn() -> None:
    """For the test that looks at it; drawing takes longer than training a tiny model."""


@pytest.fixture
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "report_is_drawn" not in request.fixturenames:
        monkeypatch.setattr("vopd_client.report.write_report", lambda run_dir: [])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_tiny_model(directory / "teacher", seed=0)
    write_tiny_model(directory / "student", seed=1)
    rows = [{"prompt": f"say {i}:", "answer": str(i), "kind": "odd" if i % 2 else "even"} for i in range(NUM_PROMPTS)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def runs(models: Path, tmp_path: Path) -> Runs:
    return Runs(models, tmp_path / "runs")
