"""Evaluation on a tiny model: the numbers are those of a plain forward, and a teacher that only scores decodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tiny_model import write_tiny_model
from vopd_client.batch import collate
from vopd_client.command_config import EvalConfig
from vopd_client.errors import DataError
from vopd_client.eval_command import run_eval
from vopd_client.evaluation import Evaluation, evaluate_student, evaluate_teachers, spread_over_kinds
from vopd_client.handshake import IdSwap
from vopd_client.held_out_kl import KlMeasurement
from vopd_client.prompts import Prompt
from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.transformers import RolloutSampler, greedy
from vopd_client.scoring import Request, SentRollout
from vopd_client.student import LoadedStudent, load_student
from vopd_client.teacher_greedy import accept, greedy_by_scoring, guess_next
from vopd_client.teaching_plan import TeachingPlan
from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore, TeacherInfo, TeacherTopK

MAX_NEW_TOKENS = 12


class ModelTeacher:
    """A teacher that runs one plain forward a sequence, in this process; answers only when `answer_all` is called,
    or at once."""

    def __init__(self, directory: Path, end_ids: Sequence[int], *, answers_at_once: bool = True) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.end_ids = tuple(end_ids)
        self.answers_at_once = answers_at_once
        self.asked: list[tuple[SequenceToScore, Future[SequenceScores]]] = []

    @property
    def info(self) -> TeacherInfo:
        return TeacherInfo(
            model_id="tiny", model_revision="0", fingerprint="", num_ids=259, begin_id=None, end_ids=self.end_ids,
            pad_id=None, chat_template="", vocab_size=259, hidden_size=32, max_context_length=4096, dtype="float32",
            engine="test", engine_version="0", server_version="0",
            supports=frozenset({"sampled", "teacher_top_k", "candidates"}), any_temperature=True, deterministic=True,
            max_sequences_per_request=8, max_tokens_per_request=4096, max_support_size=100, head_sha256="",
        )  # fmt: skip

    bytes_sent = bytes_received = 0
    waiting_reason = ""

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        future: Future[SequenceScores] = Future()
        self.asked.append((sequence, future))
        if self.answers_at_once:
            future.set_result(self.score(sequence))
        return future

    def close(self) -> None: ...

    def logprobs_TV(self, context_ids: np.ndarray, completion_ids: np.ndarray) -> torch.Tensor:
        """[T, V] of the distribution that each completion token was drawn from."""
        ids = torch.from_numpy(np.concatenate([context_ids, completion_ids]))[None]
        with torch.no_grad():
            logits = self.model(ids).logits[0].float()
        return logits.log_softmax(-1)[len(context_ids) - 1 : -1]

    def score(self, sequence: SequenceToScore) -> SequenceScores:
        logprobs_TV = self.logprobs_TV(sequence.context_ids, sequence.completion_ids)
        rows = torch.arange(len(sequence.completion_ids))
        sampled = logprobs_TV[rows, torch.from_numpy(sequence.completion_ids)].numpy()
        match sequence.support:
            case TeacherTopK(k=k):
                top = logprobs_TV.topk(k)
                counts = np.full(len(rows), k)
                return SequenceScores(sampled, top.indices.flatten().numpy(), top.values.flatten().numpy(), counts)
            case Candidates(ids=ids, counts_T=counts):
                flat = logprobs_TV[np.repeat(np.arange(len(rows)), counts), ids].numpy()
                return SequenceScores(sampled, ids, flat, counts)
            case NoSupport():
                nothing = np.zeros(len(rows), np.int64)
                return SequenceScores(sampled, np.empty(0, np.int64), np.empty(0, np.float32), nothing)


@pytest.fixture(scope="module")
def student(tiny_model_dir: Path) -> LoadedStudent:
    return load_student(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def make_prompts(tokenizer: Any, texts: Sequence[str], **common: Any) -> list[Prompt]:
    return [
        Prompt(
            index=index,
            source=f"data.jsonl:{index + 1}",
            student_ids=np.array(tokenizer(text).input_ids),
            teacher_ids=np.array(tokenizer(f"Hint. {text}").input_ids),
            text=text,
            **({"answer": None, "verifier": None, "kind": None} | common),
        )
        for index, text in enumerate(texts)
    ]


def evaluate(student: LoadedStudent, prompts: Sequence[Prompt], **overrides: Any) -> Evaluation:
    settings = {
        "step": 5,
        "end_ids": student.end_ids,
        "pad_id": student.pad_id,
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": 4,
        "sample_count": 2,
    }
    return evaluate_student(student.module, student.tokenizer, prompts, **(settings | overrides))


# ---------------------------------------------------------------- exact match


def test_exact_match_is_the_share_of_right_greedy_completions_by_kind(student: LoadedStudent) -> None:
    texts = ["one", "two", "three", "four", "five"]
    prompts = make_prompts(student.tokenizer, texts)
    said = evaluate(student, prompts, sample_count=5).samples
    answers = [said[0].completion, "wrong", said[2].completion, said[3].completion, None]
    kinds = ["a", "a", "b", None, "b"]
    prompts = [
        make_prompts(student.tokenizer, texts, answer=answer, verifier="exact" if answer else None, kind=kind)[index]
        for index, (answer, kind) in enumerate(zip(answers, kinds, strict=True))
    ]
    evaluation = evaluate(student, prompts)
    assert evaluation.exact_match == pytest.approx(3 / 4)
    assert evaluation.exact_match_by_kind == {"a": 0.5, "b": 1.0, "all": 1.0}
    assert evaluation.num_prompts == 5
    assert evaluation.kl_nats is None
    row = json.loads(json.dumps(evaluation.to_row()))
    assert (row["step"], row["who"], row["exact_match"]) == (5, "student", 0.75)
    assert row["samples"][0] == {
        "prompt": "one", "completion": answers[0], "answer": answers[0], "correct": True, "kind": "a",
    }  # fmt: skip


def test_samples_take_turns_between_kinds() -> None:
    assert spread_over_kinds(["a", "a", "a", "b", "b", "c"], 5) == [0, 3, 5, 1, 4]
    assert spread_over_kinds(["a", None], 9) == [0, 1]


def test_without_answers_there_is_no_exact_match(student: LoadedStudent) -> None:
    evaluation = evaluate(student, make_prompts(student.tokenizer, ["x"]))
    assert evaluation.exact_match is None
    assert evaluation.samples[0].correct is None


# ---------------------------------------------------------------- KL


def measurement(student: LoadedStudent, teacher: ModelTeacher, *, top_k: int, support_mass: float) -> KlMeasurement:
    request = Request("student", top_k, IdSwap(None), frozenset())

    def receive(sent: SentRollout) -> SequenceScores:
        if not teacher.answers_at_once:
            for sequence, future in teacher.asked:
                if not future.done():
                    future.set_result(teacher.score(sequence))
        return sent.answer.result()

    def make_batch(_request: Request, sent: Sequence[SentRollout], scores: Sequence[SequenceScores]) -> Any:
        rollouts, names = [item.rollout for item in sent], [item.prompt.source for item in sent]
        return collate(rollouts, scores, prompt_names=names, pad_id=student.pad_id, num_shared_ids=student.vocab_size)

    sampler = RolloutSampler(
        student.module.model, num_shared_ids=student.vocab_size, end_ids=student.end_ids, pad_id=student.pad_id,
        max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, top_k=top_k, support_mass=support_mass, seed=7, batch_size=4,
    )  # fmt: skip
    plan = TeachingPlan("", teacher, request, request)  # type: ignore[arg-type]
    return KlMeasurement({"": plan}, sampler, make_batch, 64, receive)


def test_the_kl_of_a_full_support_is_the_mean_exact_kl_over_the_sampled_tokens(
    student: LoadedStudent, tiny_model_dir: Path, teacher_dir: Path
) -> None:
    teacher = ModelTeacher(teacher_dir, student.end_ids, answers_at_once=False)
    prompts = [
        make_prompts(student.tokenizer, ["one", "two", "three"], kind=kind)[index]
        for index, kind in enumerate(["a", "b", "b"])
    ]
    kl = measurement(student, teacher, top_k=student.vocab_size, support_mass=1.0)
    evaluation = evaluate(student, prompts, kl=kl)

    student_model = ModelTeacher(tiny_model_dir, student.end_ids)
    exact: dict[str, list[float]] = {"a": [], "b": []}
    for prompt in prompts:
        (rollout,) = kl.sampler.sample([(RolloutKey(0, prompt.index, 0), prompt.student_ids)])
        pi_TV = student_model.logprobs_TV(prompt.student_ids, rollout.completion_ids)
        q_TV = teacher.logprobs_TV(prompt.teacher_ids, rollout.completion_ids)
        exact[str(prompt.kind)] += (pi_TV.exp() * (pi_TV - q_TV)).sum(-1).tolist()
    assert evaluation.kl_nats == pytest.approx(np.mean(exact["a"] + exact["b"]), abs=1e-4)
    assert evaluation.kl_by_kind == {kind: pytest.approx(np.mean(values), abs=1e-4) for kind, values in exact.items()}
    assert evaluation.kl_nats is not None
    assert evaluation.kl_nats > 0.1  # another model, another context: there was something to measure


def test_a_small_support_gives_a_lower_bound_of_the_kl(student: LoadedStudent, teacher_dir: Path) -> None:
    teacher = ModelTeacher(teacher_dir, student.end_ids)
    prompts = make_prompts(student.tokenizer, ["one", "two", "three"])
    values = [
        evaluate(student, prompts, kl=measurement(student, teacher, top_k=k, support_mass=1.0)).kl_nats
        for k in (2, 20, student.vocab_size)
    ]
    assert all(value is not None for value in values)
    assert 0 < values[0] < values[1] < values[2]  # type: ignore[operator]


def test_every_rollout_is_sent_before_any_answer_is_waited_for(student: LoadedStudent, teacher_dir: Path) -> None:
    teacher = ModelTeacher(teacher_dir, student.end_ids, answers_at_once=False)
    kl = measurement(student, teacher, top_k=5, support_mass=1.0)
    asked_at_first_wait: list[int] = []

    def receive(sent: SentRollout) -> SequenceScores:
        asked_at_first_wait.append(len(teacher.asked))
        return kl.receive(sent)

    prompts = make_prompts(student.tokenizer, ["a", "b", "c", "d", "e"])
    evaluate(student, prompts, kl=replace(kl, receive=receive))
    assert asked_at_first_wait[0] == 5


def test_evaluating_twice_gives_the_same_row_and_leaves_the_student_alone(
    student: LoadedStudent, teacher_dir: Path
) -> None:
    kl = measurement(student, ModelTeacher(teacher_dir, student.end_ids), top_k=5, support_mass=1.0)
    prompts = make_prompts(student.tokenizer, ["one", "two"])
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert evaluate(student, prompts, kl=kl).to_row() == evaluate(student, prompts, kl=kl).to_row()
    assert torch.equal(torch.get_rng_state(), state)
    assert student.module.training
    assert all(torch.equal(value, before[name]) for name, value in student.module.state_dict().items())
    assert all(parameter.grad is None for parameter in student.module.parameters())


# ---------------------------------------------------------------- the teacher's own answers


def decoded_greedily(teacher: ModelTeacher, prompts: Sequence[Prompt], max_new_tokens: int) -> list[np.ndarray]:
    return greedy(
        teacher.model, [prompt.teacher_ids for prompt in prompts], end_ids=frozenset(teacher.end_ids), pad_id=0,
        max_new_tokens=max_new_tokens, num_shared_ids=259, batch_size=1,
    )  # fmt: skip


TEXTS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 24])
def test_scoring_alone_decodes_what_greedy_decoding_does_whatever_the_drafts(
    student: LoadedStudent, teacher_dir: Path, max_new_tokens: int
) -> None:
    teacher = ModelTeacher(teacher_dir, student.end_ids)
    prompts = make_prompts(student.tokenizer, TEXTS)
    expected = decoded_greedily(teacher, prompts, max_new_tokens)
    contexts = [prompt.teacher_ids for prompt in prompts]
    random = np.random.default_rng(0)
    nonsense = [[random.integers(0, 259, 9), random.integers(0, 259, 40)] for _ in prompts]
    half_right = [[np.append(ids[: len(ids) // 2], random.integers(0, 259, 5))] for ids in expected]
    for drafts in ([[] for _ in prompts], nonsense, half_right, [[ids] for ids in expected]):
        found, cost = greedy_by_scoring(
            teacher, contexts, drafts, end_ids=frozenset(teacher.end_ids), max_new_tokens=max_new_tokens
        )
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
        assert 1 <= cost.rounds <= max_new_tokens


def test_a_right_draft_needs_one_round_and_no_more_tokens_than_it_has(
    student: LoadedStudent, teacher_dir: Path
) -> None:
    teacher = ModelTeacher(teacher_dir, student.end_ids)
    prompts = make_prompts(student.tokenizer, TEXTS)
    expected = decoded_greedily(teacher, prompts, 10)
    _, cost = greedy_by_scoring(
        teacher, [p.teacher_ids for p in prompts], [[ids] for ids in expected],
        end_ids=frozenset(teacher.end_ids), max_new_tokens=10,
    )  # fmt: skip
    assert (cost.rounds, cost.requests) == (1, len(prompts))
    assert cost.tokens == sum(len(p.teacher_ids) + 10 for p in prompts)
    assert all(len(sequence.completion_ids) <= 10 for sequence, _ in teacher.asked)


def test_a_teacher_s_ending_ends_its_answer(student: LoadedStudent, teacher_dir: Path) -> None:
    teacher = ModelTeacher(teacher_dir, student.end_ids)
    prompts = make_prompts(student.tokenizer, TEXTS)
    unended = decoded_greedily(teacher, prompts, 10)
    teacher.end_ids = (int(unended[0][4]), int(unended[1][0]))  # make it end where it is known to pass
    expected = decoded_greedily(teacher, prompts, 10)
    evaluation = evaluate_teachers(
        {"": teacher},
        student.tokenizer,
        prompts,
        step=0,
        max_new_tokens=10,
        sample_count=7,
        student_completions=unended,
    )
    assert [ids.tolist() for ids in evaluation.completion_ids] == [ids.tolist() for ids in expected]
    assert len(evaluation.completion_ids[1]) == 1
    assert evaluation.samples[1].completion == ""
    assert evaluation.who == "teacher"
    assert evaluation.kl_nats is None


def test_the_reference_answer_is_the_first_draft(student: LoadedStudent, teacher_dir: Path) -> None:
    teacher = ModelTeacher(teacher_dir, student.end_ids)
    (prompt,) = make_prompts(student.tokenizer, ["one"], answer="forty-two", verifier="contains")
    evaluate_teachers({"": teacher}, student.tokenizer, [prompt], step=0, max_new_tokens=12, sample_count=1)
    drafted = teacher.asked[0][0].completion_ids
    assert student.tokenizer.decode(drafted[:10]) == "forty-two<|end|>"
    assert len(drafted) == 11  # and one more row, to go on from if all of it is right


def test_rows_after_the_first_difference_say_nothing() -> None:
    ends = frozenset({0})
    assert accept(np.array([5, 6, 7]), np.array([5, 9, 7]), ends) == [5, 9]
    assert accept(np.array([5, 6, 7]), np.array([5, 6, 7]), ends) == [5, 6, 7]
    assert accept(np.array([5, 0, 7]), np.array([5, 0, 7]), ends) == [5, 0]


@pytest.mark.parametrize(
    ("found", "drafts", "expected"),
    [
        ([], [[1, 2], [3]], [1, 2]),
        ([1], [[1, 2, 3]], [2, 3]),
        ([9, 1], [[1, 2, 3]], [2, 3]),
        ([9, 1, 2], [[7, 2, 4], [1, 2, 3]], [3]),
        ([9], [[1, 2, 3]], []),
        ([1, 2], [[1, 2]], []),
        ([], [], []),
    ],
)
def test_a_guess_goes_on_from_the_longest_match(found: list[int], drafts: list[list[int]], expected: list[int]) -> None:
    assert guess_next(found, drafts) == expected


# ---------------------------------------------------------------- the command


def write_prompts(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_the_eval_command_prints_a_table_and_writes_json(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "[one]"}], "teacher_prompt": "1", "answer": ".", "verifier": "regex"},
        {"prompt": "two", "answer": "never said", "kind": "hard", "teacher": "math"},
    ]
    screen = StringIO()
    config = EvalConfig(
        model=str(tiny_model_dir), prompts=write_prompts(tmp_path / "data.jsonl", *rows), max_new_tokens=5,
        device="cpu", json_file=tmp_path / "result.json",
    )  # fmt: skip
    evaluation = run_eval(config, Console(file=screen, width=120))
    assert evaluation.exact_match_by_kind == {"all": 1.0, "hard": 0.0}
    assert "50.0%" in screen.getvalue()
    assert "[one]" in screen.getvalue()
    assert "wrong, expected 'never said'" in screen.getvalue()
    written = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert written["exact_match"] == 0.5
    assert written["exact_match_by_teacher"] == {"math": 0.0}  # of rows that name one
    assert len(written["samples"]) == 2

    as_teacher = run_eval(config.model_copy(update={"as_teacher": True}), Console(file=StringIO()))
    assert as_teacher.samples[0].prompt == "1"
    assert as_teacher.samples[1] == evaluation.samples[1]  # a row without a context for the teacher


def test_the_eval_command_refuses_bad_prompts_before_it_loads_a_model(tmp_path: Path) -> None:
    def config(*rows: dict[str, Any]) -> EvalConfig:
        prompts = write_prompts(tmp_path / "data.jsonl", *rows)
        return EvalConfig(model=str(tmp_path / "no model here"), prompts=prompts)

    with pytest.raises(DataError, match=r"data\.jsonl:2: unknown key 'promt'"):
        run_eval(config({"prompt": "a", "answer": "b"}, {"promt": "a"}))
    with pytest.raises(DataError, match="no row has an answer"):
        run_eval(config({"prompt": "a"}))
