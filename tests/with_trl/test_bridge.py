"""TRL's own loop with our loss in it: the numbers are ours, and everything around them is still TRL's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from teacher_process import RunningTeacher, start_teacher
from tiny_model import NUM_IDS, write_tiny_model
from vopd_client.batch import collate
from vopd_client.errors import ConfigError, DataError, HandshakeError, TeacherUnavailableError
from vopd_client.losses import compute_loss
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.student import StudentForTraining
from vopd_client.teacher import RemoteTeacher
from vopd_client.trl import RemoteDistillationTrainer, sampled_completions
from vopd_client.types import Candidates, SequenceToScore

Settings = Callable[..., dict[str, Any]]
TOLERANCE = 1e-5  # float32, one summed in another order than the other; gradients are of order 1


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=TOLERANCE, rtol=TOLERANCE, msg=name)


def step_rows(trainer: RemoteDistillationTrainer) -> list[dict[str, float]]:
    """What was logged of each step."""
    return [row for row in trainer.state.log_history if "loss" in row]


def test_two_steps_move_the_weights_and_log_what_the_loss_is_made_of(
    settings: Settings, student_dir: Path, teacher: RunningTeacher
) -> None:
    trainer = RemoteDistillationTrainer(str(student_dir), **settings(), teacher_url=teacher.url, top_k=50)
    before = weights(trainer.model)
    trainer.train()
    rows = step_rows(trainer)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert {name for name in rows[0] if name.startswith("vopd/")} == {
        f"vopd/{name}"
        for name in (
            "kl_nats",
            "reward_nats",
            "baseline_nats",
            "advantage_std",
            "left_out_mass_mean",
            "support_size_mean",
            "variance",
            "variance_over_opd",
            "teacher_wait_s",
            "teacher_bytes_per_token",
        )
    }
    assert rows[0]["vopd/kl_nats"] > 0.5  # two random models
    assert 1 < rows[0]["vopd/support_size_mean"] <= 50
    moved = [name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])]
    assert moved == list(before)


def test_loss_and_gradient_of_a_batch_are_those_of_our_own_pipeline(
    settings: Settings, student_dir: Path, teacher: RunningTeacher
) -> None:
    """TRL's rollouts, left-padded and right-padded; a teacher connection of its own; plain logits for the support."""
    trainer = RemoteDistillationTrainer(
        str(student_dir),
        **settings(per_device_train_batch_size=4, gradient_accumulation_steps=1),
        teacher_url=teacher.url,
        top_k=20,
        support_mass=1.0,
    )
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": prompt} for prompt in trainer.train_dataset["prompt"][:4]])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()

    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    rollouts = []
    for row in range(4):
        prompt_ids = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        completion_ids = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        logits_TV = model(torch.cat([prompt_ids, completion_ids])[None]).logits[0, len(prompt_ids) - 1 : -1, :NUM_IDS]
        support_ids = logits_TV.topk(20).indices.flatten().numpy()
        counts_T = np.full(len(completion_ids), 20)
        unknown_T = np.zeros(len(completion_ids), np.float32)
        rollouts.append(
            Rollout(
                RolloutKey(0, row, 0),
                prompt_ids.numpy(),
                completion_ids.numpy(),
                unknown_T,
                support_ids,
                counts_T,
                unknown_T,
                ended=False,
            )
        )
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    assert len(set(lengths)) > 1  # there is padding on both sides
    with RemoteTeacher.connect(teacher.url) as other:
        scores = other.score(
            [
                SequenceToScore(r.prompt_ids, r.completion_ids, Candidates(r.support_ids, r.support_counts_T))
                for r in rollouts
            ]
        )
    batch = collate(rollouts, scores, prompt_names=["row"] * 4, pad_id=0, num_shared_ids=NUM_IDS)
    student = StudentForTraining(model)
    student.num_shared_ids = NUM_IDS
    output = compute_loss("vopd-rb", student(**batch.student_inputs), batch, tail="bucket")
    expected = output.loss_sum / sum(lengths)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    expected_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same({name: parameter.grad for name, parameter in trainer.model.named_parameters()}, expected_gradients)
    assert max(float(gradient.abs().max()) for gradient in expected_gradients.values()) > 0.1
    logged: dict[str, float] = {}
    trainer.log(logged)
    assert logged["vopd/kl_nats"] == pytest.approx(float(output.sums["reverse_kl"]) / sum(lengths), rel=1e-4)


