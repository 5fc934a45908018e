"""Runs whose rollouts are sampled one update ahead: what overlaps, what is weighed, and going on after any end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fake_local_teacher import FakeLocalTeacher
from tiny_model import write_tiny_model
from training_runs import ROLLOUTS_A_STEP, Runs, same_bits
from vopd_client.errors import ConfigError, TeacherUnavailableError
from vopd_client.preparation import check_objective
from vopd_client.run_directory import read_rows
from vopd_client.teachers import default_window

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")

AHEAD: dict[str, Any] = {"max_staleness": 1, "deterministic": True}


def column(runs: Runs, metric: str, name: str = "run") -> list[Any]:
    return [row[metric] for row in runs.metrics(name)]


def without_traffic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A request that fails has other bytes than one that is answered, and one that is sent again has more."""
    return [{name: value for name, value in row.items() if name != "teacher_bytes_per_token"} for row in rows]


def saved_rollouts(runs: Runs, checkpoint: str) -> list[str]:
    return [path.name for path in (runs.directory().checkpoints / checkpoint).glob("rollouts-*")]


# ---------------------------------------------------------------- what overlaps


def test_a_step_never_waits_for_the_answers_to_the_rollouts_sampled_in_it(runs: Runs) -> None:
    # This teacher answers nothing before it has been asked about two whole steps: on-policy, it would be waited for
    # for ever. Asked two steps at a time it answers the second half of each pair when the next pair is complete.
    teacher = FakeLocalTeacher(runs.models / "teacher", answer_in_reverse=2 * ROLLOUTS_A_STEP)
    assert runs.train(teacher, **AHEAD, steps=4) == 0
    assert teacher.calls == 4 * ROLLOUTS_A_STEP  # the last step samples nothing further
    assert column(runs, "staleness") == [0, 1, 1, 1]


