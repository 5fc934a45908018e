"""Whole runs over trajectories of several turns, really sampled from tiny models with masks, replies and rewards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conftest import REPOSITORY
from fake_local_teacher import FakeLocalTeacher
from process_runs import Job, run_in_processes
from replying_environments import write_rows, write_talkative_model
from training_runs import NUM_PROMPTS, ROLLOUTS_A_STEP, Runs, largest_difference, same_bits
from vopd_client.added_turns import AddedTurns
from vopd_client.batch import collate
from vopd_client.chat_templates import ChatOptions
from vopd_client.environment import Conversation, load_environment
from vopd_client.errors import EnvironmentReplyError, TeacherUnavailableError
from vopd_client.losses import compute_loss
from vopd_client.prompts import load_prompts, render_prompts
from vopd_client.rollouts.base import Rollout, RolloutKey, turn_bounds
from vopd_client.rollouts.multi_turn import MultiTurnSampler
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.student import LoadedStudent, load_student
from vopd_client.types import Candidates, SequenceScores, SequenceToScore

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")

ECHO: dict[str, Any] = {"environment": "replying_environments:Echo", "max_new_tokens": 90}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_talkative_model(directory / "teacher", seed=0)
    write_talkative_model(directory / "student", seed=1)
    write_rows(directory / "prompts.jsonl", NUM_PROMPTS)
    return directory


class Listening(FakeLocalTeacher):
    """`asked`: every request. masked: its log-probability of every token that the student did not sample."""

    def __init__(self, directory: Path, *, masked: float | None = None, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self._masked = masked
        self.asked: list[SequenceToScore] = []

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        self.asked.append(sequence)
        return super().submit(sequence)

    def _score(self, sequence: SequenceToScore) -> SequenceScores:
        scores = super()._score(sequence)
        if self._masked is None or sequence.is_sampled_T is None:
            return scores
        sampled_T = np.where(sequence.is_sampled_T, scores.sampled_logprobs_T, np.float32(self._masked))
        return replace(scores, sampled_logprobs_T=sampled_T)


def completions_of(teacher: Listening, number: int | None = None) -> list[list[int]]:
    return sorted(sequence.completion_ids.tolist() for sequence in teacher.asked[:number])


# ---------------------------------------------------------------- what is learned from


def test_a_run_learns_from_trajectories_and_counts_the_students_tokens_alone(runs: Runs) -> None:
    teacher = Listening(runs.models / "teacher")
    assert runs.train(teacher, **ECHO, steps=2) == 0
    assert "environment replying_environments:Echo: up to 8 turns, tools listed in the prompts: none" in runs.told
    first = runs.metrics()[0]
    assert first["turns_mean"] > 1.5
    assert first["environment_tokens_mean"] > 10
    own_tokens = ROLLOUTS_A_STEP * (first["completion_tokens_mean"] - first["environment_tokens_mean"])
    assert first["num_valid_tokens"] == pytest.approx(own_tokens)
    # The forward that learns reads every turn in the context in which it was sampled.
    assert first["logprob_mismatch_nats"] < 1e-4
    for sequence in teacher.asked:
        assert isinstance(sequence.support, Candidates)
        assert sequence.is_sampled_T is not None
        assert not sequence.support.counts_T[~sequence.is_sampled_T].any()
        assert sequence.support.counts_T[sequence.is_sampled_T].all()
    decode = load_student(runs.models / "student", device="cpu").tokenizer.decode
    between = [decode(sequence.completion_ids[~sequence.is_sampled_T]) for sequence in teacher.asked]
    assert any(text.endswith("?<|end|><|start|>assistant\n") for text in between)


@pytest.mark.parametrize("masked", [-np.inf, -1e30, 1e30])
def test_what_the_teacher_says_of_a_reply_changes_no_bit(runs: Runs, masked: float) -> None:
    settings = {**ECHO, "deterministic": True, "steps": 2}
    assert runs.train(**settings, name="plain") == 0
    assert runs.train(Listening(runs.models / "teacher", masked=masked), **settings, name="masked") == 0
    assert same_bits(runs.weights("plain"), runs.weights("masked"))
    assert runs.metrics("plain") == runs.metrics("masked")


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "opd"},
        {"objective": "vopd", "support": "teacher"},
        {"objective": "vopd-full"},
        {"objective": "full-kl"},
        {"max_turns": 2, "end_token": "drop"},
        {"cut_completions": "mask"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_way_to_learn_takes_trajectories(runs: Runs, settings: dict[str, Any]) -> None:
    assert runs.train(Listening(runs.models / "teacher"), **{**ECHO, **settings}, steps=1) == 0
    [row] = runs.metrics()
    assert row["turns_mean"] > 1
    assert np.isfinite(row["loss"])


# ---------------------------------------------------------------- the gradient


def trajectories(models: Path, *, batch_size: int = 16, share: Sequence[int] = range(NUM_PROMPTS)) -> list[Rollout]:
    student = load_student(models / "student", device="cpu")
    return list(
        sampler_of(student, models, batch_size).sample([(key, ids) for key, ids in draws(student, models, share)])
    )


def draws(student: LoadedStudent, models: Path, share: Sequence[int]) -> list[tuple[RolloutKey, Any]]:
    prompts = prompts_of(student, models)
    return [(RolloutKey(1, index, rollout), prompts[index].student_ids) for index in share for rollout in range(2)]


def prompts_of(student: LoadedStudent, models: Path) -> list[Any]:
    return render_prompts(
        load_prompts(str(models / "prompts.jsonl")),
        tokenizer=student.tokenizer,
        teacher_chat_template=student.tokenizer.chat_template,
        max_prompt_tokens=100,
        max_new_tokens=90,
        student_max_length=1000,
        teacher_max_length=1000,
    )


def sampler_of(student: LoadedStudent, models: Path, batch_size: int) -> MultiTurnSampler:
    turns = RolloutSampler(
        student.module.model, num_shared_ids=student.vocab_size, end_ids=student.end_ids, pad_id=student.pad_id,
        max_new_tokens=90, temperature=1.0, top_k=8, support_mass=0.99, seed=5, batch_size=batch_size,
    )  # fmt: skip
    return MultiTurnSampler(
        turns, prompts=prompts_of(student, models), environment=load_environment(ECHO["environment"]),
        added_ids=AddedTurns.of(student.tokenizer, ChatOptions(), {}).ids, tokenizer=student.tokenizer,
        max_new_tokens=90, max_turns=8, timeout_s=20, in_rounds=True,
    )  # fmt: skip


def test_the_gradient_is_the_sum_over_the_sampled_positions(models: Path) -> None:
    student = load_student(models / "student", device="cpu")
    rollout = max(trajectories(models), key=lambda rollout: len(turn_bounds(rollout)))
    assert rollout.is_sampled_T is not None
    assert len(turn_bounds(rollout)) == 3
    teacher = FakeLocalTeacher(models / "teacher")
    support = Candidates(rollout.support_ids, rollout.support_counts_T)
    scores = teacher.submit(SequenceToScore(rollout.prompt_ids, rollout.completion_ids, support)).result()

    def gradient(rollout: Rollout, mask_T: Any = None) -> Tensor:
        batch = collate(
            [rollout], [scores], prompt_names=["p"], pad_id=0, num_shared_ids=student.vocab_size,
            loss_masks=None if mask_T is None else [mask_T],
        )  # fmt: skip
        student.module.zero_grad()
        compute_loss("vopd-rb", student.module(**batch.student_inputs), batch, tail="bucket").loss_sum.backward()
        return torch.cat(
            [parameter.grad.flatten() for parameter in student.module.parameters() if parameter.grad is not None]
        )

    positions = np.flatnonzero(rollout.is_sampled_T)
    unmasked = replace(rollout, is_sampled_T=None)
    by_position = [gradient(unmasked, np.arange(len(rollout.completion_ids)) == position) for position in positions]
    torch.testing.assert_close(gradient(rollout), torch.stack(by_position).sum(0), atol=1e-4, rtol=1e-4)
    assert not gradient(unmasked, np.zeros(len(rollout.completion_ids), np.bool_)).any()


# ---------------------------------------------------------------- the same draws however they are made


def test_trajectories_do_not_depend_on_batches_or_on_who_samples_them(models: Path) -> None:
    expected = {rollout.key: rollout.completion_ids.tolist() for rollout in trajectories(models)}
    assert len({tuple(ids) for ids in expected.values()}) == 2 * NUM_PROMPTS
    for batch_size, shares in ((1, [range(NUM_PROMPTS)]), (3, [range(NUM_PROMPTS)]), (16, [(4, 0), (1, 5, 3), (2,)])):
        found = {
            rollout.key: rollout.completion_ids.tolist()
            for share in shares
            for rollout in trajectories(models, batch_size=batch_size, share=share)
        }
        assert found == expected


def test_the_first_turns_are_those_of_a_run_without_an_environment(models: Path) -> None:
    student = load_student(models / "student", device="cpu")
    sampler = sampler_of(student, models, 16)
    asked = draws(student, models, range(NUM_PROMPTS))
    plain = {rollout.key: rollout for rollout in sampler._sampler.sample(asked)}
    for rollout in sampler.sample(asked):
        first, end = turn_bounds(rollout)[0]
        assert first == 0
        assert rollout.completion_ids[:end].tolist() == plain[rollout.key].completion_ids.tolist()
        assert same_floats(rollout.behaviour_logprobs_T[:end], plain[rollout.key].behaviour_logprobs_T)


def same_floats(left: Any, right: Any) -> bool:
    return bool(np.array_equal(left, right))


def test_two_processes_take_the_step_of_one(runs: Runs) -> None:
    settings = {**ECHO, "deterministic": True, "steps": 2, "prompts_per_step": 4}
    teacher = Listening(runs.models / "teacher")
    assert runs.train(teacher, **settings, name="one") == 0
    outcomes = run_in_processes(runs.models, runs.output_dir, [Job({**settings, "name": "two"})])
    assert [outcome.exit_code for [outcome] in outcomes] == [0, 0], outcomes
    number = 8  # rollouts of the first step, from the same weights
    asked = sorted(completion for [outcome] in outcomes for _, completion in outcome.asked[: number // 2])
    assert asked == completions_of(teacher, number)
    assert largest_difference(runs.weights("one"), runs.weights("two")) < 1e-5


# ---------------------------------------------------------------- going on


def test_a_run_that_is_cut_off_goes_on_bit_for_bit_with_trajectories_in_flight(runs: Runs) -> None:
    settings = {**ECHO, "deterministic": True, "max_staleness": 1, "steps": 5, "checkpoint_every": 1}
    settings |= {"environment": "replying_environments:Rewarding", "task_reward_weight": 0.5}
    assert runs.train(**settings, name="whole") == 0

    def leave(number: int) -> None:
        if number > 4 * ROLLOUTS_A_STEP:
            raise TeacherUnavailableError("gone")

    gone = FakeLocalTeacher(runs.models / "teacher", on_submit=leave)
    assert runs.train(gone, **settings, name="cut") == 3
    assert runs.train(**settings, name="cut", resume=True) == 0
    assert "holds no rollouts" not in runs.told
    assert same_bits(runs.weights("whole"), runs.weights("cut"))
    assert [row["loss"] for row in runs.metrics("cut")] == [row["loss"] for row in runs.metrics("whole")]


def test_an_environment_that_fails_stops_the_run_after_saving(runs: Runs) -> None:
    settings = {**ECHO, "environment": "replying_environments:Failing", "checkpoint_every": 0}
    with pytest.raises(
        EnvironmentReplyError, match=r"prompts.jsonl:\d, turn 1 \(step 3, .* raised ConnectionError: the "
    ):
        runs.train(**settings)
    assert runs.checkpoints() == ["step-000002"]
    assert len(runs.metrics()) == 2


# ---------------------------------------------------------------- rewards


def test_an_environments_rewards_are_logged_and_take_the_verifiers_place(runs: Runs) -> None:
    settings = {**ECHO, "environment": "replying_environments:Rewarding", "steps": 1}
    assert runs.train(**settings, name="logged") == 0
    assert runs.train(**settings, task_reward_weight=1.0, name="weighed") == 0
    [logged], [weighed] = runs.metrics("logged"), runs.metrics("weighed")
    assert logged["task_reward_mean"] == weighed["task_reward_mean"] > 0
    assert logged["loss"] != weighed["loss"]


def test_without_one_the_verifier_judges_the_last_turn(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    monkeypatch.setattr("vopd_client.rollout_source.reward", lambda prompt, text: judged.append(text) or 1.0)
    assert runs.train(Listening(runs.models / "teacher"), **ECHO, steps=1, task_reward_weight=1.0) == 0
    assert len(judged) == ROLLOUTS_A_STEP
    assert not any(" of " in text for text in judged)  # Echo's words
    assert runs.metrics()[0]["task_reward_mean"] == 1.0


# ---------------------------------------------------------------- the example


EXAMPLE = REPOSITORY / "examples/calculator"


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned by heart to call and to answer in two short rows, and those rows beside it."""
    directory = write_talkative_model(tmp_path_factory.mktemp("caller") / "student", seed=3, end_probability=0.01)
    student = load_student(directory, device="cpu")
    tokenizer, model = student.tokenizer, student.module.model
    write_rows(directory.parent / "prompts.jsonl", 2)
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
    learned = [
        {"role": "assistant", "content": call},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42"},
    ]
    texts = []
    for row in load_prompts(str(directory.parent / "prompts.jsonl")):
        messages = [dict(message) for message in row.messages or ()]
        context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        texts.append((context, tokenizer.apply_chat_template([*messages, *learned], tokenize=False)))
    rows = [(len(tokenizer(context).input_ids), torch.tensor(tokenizer(whole).input_ids)) for context, whole in texts]
    ids_BS = pad_sequence([ids for _, ids in rows], batch_first=True)
    labels_BS = pad_sequence([ids for _, ids in rows], batch_first=True, padding_value=-100)
    for labels_S, (num_context, _) in zip(labels_BS, rows, strict=True):
        labels_S[:num_context] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(input_ids=ids_BS, labels=labels_BS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


def test_the_examples_rows_have_right_answers() -> None:
    rows = load_prompts(str(EXAMPLE / "train.jsonl"))
    assert len(rows) == 32
    for row in rows:
        assert row.messages is not None
        number, price, fee = (int(digits) for digits in re.findall(r"\d+", row.messages[-1]["content"]))
        assert row.answer == str(number * price + fee)
        assert row.teacher_messages is not None
        assert row.teacher_messages[-1] == row.messages[-1]


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3 * 20 + 15", "75"),
        ("-(2 - 4.5) / 2", "1.25"),
        ("1/0", "error: float division by zero"),
        ("2 ** 9999999", "error: only numbers, + - * / and parentheses"),
        ("__import__('os')", "error: only numbers, + - * / and parentheses"),
        ("True", "error: only numbers, + - * / and parentheses"),
        ("2 +", "error: invalid syntax (<unknown>, line 1)"),
        ("1" * 201, "error: expression is a text of at most 200 characters"),
    ],
)
def test_the_calculator_works_out_numbers_and_nothing_else(
    expression: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    environment = load_environment("examples.calculator.calculator:Calculator")
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    said = {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"}
    conversation = Conversation((said,), 1, "p:1", None, None, "step 1, prompt 0, rollout 0")
    assert environment.checked_reply(conversation) == ({"role": "tool", "content": result},)
    silent = replace(conversation, messages=({"role": "assistant", "content": "75"},))
    assert environment.checked_reply(silent) == ()


def test_the_example_calls_its_calculator(caller: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    settings = yaml.safe_load((EXAMPLE / "run.yaml").read_text())
    settings |= {"student": str(caller), "prompts": str(caller.parent / "prompts.jsonl"), "prompts_per_step": 2}
    settings |= {"teacher_url": ["grpc://nowhere:1"], "steps": 1, "max_new_tokens": 256, "name": "run"}
    teacher = Listening(runs.models / "teacher")
    assert runs.train(teacher, **settings) == 0
    decode = load_student(caller, device="cpu").tokenizer.decode
    texts = [decode(sequence.completion_ids) for sequence in teacher.asked]
    calls = [
        text
        for text in texts
        if '"6*7"}}</tool_call><|end|><|start|>tool\n42<|end|><|start|>assistant\n42<|end|>' in text
    ]
    assert len(calls) >= 2, texts
    assert runs.metrics()[0]["turns_mean"] > 1
