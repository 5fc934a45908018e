"""Every objective, and what is done to its rewards, in whole training runs of a tiny student."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fake_local_teacher import FakeLocalTeacher
from training_runs import NUM_PROMPTS, Runs
from vopd_client.errors import (
    ConfigError,
    HandshakeError,
)
from vopd_client.run_directory import read_rows
from vopd_client.training_run import run_training

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")


@pytest.mark.parametrize("objective", ["opd", "vopd", "vopd-rb", "topk-kl"])
def test_every_objective_over_the_wire_trains(runs: Runs, objective: str) -> None:
    assert runs.train(objective=objective, steps=2) == 0
    assert [row["step"] for row in runs.metrics()] == [1, 2]
    support_size = runs.metrics()[0]["support_size_mean"]
    assert support_size == (0 if objective == "opd" else 16)


@pytest.mark.parametrize("objective", ["vopd-full", "full-kl"])
def test_objectives_over_the_whole_vocabulary_train_on_hidden_states(runs: Runs, objective: str) -> None:
    """With weights that are equal there is nothing to learn; with others there is, and it is measured exactly."""
    choices = {"objective": objective, "eval_prompts": str(runs.models / "prompts.jsonl"), "steps": 2}
    assert runs.train(**choices) == 0
    assert runs.metrics()[0]["support_size_mean"] == 259
    assert runs.metrics()[0]["left_out_mass_mean"] == 0
    assert runs.metrics()[0]["teacher_bytes_per_token"] > 4 * 32  # hidden states, not log-probabilities of some ids
    assert runs.train(name="equal", student=str(runs.models / "teacher"), **choices) == 0
    row = runs.metrics("equal")[0]
    assert abs(row["kl_nats"]) < 1e-5
    assert row["grad_norm"] < 1e-4
    assert read_rows(runs.directory("equal").evals_file)[0]["kl_nats"] < 1e-5


def test_full_kl_and_vopd_rb_over_the_whole_vocabulary_are_one_gradient(runs: Runs) -> None:
    """Two paths to it: hidden states through the teacher's head, and a support that holds every id."""
    settings = {"steps": 2, "support_mass": 1.0, "top_k": 256, "deterministic": True}
    runs.train(name="full-kl", objective="full-kl", **settings)
    runs.train(name="vopd-rb", objective="vopd-rb", **settings)
    full, rb = runs.metrics("full-kl")[0], runs.metrics("vopd-rb")[0]
    assert full["grad_norm"] == pytest.approx(rb["grad_norm"], rel=0.05)
    assert full["kl_nats"] == pytest.approx(rb["kl_nats"], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"objective": "full-kl"}, "objective full-kl"), ({"eval_kl": "vocabulary"}, "eval_kl vocabulary")],
)
def test_a_teacher_that_keeps_its_head_to_itself_is_told_what_to_allow(
    runs: Runs, settings: dict[str, Any], what: str
) -> None:
    teacher = FakeLocalTeacher(runs.models / "teacher", supports=frozenset({"sampled", "candidates"}), head_sha256="")
    with pytest.raises(HandshakeError, match=rf"{what} needs the teacher's whole distribution.*--allow-full-vocab"):
        runs.train(teacher, **settings)


@pytest.mark.parametrize("choice", ["auto", "support"])
def test_an_evaluation_measures_the_kl_over_the_vocabulary_where_it_can(runs: Runs, choice: str) -> None:
    runs.train(objective="opd", eval_prompts=str(runs.models / "prompts.jsonl"), eval_kl=choice, top_k=4, steps=1)
    runs.train(name="exact", eval_prompts=str(runs.models / "prompts.jsonl"), eval_kl="vocabulary", top_k=4, steps=1)
    measured, exact = (read_rows(runs.directory(name).evals_file)[0]["kl_nats"] for name in ("run", "exact"))
    if choice == "auto":
        assert measured == pytest.approx(exact, rel=1e-5)
    else:  # one bucket for all but four ids: a lower bound
        assert measured < 0.9 * exact


# ---------------------------------------------------------------- rewards and advantages


def test_a_task_reward_makes_right_answers_likelier(runs: Runs) -> None:
    """`regex` accepts whatever contains a digit; the teacher's part is switched off by making it the student."""
    rows = [{"prompt": f"say {i}:", "answer": "[0-9]", "verifier": "regex"} for i in range(NUM_PROMPTS)]
    path = runs.output_dir.parent / "digits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "student": str(runs.models / "teacher"),
        "prompts": str(path),
        "objective": "vopd-rb",
        "steps": 25,
        "rollouts_per_prompt": 8,
        "learning_rate": 3e-3,
        "schedule": "constant",
        "task_reward_weight": 5.0,
    }
    assert runs.train(**settings) == 0
    rewards = [row["task_reward_mean"] for row in runs.metrics()]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15


def test_a_task_reward_without_an_answer_to_compare_with_is_refused_with_the_row(runs: Runs) -> None:
    path = runs.output_dir.parent / "some.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match=r"1 of 2 have none, first .*some\.jsonl:2"):
        runs.train(prompts=str(path), task_reward_weight=1.0)


def test_clips_and_weights_report_how_often_they_changed_something(runs: Runs) -> None:
    settings = {"reward_clip_lambda": 0.5, "advantage_clip": 0.1, "importance_cap": 1.0}
    runs.train(steps=1, **settings)
    (row,) = runs.metrics()
    assert 0 < row["reward_clipped_fraction"] < 1
    assert 0 < row["advantage_clipped_fraction"] <= 1
    assert row["importance_weight_mean"] == pytest.approx(1.0, abs=1e-3)  # on-policy: the same student
    assert "warning: reward_clip_lambda 0.5 is biased: rewards end at -1.39 nats" in runs.told
    runs.train(name="plain", steps=1)
    assert not [name for name in runs.metrics("plain")[0] if "clipped" in name or "importance" in name]


def test_vopd_rb_has_less_noise_than_vopd_and_vopd_less_than_opd_at_the_same_states(runs: Runs) -> None:
    shares = {}
    for objective in ("opd", "vopd", "vopd-rb", "full-kl"):
        runs.train(name=objective, objective=objective, steps=1, rollouts_per_prompt=8, top_k=64)
        shares[objective] = runs.metrics(objective)[0]["variance_over_opd"]
    assert shares["opd"] == 1.0
    assert shares["full-kl"] == 0.0
    assert shares["vopd-rb"] < shares["vopd"] < 1.0


@pytest.mark.parametrize(("objective", "steps"), [("full-kl", 20), ("vopd-full", 40)])
def test_objectives_over_the_whole_vocabulary_train_with_a_teacher_in_this_process(
    runs: Runs, objective: str, steps: int
) -> None:
    teacher = {"teacher_url": [], "teacher_model": str(runs.models / "teacher")}
    config = runs.config(objective=objective, steps=steps, learning_rate=1e-2, schedule="constant", **teacher)
    assert run_training(config, console=Console(file=io.StringIO())) == 0
    kl = [row["kl_nats"] for row in runs.metrics()]
    assert kl[0] > 2.0
    assert np.mean(kl[-3:]) < 0.8 * np.mean(kl[:3])