def test_rollouts_come_from_the_weights_before_the_last_update_and_are_weighed(runs: Runs) -> None:
    runs.train(max_staleness=1, steps=4, learning_rate=1e-2)
    assert "max_staleness 1: rollouts are sampled one update before they are learned from; " in runs.told
    assert "sampled terms are weighed by min(2, pi_now / pi_then)" in runs.told
    first, *others = runs.metrics()
    assert first["logprob_mismatch_nats"] < 1e-5
    assert first["importance_weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert all(row["logprob_mismatch_nats"] > 1e-3 for row in others)
    assert all(abs(row["importance_weight_mean"] - 1.0) > 1e-4 for row in others)


def test_a_run_that_samples_ahead_learns_too(runs: Runs) -> None:
    settings = {"steps": 25, "learning_rate": 1e-2, "top_k": 64, "schedule": "constant", "prompts_per_step": 4}
    runs.train(max_staleness=1, eval_prompts=str(runs.models / "prompts.jsonl"), **settings)
    summary = json.loads(runs.directory().summary_file.read_text())
    assert summary["kl_nats_after"] < 0.75 * summary["kl_nats_before"]  # the draws are fixed by the seed


def test_a_run_of_one_step_is_the_same_sampled_ahead_or_not(runs: Runs) -> None:
    runs.train(name="on-policy", deterministic=True, steps=1, importance_cap=2.0)
    runs.train(**AHEAD, steps=1)
    assert runs.metrics() == runs.metrics("on-policy")
    assert same_bits(runs.weights(), runs.weights("on-policy"))


def test_evaluations_in_between_leave_what_is_in_flight_alone(runs: Runs) -> None:
    runs.train(name="undisturbed", **AHEAD)
    teacher = FakeLocalTeacher(runs.models / "teacher")
    runs.train(teacher, **AHEAD, eval_prompts=str(runs.models / "prompts.jsonl"), eval_every=1)
    assert len(read_rows(runs.directory().evals_file)) == 6  # the teacher's own among them
    assert runs.metrics() == runs.metrics("undisturbed")
    assert same_bits(runs.weights(), runs.weights("undisturbed"))


# ---------------------------------------------------------------- what is weighed


@pytest.mark.parametrize(
    ("settings", "cap"),
    [
        ({}, 2.0),
        ({"objective": "opd"}, 2.0),
        ({"importance_cap": 5.0}, 5.0),
        ({"objective": "topk-kl"}, None),
        ({"objective": "full-kl"}, None),
        ({"objective": "topk-kl", "task_reward_weight": 1.0}, 2.0),  # the task reward's term is a sampled one
    ],
)
def test_what_is_sampled_is_weighed_and_what_is_differentiated_is_not(
    runs: Runs, settings: dict[str, Any], cap: float | None
) -> None:
    assert check_objective(runs.config(max_staleness=1, **settings)).importance_cap == cap
    assert check_objective(runs.config(**{**settings, "importance_cap": None})).importance_cap is None


def test_an_objective_without_sampled_terms_says_so(runs: Runs) -> None:
    runs.train(max_staleness=1, steps=2, objective="topk-kl")
    assert "objective topk-kl has no sampled terms to weigh" in runs.told
    assert "importance_weight_mean" not in runs.metrics()[0]


def test_probabilities_without_the_end_token_are_no_weights(runs: Runs, tmp_path: Path) -> None:
    student = str(write_tiny_model(tmp_path / "other-end", seed=1, end_token="<|other_end|>"))
    with pytest.raises(ConfigError, match="max_staleness 1 does not go with end_token drop"):
        runs.train(max_staleness=1, student=student, end_token="drop")
    assert runs.train(max_staleness=1, student=student, end_token="drop", objective="topk-kl", steps=2) == 0


def test_the_window_holds_all_that_is_in_flight(runs: Runs) -> None:
    many = {"prompts_per_step": 50, "rollouts_per_prompt": 2}
    assert default_window(runs.config()) == 64
    assert default_window(runs.config(**many)) == 100
    assert default_window(runs.config(**many, max_staleness=1)) == 200
    assert default_window(runs.config(prompts_per_step=5000)) == 4000  # as much as one stream may have


# ---------------------------------------------------------------- going on


def interrupt_at(call: int) -> Callable[[int], None]:
    return lambda number: os.kill(os.getpid(), signal.SIGINT) if number == call else None


def fail_at(call: int, error: Exception) -> Callable[[int], None]:
    def fail(number: int) -> None:
        if number == call:
            raise error

    return fail


# Step 1 asks about the rollouts of steps 1 and 2, step 2 about those of step 3, and so on.
SAMPLING_STEP_5 = 4 * ROLLOUTS_A_STEP + 2
SCORING_STEP_4 = 3 * ROLLOUTS_A_STEP + 3


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "lora_dropout": 0.3}], ids=["full", "lora-with-dropout"])
@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        (interrupt_at(SAMPLING_STEP_5), 130),
        (fail_at(SCORING_STEP_4, TeacherUnavailableError("no progress for 600 s")), 3),
    ],
    ids=["while step 4 samples ahead", "while step 4 updates"],
)
def test_an_interrupted_run_goes_on_with_the_rollouts_that_were_in_flight(
    runs: Runs, settings: dict[str, Any], fault: Callable[[int], None], exit_code: int
) -> None:
    settings = {**settings, **AHEAD, "steps": 6, "checkpoint_every": 2}
    runs.train(name="undisturbed", **settings)
    assert runs.train(FakeLocalTeacher(runs.models / "teacher", on_submit=fault), **settings) == exit_code
    assert runs.checkpoints() == ["step-000002", "step-000003"]
    assert saved_rollouts(runs, "step-000002") == ["rollouts-000003-00000.safetensors"]
    assert saved_rollouts(runs, "step-000003") == ["rollouts-000004-00000.safetensors"]
    teacher = FakeLocalTeacher(runs.models / "teacher")
    assert runs.train(teacher, resume=True, **settings) == 0
    assert "holds no rollouts" not in runs.told
    assert teacher.calls == 3 * ROLLOUTS_A_STEP  # those of step 4 once more, then of 5 and 6
    assert without_traffic(runs.metrics()) == without_traffic(runs.metrics("undisturbed"))
    assert same_bits(runs.weights(), runs.weights("undisturbed"))