@pytest.mark.parametrize("objective", ["vopd", "opd", "topk-kl", "vopd-full", "full-kl"])
def test_every_objective_trains(
    settings: Settings, student_dir: Path, teacher: RunningTeacher, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", settings()["args"].output_dir)  # where output heads are kept
    trainer = RemoteDistillationTrainer(
        str(student_dir), **settings(max_steps=1), teacher_url=teacher.http_url, objective=objective, top_k=20
    )
    before = weights(trainer.model)
    trainer.train()
    [row] = step_rows(trainer)
    assert np.isfinite(row["loss"])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())


def test_a_step_is_the_same_however_its_batch_is_divided(
    settings: Settings, student_dir: Path, teacher: RunningTeacher
) -> None:
    """The same four completions of different lengths at once, and one after the other."""
    after, logged = [], []
    for batch_size, microbatches in ((4, 1), (2, 2), (1, 4)):
        trainer = RemoteDistillationTrainer(
            str(student_dir),
            **settings(
                max_steps=1,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=microbatches,
                optim="sgd",
                learning_rate=0.1,
            ),
            teacher_url=teacher.url,
        )
        trainer.train()
        after.append(weights(trainer.model))
        logged.append(step_rows(trainer)[0])
    assert logged[0]["completions/min_length"] < logged[0]["completions/max_length"]
    for other, row in zip(after[1:], logged[1:], strict=True):
        assert_same(other, after[0])
        for name in ("loss", "vopd/kl_nats", "vopd/variance", "vopd/support_size_mean"):
            assert row[name] == pytest.approx(logged[0][name], rel=1e-4)


