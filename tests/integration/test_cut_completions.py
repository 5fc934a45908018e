"""Completions that reach the length limit: learned from as far as they go, or masked, alone and in company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from fake_local_teacher import FakeLocalTeacher
from process_runs import Job, run_in_processes
from tiny_model import write_tiny_model
from training_runs import NUM_PROMPTS, Runs, largest_difference, same_bits
from vopd_client import periodic_evaluation, trainer
from vopd_client.batch import Batch
from vopd_client.run_data import read_run
from vopd_client.run_directory import read_rows

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")

MASK: dict[str, Any] = {"cut_completions": "mask", "deterministic": True}
# One completion a step: all of a step is masked, or nothing is.
ALONE: dict[str, Any] = {"prompts_per_step": 1, "rollouts_per_prompt": 1, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that end with any of 64 bytes: about two completions in three end within four tokens."""
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student")):
        write_tiny_model(directory / name, seed=seed)
        ends = GenerationConfig.from_pretrained(directory / name)
        ends.eos_token_id = list(range(64))
        ends.save_pretrained(directory / name)
    rows = [{"prompt": f"say {index}:", "answer": str(index)} for index in range(NUM_PROMPTS)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def column(runs: Runs, metric: str, name: str = "run") -> list[Any]:
    return [row[metric] for row in runs.metrics(name)]


def test_no_teacher_is_asked_about_masked_completions_and_metrics_count_them(runs: Runs) -> None:
    teacher = FakeLocalTeacher(runs.models / "teacher")
    runs.train(teacher, **MASK, steps=3, max_new_tokens=4)
    assert "warning: cut_completions mask is biased" in runs.told
    runs.train(name="keep", steps=1, max_new_tokens=4, deterministic=True)
    rows = runs.metrics()
    masked = [row["cut_masked_fraction"] for row in rows]
    assert any(0 < fraction < 1 for fraction in masked)
    assert masked == [1 - row["ended_fraction"] for row in rows]
    assert teacher.calls == sum(round(4 * row["ended_fraction"]) for row in rows)
    assert all(
        row["num_valid_tokens"] <= 4 * row["completion_tokens_mean"] - 4 * 4 * row["cut_masked_fraction"]
        for row in rows
    )
    # The first step's rollouts are the same: what is said of them is, too.
    (kept,) = runs.metrics("keep")
    assert "cut_masked_fraction" not in kept
    for name in ("completion_tokens_mean", "ended_fraction"):
        assert rows[0][name] == kept[name]
    assert rows[0]["num_valid_tokens"] < kept["num_valid_tokens"]
    timeline = read_rows(runs.directory().timeline_file)
    assert [row["num_flights"] for row in timeline] == [round(4 * row["ended_fraction"]) for row in rows]


def test_masking_is_what_a_loss_mask_over_whole_completions_does(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 2, "max_new_tokens": 4, "deterministic": True, "microbatch_tokens": 10_000}
    runs.train(name="masked", cut_completions="mask", **settings)

    def masked_by_hand(run: Any, request: Any, sent: Any, scores: Any, advantages: Any = None) -> Batch:
        batch = periodic_evaluation.make_batch(run, request, sent, scores, advantages)
        for row, item in enumerate(sent):
            batch.loss_mask_BT[row] &= item.rollout.ended
        return batch

    monkeypatch.setattr(trainer, "make_batch", masked_by_hand)
    runs.train(name="by-hand", **settings)
    assert 0 < column(runs, "cut_masked_fraction", "masked")[0] < 1
    assert column(runs, "num_valid_tokens", "masked") == column(runs, "num_valid_tokens", "by-hand")
    assert column(runs, "loss", "masked") == pytest.approx(column(runs, "loss", "by-hand"), rel=1e-4)
    assert largest_difference(runs.weights("masked"), runs.weights("by-hand")) < 1e-6


@pytest.fixture
def one_a_step(runs: Runs) -> Runs:
    """A run of which some steps, the first among them, are masked as a whole."""
    runs.train(**MASK, **ALONE, steps=8, checkpoint_every=1, keep_checkpoints=8, seed=5)
    masked = column(runs, "cut_masked_fraction")
    assert masked[0] == 1
    assert 2 <= masked.count(1) <= 6
    return runs


def test_a_step_that_is_masked_as_a_whole_counts_and_leaves_weights_and_moments_alone(one_a_step: Runs) -> None:
    runs = one_a_step
    states = [_state(runs, step) for step in range(1, 9)]
    before = load_file(runs.models / "student" / "model.safetensors")
    assert all(torch.equal(value, states[0][f"model.{name}"]) for name, value in before.items())
    rows = runs.metrics()
    for earlier, later, row in zip(states[:-1], states[1:], rows[1:], strict=True):
        assert same_bits(earlier, later) == (row["cut_masked_fraction"] == 1)
    runs.train(name="keep", **ALONE, steps=8)
    assert column(runs, "learning_rate") == column(runs, "learning_rate", "keep")


def _state(runs: Runs, step: int) -> dict[str, torch.Tensor]:
    """Weights and AdamW's moments after a step."""
    checkpoint = runs.directory().checkpoints / f"step-{step:06d}"
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{index}.{name}": value for index, values in optimizer.items() for name, value in values.items()}
    return load_file(checkpoint / "model.safetensors") | moments


def test_the_row_of_a_masked_step_has_no_number_that_is_none(one_a_step: Runs) -> None:
    rows = read_rows(one_a_step.directory().metrics_file)
    masked = [row for row in rows if row["cut_masked_fraction"] == 1]
    learned = [row for row in rows if row["cut_masked_fraction"] == 0]
    assert set(masked[0]) == set(learned[0])
    for row in masked:
        assert {name for name, value in row.items() if value is None} == {
            *("loss", "kl_nats", "reward_nats", "baseline_nats", "advantage_std", "left_out_mass_mean"),
            *("support_size_mean", "variance", "variance_over_opd"),
            *("logprob_mismatch_nats", "logprob_mismatch_max_nats", "rollout_kl_nats"),
        }
        assert row["num_valid_tokens"] == row["grad_norm"] == row["teacher_bytes_per_token"] == 0
        assert row["completion_tokens_mean"] == 4
    assert "KL nan nats" in one_a_step.told


@pytest.mark.usefixtures("report_is_drawn")
def test_a_report_is_drawn_of_a_run_with_masked_steps(runs: Runs) -> None:
    runs.train(**MASK, **ALONE, steps=4, seed=5)
    assert column(runs, "cut_masked_fraction")[0] == 1
    assert (runs.directory().path / "report.html").exists()
    assert len(read_run(runs.directory().path).metrics) == 4


def test_masked_completions_count_in_the_baseline_of_task_rewards(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[list[float], list[bool]]] = []
    real = trainer.RolloutSource.task_advantages

    def task_advantages(self: Any, sent: Any, rewards: Any) -> list[float]:
        # Nothing that tiny models write is right: rewards of our own, 1 for what was cut.
        assert rewards is not None
        advantages = real(self, sent, [float(item.is_masked) for item in sent])
        given.append((advantages, [item.is_masked for item in sent]))
        return advantages

    monkeypatch.setattr(trainer.RolloutSource, "task_advantages", task_advantages)
    assert runs.train(**MASK, steps=3, max_new_tokens=4, task_reward_weight=1.0) == 0
    mixed = [
        (advantages[first : first + 2], masked[first : first + 2])
        for advantages, masked in given
        for first in (0, 2)
        if masked[first] != masked[first + 1]
    ]
    assert mixed  # a prompt of whose two completions one is masked
    assert all(
        advantage == (1.0 if is_masked else -1.0) for pair in mixed for advantage, is_masked in zip(*pair, strict=True)
    )


def test_a_run_that_goes_on_masks_what_was_in_flight(runs: Runs) -> None:
    settings = {**MASK, "max_staleness": 1, "max_new_tokens": 4, "schedule": "constant"}
    runs.train(name="whole", **settings, steps=6)
    runs.train(name="cut", **settings, steps=6, checkpoint_every=3)
    for path in sorted(runs.directory("cut").checkpoints.glob("step-000006*")):
        (path / "trainer_state.json").unlink()  # as a run that died in the middle of it leaves it
    assert runs.train(name="cut", **settings, steps=6, resume=True) == 0
    assert "going on after step 3" in runs.told
    assert "holds no rollouts" not in runs.told
    assert column(runs, "cut_masked_fraction", "cut") == column(runs, "cut_masked_fraction", "whole")
    assert same_bits(runs.weights("cut"), runs.weights("whole"))


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """For comparing: null is no number that is near another."""
    return [{name: -1.0 if value is None else value for name, value in row.items()} for row in rows]


def test_of_two_processes_one_may_have_nothing_to_learn_and_both_read_the_same_stream(runs: Runs) -> None:
    """Two processes of one prompt each end with what one process of two prompts ends with, sharded or not."""
    settings = {**MASK, "rollouts_per_prompt": 1, "max_new_tokens": 4, "steps": 6, "stream_prompts": True}
    settings |= {"shuffle_buffer": 4, "seed": 9}
    runs.train(name="one", **settings)
    one = runs.metrics("one")
    assert {row["cut_masked_fraction"] for row in one} == {0.0, 0.5, 1.0}
    jobs = [Job({**settings, "name": "ddp"}), Job({**settings, "name": "fsdp", "sharding": "fsdp"})]
    outcomes_by_rank = run_in_processes(runs.models, runs.output_dir, jobs)
    for outcomes in zip(*outcomes_by_rank, strict=True):
        name = outcomes[0].name
        assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
        for alone, shared in zip(numbers(one), numbers(runs.metrics(name)), strict=True):
            assert shared == pytest.approx(alone, rel=1e-3, abs=1e-5), name
        num_asked = [len(outcome.asked) for outcome in outcomes]
        assert sum(num_asked) == sum(round(2 * row["ended_fraction"]) for row in one)
        assert min(num_asked) < 6  # one of them had a step with nothing to learn
        assert largest_difference(runs.weights("one"), runs.weights(name)) < 1e-5
        assert len(list(runs.directory(name).tensorboard.iterdir())) == 1  # of the main process
