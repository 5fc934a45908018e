"""Whole training runs of a tiny student against a teacher in this process with exact numbers."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fake_local_teacher import FakeLocalTeacher
from tiny_model import write_tiny_model
from vopd_client.config import TrainConfig
from vopd_client.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HandshakeError,
    NonFiniteError,
    OutOfMemory,
    RunDirectoryError,
    TeacherInternalError,
    TeacherUnavailableError,
    VopdError,
)
from vopd_client.losses import compute_loss
from vopd_client.optimization import make_optimizer, scale_and_clip
from vopd_client.run_directory import RunDirectory, read_rows
from vopd_client.trainer import run_training
from vopd_client.types import SequenceScores, SequenceToScore

NUM_PROMPTS = 6
ROLLOUTS_A_STEP = 4
TIMES = frozenset({"teacher_wait_s", "rollout_s", "update_s", "step_s", "tokens_per_s"})


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
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


@pytest.fixture(autouse=True)
def _no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
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


@dataclass
class Runs:
    """Runs in a directory of their own, of models that exist once a module."""

    models: Path
    output_dir: Path
    told: str = ""

    def config(self, **settings: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "student": str(self.models / "student"),
            "prompts": str(self.models / "prompts.jsonl"),
            "teacher_url": ["grpc://nowhere:1"],
            "output_dir": self.output_dir,
            "name": "run",
            "steps": 4,
            "learning_rate": 1e-3,
            "prompts_per_step": ROLLOUTS_A_STEP // 2,
            "rollouts_per_prompt": 2,
            "max_new_tokens": 8,
            "top_k": 16,
            "checkpoint_every": 2,
            "mixed_precision": "no",
            "device": "cpu",
        }
        return TrainConfig(**{**defaults, **settings})

    def train(self, teacher: FakeLocalTeacher | None = None, **settings: Any) -> int:
        text = io.StringIO()
        console = Console(file=text, width=300)
        teacher = teacher or FakeLocalTeacher(self.models / "teacher")
        try:
            return run_training(self.config(**settings), console=console, connect=lambda config, device: teacher)
        finally:
            self.told = text.getvalue()
            assert teacher.closed or "connecting to the teacher" not in self.told

    def directory(self, name: str = "run") -> RunDirectory:
        return RunDirectory(self.output_dir / name)

    def metrics(self, name: str = "run") -> list[dict[str, Any]]:
        """The rows without what a clock measured."""
        rows = read_rows(self.directory(name).metrics_file)
        return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]

    def weights(self, name: str = "run") -> dict[str, torch.Tensor]:
        return load_file(self.directory(name).model / "model.safetensors")

    def checkpoints(self, name: str = "run") -> list[str]:
        return sorted(path.name for path in self.directory(name).checkpoints.iterdir())


@pytest.fixture
def runs(models: Path, tmp_path: Path) -> Runs:
    return Runs(models, tmp_path / "runs")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


# ---------------------------------------------------------------- learning


def test_the_student_comes_closer_to_the_teacher(runs: Runs) -> None:
    settings = {"steps": 25, "learning_rate": 1e-2, "objective": "vopd-rb", "top_k": 64, "schedule": "constant"}
    eval_prompts = str(runs.models / "prompts.jsonl")
    assert runs.train(prompts_per_step=4, eval_prompts=eval_prompts, **settings) == 0
    summary = json.loads(runs.directory().summary_file.read_text())
    assert summary["kl_nats_after"] < 0.75 * summary["kl_nats_before"]  # the draws are fixed by the seed
    metrics = runs.metrics()
    assert np.mean([row["kl_nats"] for row in metrics[-5:]]) < np.mean([row["kl_nats"] for row in metrics[:5]])


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


def test_a_student_equal_to_the_teacher_has_nothing_to_learn(runs: Runs) -> None:
    assert runs.train(student=str(runs.models / "teacher"), objective="vopd-rb", steps=1, support_mass=1.0) == 0
    (row,) = runs.metrics()
    assert abs(row["kl_nats"]) < 1e-5
    assert row["grad_norm"] < 1e-4
    assert row["logprob_mismatch_nats"] < 1e-5


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
        *("logprob_mismatch_nats", "teacher_wait_s", "rollout_s", "update_s", "step_s", "tokens_per_s"),
        *("teacher_bytes_per_token", "variance", "variance_over_opd", "adam_moment_variance"),
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


# ---------------------------------------------------------------- stopping and going on


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