class AtBeginning(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights that training begins with."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **others: Any) -> None:
        self.weights = weights(model)


def test_evaluation_and_a_run_that_goes_on_from_a_checkpoint_are_trls_own(
    settings: Settings, student_dir: Path, teacher: RunningTeacher
) -> None:
    def trainer() -> RemoteDistillationTrainer:
        arguments = settings(max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
        arguments["eval_dataset"] = arguments["train_dataset"]
        return RemoteDistillationTrainer(str(student_dir), **arguments, teacher_url=teacher.url)

    whole = trainer()
    whole.train()
    evaluations = [row for row in whole.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [1, 2, 3]
    assert all(row["eval_vopd/kl_nats"] > 0.5 for row in evaluations)
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    resumed, beginning = trainer(), AtBeginning()
    resumed.add_callback(beginning)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(beginning.weights[name], tensor) for name, tensor in saved.items())
    assert [row["step"] for row in step_rows(resumed)] == [1, 2, 3]
    assert step_rows(resumed)[:2] == step_rows(whole)[:2]
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in weights(resumed.model).items())


class AfterFirstStep(TrainerCallback):  # type: ignore[misc]
    """Does something once, when the first step is complete."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 1:
            self._act()


def test_a_teacher_that_is_killed_and_started_again_costs_nothing_but_the_wait(
    settings: Settings, student_dir: Path, teacher_dir: Path, teacher: RunningTeacher
) -> None:
    undisturbed = RemoteDistillationTrainer(str(student_dir), **settings(max_steps=3), teacher_url=teacher.url)
    undisturbed.train()
    started: list[RunningTeacher] = []
    with start_teacher(teacher_dir) as first:
        trainer = RemoteDistillationTrainer(str(student_dir), **settings(max_steps=3), teacher_url=first.url)

        def restart() -> None:
            first.kill()
            started.append(start_teacher(teacher_dir, port=first.port))

        trainer.add_callback(AfterFirstStep(restart))
        trainer.train()
    with started[0]:
        rows, expected = step_rows(trainer), step_rows(undisturbed)
        assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in expected]
        for name in ("loss", "grad_norm", "vopd/kl_nats"):  # a teacher's last bits depend on what it batches
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-3)


def test_a_teacher_that_stays_away_ends_training_with_the_weights_of_the_last_step(
    settings: Settings, student_dir: Path, teacher_dir: Path
) -> None:
    with start_teacher(teacher_dir) as leaving:
        trainer = RemoteDistillationTrainer(
            str(student_dir), **settings(), teacher_url=leaving.url, teacher_timeout_s=2.0
        )
        kept: list[dict[str, torch.Tensor]] = []

        def leave() -> None:
            kept.append(weights(trainer.model))
            leaving.kill()

        trainer.add_callback(AfterFirstStep(leave))
        with pytest.raises(TeacherUnavailableError, match="no progress of the teacher for 2 s"):
            trainer.train()
    assert trainer.state.global_step == 1
    for name, tensor in weights(trainer.model).items():
        assert torch.equal(tensor, kept[0][name])


def test_another_tokenizer_is_refused_before_the_first_step(
    settings: Settings, teacher: RunningTeacher, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", extra_tokens=("<|tool|>",))
    with pytest.raises(HandshakeError, match=r"different tokenizers: 260 and 259 entries.*\n.*id 259: student '<"):
        RemoteDistillationTrainer(str(other), **settings(), teacher_url=teacher.url)


def test_what_cannot_be_honoured_is_refused_before_the_first_step(
    settings: Settings, student_dir: Path, teacher: RunningTeacher
) -> None:
    def refused(match: str, error: type[Exception] = ConfigError, **changes: Any) -> None:
        arguments = {**settings(), "teacher_url": teacher.url, **changes}
        with pytest.raises(error, match=match):
            RemoteDistillationTrainer(str(student_dir), **arguments)

    refused("teacher_model as well as teacher_url", teacher_model=str(student_dir))
    refused(
        "args.teacher_model_name_or_path as well as teacher_url",
        args=settings(teacher_model_name_or_path="some/teacher")["args"],
    )
    refused("args.beta 0.5 selects another divergence", args=settings(beta=0.5)["args"])
    refused("objective 'gkd': there are", objective="gkd")
    refused("top-k 5000 > max_support_size", HandshakeError, top_k=5000)
    refused(
        "generation_kwargs samples at temperature 0.7; the loss is at 1.0",
        args=settings(generation_kwargs={"temperature": 0.7})["args"],
    )


def test_sampling_from_a_part_of_the_distribution_is_said(
    settings: Settings, student_dir: Path, teacher: RunningTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = settings(top_p=0.9, repetition_penalty=1.1)
    RemoteDistillationTrainer(str(student_dir), **copy.copy(arguments), teacher_url=teacher.url)
    assert "top_p 0.9, repetition_penalty 1.1: completions are not drawn" in caplog.text
    caplog.clear()
    RemoteDistillationTrainer(str(student_dir), **arguments, teacher_url=teacher.url, objective="topk-kl")
    assert "not drawn" not in caplog.text


def test_ids_that_mean_no_token_are_never_sampled(
    settings: Settings, student_dir: Path, teacher: RunningTeacher
) -> None:
    """The student's output layer has five rows more than its tokenizer has tokens."""
    trainer = RemoteDistillationTrainer(
        str(student_dir),
        **settings(max_completion_length=64, generation_kwargs={"suppress_tokens": [3]}),
        teacher_url=teacher.url,
    )
    inputs = trainer._generate_and_score_completions([{"prompt": "Two"}] * 32)
    sampled = inputs["completion_ids"][inputs["completion_mask"].bool()]
    assert len(sampled) > 100
    assert int(sampled.max()) < NUM_IDS
    assert 3 not in sampled


def test_lora_adapters_are_trained_alone(settings: Settings, student_dir: Path, teacher: RunningTeacher) -> None:
    from peft import LoraConfig

    trainer = RemoteDistillationTrainer(
        str(student_dir),
        **settings(max_steps=1, bf16=True),  # as on a GPU: autocast over float32 weights
        teacher_url=teacher.url,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert np.isfinite(step_rows(trainer)[0]["loss"])


def test_padding_goes_and_a_tools_tokens_stay_out_of_the_loss() -> None:
    inputs = {
        "prompt_ids": torch.tensor([[257, 257, 5], [6, 7, 8]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[10, 11, 12, 13], [20, 257, 257, 257]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]),
    }
    first, second = sampled_completions(inputs, "row {}")
    assert (first.prompt_ids.tolist(), first.completion_ids.tolist()) == ([5], [10, 11, 12, 13])
    assert first.in_loss_T.tolist() == [True, False, False, True]
    assert (second.prompt_ids.tolist(), second.completion_ids.tolist()) == ([6, 7, 8], [20, 257])
    assert second.in_loss_T.tolist() == [True, True]  # the end token counts, what pads it does not
    inputs["prompt_mask"][0] = 0
    with pytest.raises(DataError, match="row 0 has an empty prompt"):
        sampled_completions(inputs, "row {}")