def test_a_run_that_died_without_saving_goes_on_from_the_checkpoint_before(runs: Runs) -> None:
    settings = {**AHEAD, "steps": 6, "checkpoint_every": 2}
    runs.train(name="undisturbed", **settings)
    died = FakeLocalTeacher(runs.models / "teacher", on_submit=fail_at(SAMPLING_STEP_5, RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        runs.train(died, **settings)
    assert column(runs, "step") == [1, 2, 3]
    assert runs.checkpoints() == ["step-000002"]
    timeline_of_the_first = read_rows(runs.directory().timeline_file)
    assert [row["step"] for row in timeline_of_the_first] == [1, 2, 3]
    assert runs.train(resume=True, **settings) == 0
    assert without_traffic(runs.metrics()) == without_traffic(runs.metrics("undisturbed"))  # some was sent twice
    assert same_bits(runs.weights(), runs.weights("undisturbed"))
    timeline = read_rows(runs.directory().timeline_file)
    assert [row["step"] for row in timeline] == [1, 2, 3, 4, 5, 6]
    assert timeline[:2] == timeline_of_the_first[:2]
    assert timeline[2]["started_at"] > timeline_of_the_first[2]["started_at"]  # the one that counts


def test_rollouts_in_flight_are_as_safe_as_weights(runs: Runs) -> None:
    runs.train(**AHEAD, steps=3, checkpoint_every=1, keep_checkpoints=3)
    path = runs.directory().checkpoints / "step-000002" / "rollouts-000003-00000.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    third = runs.directory().checkpoints / "step-000003"
    (third / "trainer_state.json").unlink()
    runs.train(**AHEAD, steps=3, checkpoint_every=1, keep_checkpoints=3, resume=True)
    assert "the contents of rollouts-000003-00000.safetensors are damaged" in runs.told
    assert "going on after step 1" in runs.told


def test_a_checkpoint_with_nothing_in_flight_fills_the_pipeline_again_and_says_so(runs: Runs) -> None:
    settings = {**AHEAD, "schedule": "constant"}
    runs.train(**settings, steps=3)
    assert saved_rollouts(runs, "step-000003") == []
    assert runs.train(**settings, steps=5, resume=True) == 0
    assert "step-000003 holds no rollouts: its weights sample those of step 4 anew" in runs.told
    assert column(runs, "staleness") == [0, 1, 1, 0, 1]


def test_an_on_policy_run_has_nothing_in_flight_between_its_steps(runs: Runs) -> None:
    runs.train(steps=2, checkpoint_every=1, deterministic=True)
    assert saved_rollouts(runs, "step-000001") == []
    assert column(runs, "staleness") == [0, 0]
    assert "staleness" not in runs.told


# ---------------------------------------------------------------- the timeline


def test_every_step_writes_down_who_was_busy_when(runs: Runs) -> None:
    runs.train(max_staleness=1, steps=3, microbatch_tokens=1)
    metrics, timeline = read_rows(runs.directory().metrics_file), read_rows(runs.directory().timeline_file)
    assert [row["sampled_steps"] for row in timeline] == [[1, 2], [3], []]
    for numbers, row in zip(metrics, timeline, strict=True):
        assert row["step"] == numbers["step"]
        assert row["step_s"] == pytest.approx(numbers["step_s"], abs=1e-2)
        assert len(row["sampling"]) == len(row["sampled_steps"])
        assert sum(end - start for start, end in row["sampling"]) == pytest.approx(numbers["rollout_s"], abs=1e-3)
        assert len(row["waiting"]) == len(row["forward"]) == len(row["backward"]) == ROLLOUTS_A_STEP
        assert len(row["optimizer"]) == 1
        spans = sorted(
            span for lane in ("sampling", "waiting", "forward", "backward", "optimizer") for span in row[lane]
        )
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(spans))
        assert spans[0][0] >= 0
        assert spans[-1][1] <= row["step_s"] + 1e-4
        assert row["num_flights"] == len(row["flights"]) == ROLLOUTS_A_STEP
        assert all(sent_s <= answered_s for sent_s, answered_s in row["flights"])
    assert all(sent_s >= 0 for sent_s, _ in timeline[0]["flights"])
    assert all(sent_s < 0 for row in timeline[1:] for sent_s, _ in row["flights"])  # sent in the step before
