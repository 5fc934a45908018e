"""How good a student is on held-out prompts: exact match of its greedy completions, and its KL to its teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from vopd_client.held_out_kl import KlMeasurement, kl_of_tokens, sample_and_send
from vopd_client.prompts import Prompt
from vopd_client.rollouts.decoding import MixedPrecision
from vopd_client.rollouts.transformers import greedy
from vopd_client.student import StudentForTraining
from vopd_client.teacher_greedy import greedy_by_scoring
from vopd_client.types import SequenceScores, Teacher
from vopd_client.verify import matches
from vopd_proto.arrays import IntArray

__all__ = [
    "Evaluation", "KlMeasurement", "Sample",
    "completion_text", "evaluate_student", "evaluate_teachers", "judge", "spread_over_kinds", "summarise",
]  # fmt: skip

NO_KIND = "all"  # what rows without a kind are counted under

Who = Literal["student", "teacher"]
ValueOfPrompt = tuple[Prompt, float]


@dataclass(frozen=True)
class Sample:
    """A greedy completion, to show people; `correct` is None for a prompt without an answer."""

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

    def to_row(self) -> dict[str, Any]:
        """The row of evals.jsonl."""
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
) -> Evaluation:
    """Greedy completions against the answers, and the KL to the teachers where `kl` says how.

    Teachers score the sampled completions while the greedy ones are written. The student is left as it was.
    """
    sent = [] if kl is None else sample_and_send(kl, prompts)
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
    if prompt.answer is None or prompt.verifier == "regex":
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
        correct = None
        if prompt.answer is not None:
            assert prompt.verifier is not None, "an answer comes with a verifier"
            correct = matches(text, prompt.answer, prompt.verifier)
        samples.append(Sample(prompt.text, text, prompt.answer, correct, prompt.kind))
    return samples


def completion_text(tokenizer: Any, completion_ids: IntArray, end_ids: frozenset[int]) -> str:
    """The completion without its end token and without special tokens."""
    ids = completion_ids.tolist()
    if ids and ids[-1] in end_ids:
        ids = ids[:-1]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def summarise(
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    completions: Sequence[IntArray],
    *,
    step: int,
    who: Who,
    kl_by_token: Sequence[ValueOfPrompt],
    sample_count: int,
) -> Evaluation:
    """Means over all, by kind and by teacher; `samples` are one a prompt, and `sample_count` of them are shown."""
    judged = [
        (prompt, float(sample.correct))
        for prompt, sample in zip(prompts, samples, strict=True)
        if sample.correct is not None
    ]
    shown = spread_over_kinds([sample.kind for sample in samples], sample_count)
    return Evaluation(
        step=step,
        who=who,
        exact_match=_mean(judged),
        exact_match_by_kind=_means(judged, by=kind_of),
        num_prompts=len(samples),
        kl_nats=_mean(kl_by_token),
        kl_by_kind=_means(kl_by_token, by=kind_of),
        exact_match_by_teacher=_means(judged, by=teacher_of),
        kl_by_teacher=_means(kl_by_token, by=teacher_of),
        samples=tuple(samples[position] for position in shown),
        completion_ids=tuple(completions),
    )


def kind_of(prompt: Prompt) -> str:
    return prompt.kind or NO_KIND


def teacher_of(prompt: Prompt) -> str:
    """Empty: it has no name, and nothing of its own to say."""
    return prompt.teacher


def spread_over_kinds(kinds: Sequence[str | None], count: int) -> list[int]:
    """Positions of `count` rows, the kinds taking turns, each in its order: the same rows at every evaluation."""
    order = list(dict.fromkeys(kinds))
    seen: dict[str | None, int] = dict.fromkeys(order, 0)
    ranked: list[tuple[int, int, int]] = []  # (how many of its kind came before, its kind, position)
    for position, kind in enumerate(kinds):
        ranked.append((seen[kind], order.index(kind), position))
        seen[kind] += 1
    return [position for _, _, position in sorted(ranked)[:count]]


def _mean(values: Sequence[ValueOfPrompt]) -> float | None:
    return float(np.mean([value for _, value in values])) if values else None


def _means(values: Sequence[ValueOfPrompt], *, by: Callable[[Prompt], str]) -> dict[str, float]:
    """In the order in which the groups first appear; a group without a name is left out."""
    grouped: dict[str, list[float]] = {}
    for prompt, value in values:
        if group := by(prompt):
            grouped.setdefault(group, []).append(value)
    return {group: float(np.mean(numbers)) for group, numbers in grouped.items()}
