"""How good a student is on held-out prompts: exact match of its greedy completions or measures of sampled ones, and
its KL to its teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from vopd_client.held_out_kl import KlMeasurement, kl_of_tokens, sample_and_send
from vopd_client.judging import completion_text, is_right, kind_of, questions_hash, spread_over_kinds, teacher_of
from vopd_client.prompts import Prompt
from vopd_client.rollouts.decoding import MixedPrecision
from vopd_client.rollouts.transformers import greedy
from vopd_client.sampled_evaluation import SampledEvaluation, Sampling, evaluate_sampled
from vopd_client.student import StudentForTraining
from vopd_client.teacher_greedy import greedy_by_scoring
from vopd_client.types import SequenceScores, Teacher
from vopd_proto.arrays import IntArray

__all__ = [
    "Evaluation", "KlMeasurement", "Sample",
    "evaluate_student", "evaluate_teachers", "judge", "spread_over_kinds", "summarise",
]  # fmt: skip

Who = Literal["student", "teacher"]
ValueOfPrompt = tuple[Prompt, float]


@dataclass(frozen=True)
class Sample:
    """A greedy completion, or the first that was sampled, to show people; `correct` is None for a prompt without an
    answer."""

    prompt: str
    completion: str
    answer: str | None
    correct: bool | None
    kind: str | None


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of prompts.

    exact_match: share of the prompts with an answer that were answered right; None when no prompt has one.
    kl_nats: mean over the tokens of one sampled completion a prompt, see `KlMeasurement`; None: not measured.
    exact_match_by_teacher, kl_by_teacher: of the prompts of every teacher that has a name.
    right, questions_hash: of every prompt with an answer whether it was answered right, and which prompts these are.
    sampled: measures over several completions a prompt, in place of exact match.
    completion_ids: all greedy completions, end tokens included, in the prompts' order; not part of the row.
    """

    step: int
    who: Who
    exact_match: float | None
    exact_match_by_kind: dict[str, float]
    num_prompts: int
    kl_nats: float | None
    kl_by_kind: dict[str, float]
    exact_match_by_teacher: dict[str, float]
    kl_by_teacher: dict[str, float]
    samples: tuple[Sample, ...]
    completion_ids: tuple[IntArray, ...] = field(repr=False, compare=False)
    right: tuple[bool, ...] = ()
    questions_hash: str = ""
    sampled: SampledEvaluation | None = None

    def to_row(self) -> dict[str, Any]:
        """The row of evals.jsonl."""
        per_prompt = {"questions_hash": self.questions_hash, "num_right": [int(right) for right in self.right]}
        return {
            "step": self.step,
            "who": self.who,
            "exact_match": self.exact_match,
            "exact_match_by_kind": self.exact_match_by_kind,
            "num_prompts": self.num_prompts,
            "kl_nats": self.kl_nats,
            "kl_by_kind": self.kl_by_kind,
            "exact_match_by_teacher": self.exact_match_by_teacher,
            "kl_by_teacher": self.kl_by_teacher,
            "samples": [asdict(sample) for sample in self.samples],
            **(per_prompt if self.sampled is None else self.sampled.to_compact_row()),
        }


def evaluate_student(
    student: StudentForTraining,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    step: int,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    sample_count: int,
    mixed_precision: MixedPrecision = "no",
    kl: KlMeasurement | None = None,
    sampling: Sampling | None = None,
) -> Evaluation:
    """Greedy completions against the answers, and the KL to the teachers where `kl` says how.

    With `sampling` several completions of each prompt with an answer, of which there is one, in place of the greedy.
    Teachers score the completions of the KL while these are written. The student is left as it was.
    """
    sent = [] if kl is None else sample_and_send(kl, prompts)
    if sampling is not None:
        sampled = evaluate_sampled(
            student,
            tokenizer,
            prompts,
            sampling=sampling,
            end_ids=end_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            sample_count=sample_count,
            mixed_precision=mixed_precision,
        )
        return summarise(
            prompts,
            [],
            [],
            step=step,
            who="student",
            kl_by_token=[] if kl is None else kl_of_tokens(kl, student, sent, mixed_precision),
            sample_count=sample_count,
            sampled=sampled,
        )
    completions = greedy(
        student.model,
        [prompt.student_ids for prompt in prompts],
        end_ids=end_ids,
        pad_id=pad_id,
        max_new_tokens=max_new_tokens,
        num_shared_ids=student.num_shared_ids,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
    )
    kl_by_token = [] if kl is None else kl_of_tokens(kl, student, sent, mixed_precision)
    return summarise(
        prompts,
        judge(prompts, completions, tokenizer, end_ids),
        completions,
        step=step,
        who="student",
        kl_by_token=kl_by_token,
        sample_count=sample_count,
    )


