"""Runs that end early, and go on as if nothing had happened."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fake_local_teacher import FakeLocalTeacher
from training_runs import NUM_PROMPTS, ROLLOUTS_A_STEP, Runs, same_bits
from vopd_client.errors import (
    CheckpointError,
    TeacherInternalError,
    TeacherUnavailableError,
    VopdError,
)
from vopd_client.run_directory import read_rows
from vopd_client.train_config import TrainConfig
from vopd_client.training_run import run_training

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")


def interrupt_at(call: int) -> Callable[[int], None]:
    """A Ctrl-C in the middle of a request."""
    return lambda number: os.kill(os.getpid(), signal.SIGINT) if number == call else None


def fail_at(call: int, error: VopdError) -> Callable[[int], None]:
    def fail(number: int) -> None:
        if number == call:
            raise error

    return fail


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "lora_dropout": 0.3}], ids=["full", "lora-with-dropout"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(runs: Runs, settings: dict[str, Any]) -> None:
    settings = {**settings, "deterministic": True, "steps": 5, "checkpoint_every": 2}
    runs.train(name="undisturbed", **settings)
    # In the middle of the fourth step: step 3 is complete and newer than the checkpoint of step 2.
    teacher = FakeLocalTeacher(runs.models / "teacher", on_submit=interrupt_at(3 * ROLLOUTS_A_STEP + 2))
    assert runs.train(teacher, **settings) == 130
    assert runs.checkpoints() == ["step-000002", "step-000003"]
    assert "interrupted after step 3; to go on: the same command with --resume --name run" in runs.told
    # Somebody else's use of the global generator must not reach the dropout masks either.
    other_draws = FakeLocalTeacher(runs.models / "teacher", on_submit=lambda number: torch.manual_seed(number))
    assert runs.train(other_draws, resume=True, **settings) == 0
    assert "going on after step 3" in runs.told
    assert runs.metrics() == runs.metrics("undisturbed")
    assert same_bits(runs.weights(), runs.weights("undisturbed"))


def test_an_interrupted_evaluation_is_made_up_for(runs: Runs) -> None:
    eval_prompts = str(runs.models / "prompts.jsonl")
    settings = {"steps": 2, "eval_prompts": eval_prompts, "eval_teacher": "no"}
    teacher = FakeLocalTeacher(runs.models / "teacher", on_submit=interrupt_at(2))
    assert runs.train(teacher, **settings) == 130
    assert not runs.directory().checkpoints.exists()
    assert "interrupted after step 0" in runs.told
    last_evaluation = NUM_PROMPTS + 2 * ROLLOUTS_A_STEP + 1
    teacher = FakeLocalTeacher(runs.models / "teacher", on_submit=interrupt_at(last_evaluation))
    assert runs.train(teacher, resume=True, **settings) == 130
    assert "starting from step 0" in runs.told
    assert runs.train(resume=True, **settings) == 0
    assert [row["step"] for row in read_rows(runs.directory().evals_file)] == [0, 2]
    assert [row["step"] for row in runs.metrics()] == [1, 2]


def test_an_interruption_while_loading_saves_nothing_and_leaves_the_name_free(runs: Runs) -> None:
    def connect(config: TrainConfig, device: str) -> FakeLocalTeacher:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on after SIGTERM")

    assert run_training(runs.config(), console=Console(file=io.StringIO()), connect=connect) == 130
    assert not runs.directory().path.exists()


def test_a_teacher_that_is_gone_ends_the_run_after_saving_and_a_later_one_completes_it(runs: Runs) -> None:
    settings = {"deterministic": True, "steps": 4, "checkpoint_every": 0}
    runs.train(name="undisturbed", **settings)
    gone = fail_at(2 * ROLLOUTS_A_STEP + 3, TeacherUnavailableError("no progress of the teacher for 600 s"))
    assert runs.train(FakeLocalTeacher(runs.models / "teacher", on_submit=gone), **settings) == 3
    assert "the teacher is gone: no progress of the teacher for 600 s" in runs.told
    assert runs.checkpoints() == ["step-000002"]
    assert [row["step"] for row in runs.metrics()] == [1, 2]
    assert runs.train(resume=True, **settings) == 0
    assert runs.metrics() == runs.metrics("undisturbed")
    assert same_bits(runs.weights(), runs.weights("undisturbed"))


def test_a_teacher_that_fails_ends_the_run_with_its_error_after_saving(runs: Runs) -> None:
    fails = fail_at(ROLLOUTS_A_STEP + 1, TeacherInternalError("out of memory"))
    with pytest.raises(TeacherInternalError, match="out of memory"):
        runs.train(FakeLocalTeacher(runs.models / "teacher", on_submit=fails))
    assert runs.checkpoints() == ["step-000001"]


def test_going_on_with_other_settings_or_another_teacher_is_refused(runs: Runs) -> None:
    runs.train(steps=2)
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.001 -> 0\.1"):
        runs.train(steps=2, learning_rate=0.1, resume=True)
    with pytest.raises(CheckpointError, match=r"teacher_model_revision: 1 -> 2"):
        runs.train(FakeLocalTeacher(runs.models / "teacher", model_revision="2"), steps=2, resume=True)


def test_going_on_with_prompts_that_were_edited_is_refused(runs: Runs, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    runs.train(steps=1, prompts=str(prompts))
    prompts.write_text('{"prompt": "one"}\n{"prompt": "three"}\n')
    with pytest.raises(CheckpointError, match="prompts_hash"):
        runs.train(steps=1, prompts=str(prompts), resume=True)


def test_a_complete_run_that_is_told_to_go_on_has_nothing_to_do(runs: Runs) -> None:
    runs.train(steps=2)
    before = runs.weights()
    assert runs.train(steps=2, resume=True) == 0
    assert same_bits(before, runs.weights())
    assert [row["step"] for row in runs.metrics()] == [1, 2]


def test_a_run_with_a_constant_schedule_can_be_made_longer(runs: Runs) -> None:
    settings = {"schedule": "constant", "deterministic": True}
    runs.train(name="long", steps=4, **settings)
    runs.train(steps=2, **settings)
    runs.train(steps=4, resume=True, **settings)
    assert runs.metrics() == runs.metrics("long")
    assert same_bits(runs.weights(), runs.weights("long"))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(runs: Runs) -> None:
    settings = {"deterministic": True, "steps": 4, "checkpoint_every": 2}
    runs.train(**settings)
    metrics, weights = runs.metrics(), runs.weights()
    newest = runs.directory().checkpoints / "step-000004" / "optimizer.bin"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert runs.train(resume=True, **settings) == 0
    assert "ignoring" in runs.told
    assert "going on after step 2" in runs.told
    assert runs.metrics() == metrics
    assert same_bits(runs.weights(), weights)
