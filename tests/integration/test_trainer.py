"""Whole training runs of a tiny student against a teacher in this process with exact numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fake_local_teacher import FakeLocalTeacher
from tiny_model import write_tiny_model
from training_runs import ROLLOUTS_A_STEP, Runs, largest_difference, same_bits
from vopd_client.errors import (
    ConfigError,
    DataError,
    HandshakeError,
    NonFiniteError,
    OutOfMemory,
    RunDirectoryError,
    VopdError,
)
from vopd_client.losses import compute_loss
from vopd_client.optimization import make_optimizer, scale_and_clip
from vopd_client.run_directory import read_rows
from vopd_client.train_config import TrainConfig
from vopd_client.training_run import run_training
from vopd_client.types import SequenceScores, SequenceToScore

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")


# ---------------------------------------------------------------- learning


def test_the_student_comes_closer_to_the_teacher(runs: Runs) -> None:
    settings = {"steps": 25, "learning_rate": 1e-2, "objective": "vopd-rb", "top_k": 64, "schedule": "constant"}
    eval_prompts = str(runs.models / "prompts.jsonl")
    assert runs.train(prompts_per_step=4, eval_prompts=eval_prompts, **settings) == 0
    summary = json.loads(runs.directory().summary_file.read_text())
    assert summary["kl_nats_after"] < 0.75 * summary["kl_nats_before"]  # the draws are fixed by the seed
    metrics = runs.metrics()
    assert np.mean([row["kl_nats"] for row in metrics[-5:]]) < np.mean([row["kl_nats"] for row in metrics[:5]])


def test_a_student_equal_to_the_teacher_has_nothing_to_learn(runs: Runs) -> None:
    assert runs.train(student=str(runs.models / "teacher"), objective="vopd-rb", steps=1, support_mass=1.0) == 0
    (row,) = runs.metrics()
    assert abs(row["kl_nats"]) < 1e-5
    assert row["grad_norm"] < 1e-4
    assert row["logprob_mismatch_nats"] < 1e-5
    assert row["logprob_mismatch_nats"] <= row["logprob_mismatch_max_nats"] < 1e-4
    assert 0 <= row["rollout_kl_nats"] < 1e-9


def test_microbatches_of_any_size_give_the_same_weights(runs: Runs) -> None:
    settings = {"steps": 3, "learning_rate": 1e-3, "objective": "vopd-rb"}
    runs.train(name="whole", microbatch_tokens=10_000, **settings)
    runs.train(name="single", microbatch_tokens=1, **settings)
    assert largest_difference(runs.weights("whole"), runs.weights("single")) < 1e-5
    for whole, single in zip(runs.metrics("whole"), runs.metrics("single"), strict=True):
        assert whole == pytest.approx(single, rel=1e-4, abs=1e-5)


def test_how_many_rollouts_are_sampled_side_by_side_changes_last_bits_only(runs: Runs) -> None:
    for batch_size in (1, 16):
        runs.train(name=str(batch_size), rollout_batch_size=batch_size, steps=2)
    for one_by_one, together in zip(runs.metrics("1"), runs.metrics("16"), strict=True):
        assert one_by_one == pytest.approx(together, rel=1e-3, abs=1e-5)


def test_the_order_in_which_answers_arrive_changes_nothing(runs: Runs) -> None:
    runs.train(name="in-order", deterministic=True)
    late = FakeLocalTeacher(runs.models / "teacher", answer_in_reverse=ROLLOUTS_A_STEP)
    runs.train(late, name="reversed", deterministic=True)
    assert runs.metrics("in-order") == runs.metrics("reversed")
    assert same_bits(runs.weights("in-order"), runs.weights("reversed"))


def test_the_final_model_is_the_trained_one_and_plain_transformers_reads_it(runs: Runs) -> None:
    runs.train(steps=2)
    model = AutoModelForCausalLM.from_pretrained(runs.directory().model)
    checkpoint = load_file(runs.directory().checkpoints / "step-000002" / "model.safetensors")
    before = load_file(runs.models / "student" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), checkpoint[f"model.{name}"])
    assert not torch.equal(model.get_parameter(name), before[name])


def test_bf16_autocast_trains_fp32_master_weights(runs: Runs) -> None:
    assert runs.train(steps=2, mixed_precision="bf16") == 0
    assert {weight.dtype for weight in runs.weights().values()} == {torch.float32}
    assert all(0 < row["logprob_mismatch_nats"] < 0.2 for row in runs.metrics())


# ---------------------------------------------------------------- what is written


def test_a_row_of_metrics_holds_what_the_report_needs(runs: Runs) -> None:
    runs.train(steps=2, warmup_steps=1, learning_rate=1.0)
    first, second = read_rows(runs.directory().metrics_file)
    assert first["learning_rate"] == 0.5
    assert second["learning_rate"] == 1.0
    assert set(first) == {
        *("step", "loss", "kl_nats", "reward_nats", "baseline_nats", "advantage_std", "grad_norm", "learning_rate"),
        *("num_valid_tokens", "completion_tokens_mean", "ended_fraction", "support_size_mean", "left_out_mass_mean"),
        *("logprob_mismatch_nats", "logprob_mismatch_max_nats", "rollout_kl_nats"),
        *("teacher_wait_s", "rollout_s", "update_s", "step_s", "tokens_per_s"),
        *("teacher_bytes_per_token", "variance", "variance_over_opd", "adam_moment_variance", "staleness"),
    }
    assert first["num_valid_tokens"] == first["completion_tokens_mean"] * ROLLOUTS_A_STEP


@pytest.mark.usefixtures("report_is_drawn")
def test_evaluations_are_made_before_during_and_after_and_the_teacher_once(runs: Runs) -> None:
    runs.train(eval_prompts=str(runs.models / "prompts.jsonl"), eval_every=3, steps=4)
    rows = read_rows(runs.directory().evals_file)
    assert [(row["step"], row["who"]) for row in rows] == [
        (0, "student"), (0, "teacher"), (3, "student"), (4, "student")
    ]  # fmt: skip
    assert set(rows[0]["exact_match_by_kind"]) == {"odd", "even"}
    summary = json.loads(runs.directory().summary_file.read_text())
    assert summary["kl_nats_before"] == rows[0]["kl_nats"]
    assert summary["kl_nats_after"] == rows[3]["kl_nats"]
    assert summary["exact_match_teacher"] == rows[1]["exact_match"]
    assert summary["steps"] == 4
    assert (runs.directory().path / "report.html").exists()
    assert "held-out prompts" in runs.told
    assert "KL to the teacher" in runs.told


def test_the_start_says_who_teaches_whom_and_what_is_biased(runs: Runs) -> None:
    student = write_tiny_model(runs.output_dir.parent / "other-end", seed=1, end_token="<|other_end|>")
    supports = frozenset({"sampled", "teacher_top_k"})
    runs.train(
        FakeLocalTeacher(runs.models / "teacher", supports=supports),
        student=str(student), objective="topk-kl", steps=1,
    )  # fmt: skip
    assert "teacher: fake (fake 0, float32, revision 1)" in runs.told
    assert "end tokens: student ends with" in runs.told
    assert "its own top-k is the support instead" in runs.told
    assert "warning: topk-kl is biased" in runs.told


def test_dropped_end_tokens_are_no_part_of_the_loss_and_mapped_ones_are(runs: Runs) -> None:
    student = str(write_tiny_model(runs.output_dir.parent / "other-end", seed=1, end_token="<|other_end|>"))
    settings = {"student": student, "steps": 1, "max_new_tokens": 64, "rollouts_per_prompt": 8, "prompts_per_step": 6}
    rows = {}
    for mode in ("map", "drop"):
        runs.train(name=mode, end_token=mode, **settings)
        (rows[mode],) = runs.metrics(mode)
    num_ended = round(rows["map"]["ended_fraction"] * 48)
    assert num_ended > 0  # the draws are fixed by the seed
    assert rows["map"]["num_valid_tokens"] - rows["drop"]["num_valid_tokens"] == num_ended


# ---------------------------------------------------------------- refused before training


def refuse_to_connect(config: TrainConfig, device: str) -> FakeLocalTeacher:
    raise AssertionError("the teacher was asked for before the prompts and the directory were checked")


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"prompts": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"eval_prompts": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"output_dir": Path("/proc/nowhere")}, RunDirectoryError, "cannot write to the run directory"),
        ({"name": None, "resume": True}, ConfigError, "--resume needs --name"),
        ({"device": "cuda"}, ConfigError, "device cuda was asked for"),
    ],
)
def test_what_can_be_checked_without_a_model_is_checked_first(
    runs: Runs, settings: dict[str, Any], error: type[VopdError], match: str
) -> None:
    with pytest.raises(error, match=match):
        run_training(runs.config(**settings), console=Console(file=io.StringIO()), connect=refuse_to_connect)
    assert not runs.directory().path.exists()


def test_a_malformed_row_is_reported_with_its_line_and_the_name_stays_free(runs: Runs, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"promt": "typo"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        run_training(runs.config(prompts=str(bad)), console=Console(file=io.StringIO()), connect=refuse_to_connect)
    assert runs.train(steps=1) == 0


def test_a_disk_too_small_for_the_checkpoints_is_found_before_the_first_step(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunDirectoryError, match=r"GB free, and the run needs .* checkpoints of .* and the final model"):
        runs.train()
    assert not runs.directory().path.exists()


@pytest.mark.parametrize(
    ("info", "error", "match"),
    [
        ({"fingerprint": "another"}, HandshakeError, "different tokenizers"),
        ({"max_context_length": 12}, DataError, "the teacher's maximum 12"),
        ({"supports": frozenset({"sampled"})}, HandshakeError, "needs a support"),
        ({"max_support_size": 4}, HandshakeError, "max_support_size 4"),
    ],
)
def test_a_teacher_that_cannot_teach_this_run_is_refused(
    runs: Runs, info: dict[str, Any], error: type[VopdError], match: str
) -> None:
    with pytest.raises(error, match=match):
        runs.train(FakeLocalTeacher(runs.models / "teacher", **info))
    assert not runs.directory().path.exists()


def test_a_run_is_not_started_over_by_mistake(runs: Runs) -> None:
    runs.train(steps=1)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        runs.train(steps=1)


# ---------------------------------------------------------------- what must not be trained on


class DamagedTeacher(FakeLocalTeacher):
    """Gives NaN for one request."""

    bad_call = 0

    def _score(self, sequence: SequenceToScore) -> SequenceScores:
        scores = super()._score(sequence)
        return replace(scores, sampled_logprobs_T=scores.sampled_logprobs_T * np.nan) if self._is_bad() else scores

    def _is_bad(self) -> bool:
        return self.calls == self.bad_call


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_updated(runs: Runs) -> None:
    runs.train(name="undisturbed", steps=3, checkpoint_every=1)
    teacher = DamagedTeacher(runs.models / "teacher")
    teacher.bad_call = 3 * ROLLOUTS_A_STEP  # in the third step
    with pytest.raises(NonFiniteError, match=r"step 3 stopped before the weights were updated.*prompts\.jsonl:\d"):
        runs.train(teacher, steps=3, checkpoint_every=0)
    assert [row["step"] for row in runs.metrics()] == [1, 2]
    assert runs.checkpoints() == ["step-000002"]
    undisturbed = load_file(runs.directory("undisturbed").checkpoints / "step-000002" / "model.safetensors")
    assert same_bits(load_file(runs.directory().checkpoints / "step-000002" / "model.safetensors"), undisturbed)


def test_a_full_device_saves_the_last_step_and_names_the_settings_that_help(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail_in_the_third_step(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return compute_loss(*arguments, **settings)

    monkeypatch.setattr("vopd_client.trainer.compute_loss", fail_in_the_third_step)
    with pytest.raises(OutOfMemory, match=r"step 3: tried to allocate 2.00 GiB; lower microbatch_tokens"):
        runs.train(steps=4, checkpoint_every=0, microbatch_tokens=100_000)
    assert runs.checkpoints() == ["step-000002"]


class OneProcess:
    """What `scale_and_clip` needs of accelerate."""

    num_processes = 1

    @staticmethod
    def clip_grad_norm_(parameters: Iterator[nn.Parameter], max_norm: float) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)


def test_gradients_are_divided_by_all_tokens_and_then_clipped() -> None:
    module = nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[30.0, 40.0]])
    norm = scale_and_clip(OneProcess(), module, num_valid_tokens=10, max_grad_norm=1.0)  # type: ignore[arg-type]
    assert norm == pytest.approx(5.0)
    assert module.weight.grad.flatten().tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_updated(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(accelerator: Any, module: nn.Module, **settings: float) -> float:
        next(module.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        return scale_and_clip(accelerator, module, num_valid_tokens=1, max_grad_norm=1.0)

    monkeypatch.setattr("vopd_client.trainer.scale_and_clip", spoil)
    with pytest.raises(NonFiniteError, match=r"step 1 .*norm of the gradient is (inf|nan).*prompts\.jsonl"):
        runs.train()
    assert runs.metrics() == []


def test_biases_and_norms_do_not_decay() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    decays = {
        tuple(parameter.shape): group["weight_decay"]
        for group in make_optimizer(module, learning_rate=1.0, weight_decay=0.1).param_groups
        for parameter in group["params"]
    }
    assert decays == {(2, 2): 0.1, (2,): 0.0}