def evaluate_teachers(
    teachers: Mapping[str, Teacher],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    step: int,
    max_new_tokens: int,
    sample_count: int,
    student_completions: Sequence[IntArray] = (),
    receive: Callable[[str, Future[SequenceScores]], SequenceScores] = lambda _name, answer: answer.result(),
) -> Evaluation:
    """What teachers answer greedily, each its own prompts in its own contexts, written by its scoring service.

    Args:
        teachers: by the names that prompts call them by; the prompts of others are left out.
        student_completions: of the same prompts (`Evaluation.completion_ids`); beside the reference answers they are
            the drafts that make this cheap, see `teacher_greedy`.
        receive: waits for an answer of the teacher of a name.
    """
    answered: dict[int, tuple[Sample, IntArray]] = {}
    for name, teacher in teachers.items():
        places = [place for place, prompt in enumerate(prompts) if prompt.teacher == name]
        own, end_ids = [prompts[place] for place in places], teacher.info.end_ids
        drafts = [_answer_drafts(prompt, tokenizer, end_ids) for prompt in own]
        if student_completions:
            for place, guesses in zip(places, drafts, strict=True):
                guesses.append(student_completions[place])
        completions, _ = greedy_by_scoring(
            teacher,
            [prompt.teacher_ids for prompt in own],
            drafts,
            end_ids=frozenset(end_ids),
            max_new_tokens=max_new_tokens,
            receive=partial(receive, name),
        )
        samples = judge(own, completions, tokenizer, frozenset(end_ids))
        answered |= dict(zip(places, zip(samples, completions, strict=True), strict=True))
    places = sorted(answered)
    return summarise(
        [prompts[place] for place in places],
        [answered[place][0] for place in places],
        [answered[place][1] for place in places],
        step=step,
        who="teacher",
        kl_by_token=[],
        sample_count=sample_count,
    )


def _answer_drafts(prompt: Prompt, tokenizer: Any, end_ids: Sequence[int]) -> list[IntArray]:
    """The reference answer and the end, where the answer is a text that could be the completion."""
    if prompt.answer is None or prompt.verifier in {"regex", "reasoning-gym"}:
        return []
    ids = tokenizer(prompt.answer, add_special_tokens=False).input_ids
    return [np.array([*ids, *end_ids[:1]], np.int64)]


# ---------------------------------------------------------------- from completions to numbers


def judge(
    prompts: Sequence[Prompt], completions: Sequence[IntArray], tokenizer: Any, end_ids: frozenset[int]
) -> list[Sample]:
    """What each completion says, and whether it is right."""
    samples = []
    for prompt, ids in zip(prompts, completions, strict=True):
        text = completion_text(tokenizer, ids, end_ids)
        correct = None if prompt.answer is None else is_right(prompt, text)
        samples.append(Sample(prompt.text, text, prompt.answer, correct, prompt.kind))
    return samples


def summarise(
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    completions: Sequence[IntArray],
    *,
    step: int,
    who: Who,
    kl_by_token: Sequence[ValueOfPrompt],
    sample_count: int,
    sampled: SampledEvaluation | None = None,
) -> Evaluation:
    """Means over all, by kind and by teacher; `samples` are one a prompt, and `sample_count` of them are shown.

    sampled: what there is in place of greedy samples, none of which are given then.
    """
    judged = []
    if sampled is None:
        pairs = zip(prompts, samples, strict=True)
        judged = [(prompt, float(sample.correct)) for prompt, sample in pairs if sample.correct is not None]
        shown = [samples[place] for place in spread_over_kinds([sample.kind for sample in samples], sample_count)]
    else:
        prompts_shown = (sampled.prompts[place] for place in sampled.shown)
        shown = [Sample(it.prompt, it.first_completion, it.answer, it.correct[0], it.kind) for it in prompts_shown]
    return Evaluation(
        step=step,
        who=who,
        exact_match=_mean(judged),
        exact_match_by_kind=_means(judged, by=kind_of),
        num_prompts=len(prompts),
        kl_nats=_mean(kl_by_token),
        kl_by_kind=_means(kl_by_token, by=kind_of),
        exact_match_by_teacher=_means(judged, by=teacher_of),
        kl_by_teacher=_means(kl_by_token, by=teacher_of),
        samples=tuple(shown),
        completion_ids=tuple(completions),
        right=tuple(bool(value) for _, value in judged),
        questions_hash=questions_hash([(prompt.text, prompt.answer or "") for prompt, _ in judged]),
        sampled=sampled,
    )


def _mean(values: Sequence[ValueOfPrompt]) -> float | None:
    return float(np.mean([value for _, value in values])) if values else None


def _means(values: Sequence[ValueOfPrompt], *, by: Callable[[Prompt], str]) -> dict[str, float]:
    """In the order in which the groups first appear; a group without a name is left out."""
    grouped: dict[str, list[float]] = {}
    for prompt, value in values:
        if group := by(prompt):
            grouped.setdefault(group, []).append(value)
    return {group: float(np.mean(numbers)) for group, numbers in grouped.items()}
