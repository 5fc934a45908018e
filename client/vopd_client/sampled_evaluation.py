"""How good a model is when it is asked several times: avg@n, pass@n and maj@n over sampled completions.

Axes: P prompts, N samples of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vopd_client.judging import NO_KIND, completion_text, is_right, questions_hash, spread_over_kinds
from vopd_client.prompts import Prompt
from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.decoding import MixedPrecision
from vopd_client.rollouts.samples import sample_completions
from vopd_client.sampled_metrics import (
    INTERVAL_METHOD,
    Estimate,
    avg_at_n,
    estimate,
    maj_at_n,
    majority,
    pass_at_n,
)
from vopd_client.student import StudentForTraining
from vopd_client.verify import extract_answer, same_answer


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; see `truncate` for top_k and top_p."""

    samples_per_prompt: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass(frozen=True)
class Scores:
    """The three measures over some prompts, each with its interval."""

    num_prompts: int
    avg_at_n: Estimate
    pass_at_n: Estimate
    maj_at_n: Estimate


@dataclass(frozen=True)
class JudgedPrompt:
    """What the samples of one prompt answered. answers: as extracted, None where there was none.

    majority: the sample that speaks for the most common answer; None when no sample answered.
    """

    source: str
    prompt: str
    kind: str | None
    answer: str
    answers: tuple[str | None, ...]
    correct: tuple[bool, ...]
    majority: int | None
    first_completion: str
    teacher: str = ""

    @property
    def is_majority_right(self) -> bool:
        return self.majority is not None and self.correct[self.majority]


@dataclass(frozen=True)
class SampledEvaluation:
    """One model on one set of prompts with answers.

    num_cut: completions that reached the length limit without an end.
    shown: positions in `prompts` of those to be shown to people.
    scores_by_teacher: of the prompts of every teacher that has a name.
    """

    samples_per_prompt: int
    scores: Scores
    scores_by_kind: dict[str, Scores]
    num_cut: int
    prompts: tuple[JudgedPrompt, ...]
    shown: tuple[int, ...]
    scores_by_teacher: dict[str, Scores]

    @property
    def num_completions(self) -> int:
        return len(self.prompts) * self.samples_per_prompt

    def to_row(self) -> dict[str, Any]:
        """The scores, and what every sample answered; the completions themselves only of the prompts shown."""
        rows = [asdict(prompt) for prompt in self.prompts]
        for position, row in enumerate(rows):
            if position not in self.shown:
                del row["prompt"], row["first_completion"]
            if not row["teacher"]:
                del row["teacher"]
        return {**asdict(self.scores), **self.to_compact_row(), "per_prompt": rows}

    def to_compact_row(self) -> dict[str, Any]:
        """The scores, and of every prompt two numbers: its right samples, and whether the majority is right."""
        measures = asdict(self.scores)
        del measures["num_prompts"]
        return {
            "samples_per_prompt": self.samples_per_prompt,
            **measures,
            "interval": INTERVAL_METHOD,
            "by_kind": {kind: asdict(scores) for kind, scores in self.scores_by_kind.items()},
            "by_teacher": {teacher: asdict(scores) for teacher, scores in self.scores_by_teacher.items()},
            "num_completions": self.num_completions,
            "num_cut": self.num_cut,
            "questions_hash": questions_hash([(prompt.prompt, prompt.answer) for prompt in self.prompts]),
            "num_right": [sum(prompt.correct) for prompt in self.prompts],
            "majority_right": [int(prompt.is_majority_right) for prompt in self.prompts],
        }


def evaluate_sampled(
    student: StudentForTraining,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    sample_count: int,
    mixed_precision: MixedPrecision = "no",
) -> SampledEvaluation:
    """Samples every prompt that has an answer, of which there is at least one. The student is left as it was.

    Draws are keyed by the row of the prompt file, whatever other rows have no answer.

    Raises: NonFiniteError.
    """
    asked = [prompt for prompt in prompts if prompt.answer is not None]
    requests = [
        (RolloutKey(0, prompt.index, sample), prompt.student_ids)
        for prompt in asked
        for sample in range(sampling.samples_per_prompt)
    ]
    completions = sample_completions(
        student.model,
        requests,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        end_ids=end_ids,
        pad_id=pad_id,
        max_new_tokens=max_new_tokens,
        num_shared_ids=student.num_shared_ids,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
    )
    texts = [completion_text(tokenizer, ids, end_ids) for ids in completions]
    per_prompt = sampling.samples_per_prompt
    judged = [
        judge_samples(prompt, texts[place * per_prompt : (place + 1) * per_prompt])
        for place, prompt in enumerate(asked)
    ]
    return summarise_samples(
        judged,
        num_cut=sum(int(ids[-1]) not in end_ids for ids in completions),
        sample_count=sample_count,
    )


# ---------------------------------------------------------------- from completions to numbers


def judge_samples(prompt: Prompt, texts_N: Sequence[str]) -> JudgedPrompt:
    """Which samples are right, and what they answer by majority."""
    assert prompt.answer is not None
    assert prompt.verifier is not None, "an answer comes with a verifier"
    answers_N = [extract_answer(text, prompt.verifier) for text in texts_N]
    return JudgedPrompt(
        source=prompt.source,
        prompt=prompt.text,
        kind=prompt.kind,
        answer=prompt.answer,
        answers=tuple(None if answer is None else answer.text for answer in answers_N),
        correct=tuple(is_right(prompt, text) for text in texts_N),
        majority=majority(answers_N, same_answer),
        first_completion=texts_N[0],
        teacher=prompt.teacher,
    )


def summarise_samples(judged: Sequence[JudgedPrompt], *, num_cut: int, sample_count: int) -> SampledEvaluation:
    """Scores over all prompts, by kind and by teacher, each in the order in which they first appear."""
    return SampledEvaluation(
        samples_per_prompt=len(judged[0].correct),
        scores=score(judged),
        scores_by_kind=_scores_by([prompt.kind or NO_KIND for prompt in judged], judged),
        num_cut=num_cut,
        prompts=tuple(judged),
        shown=tuple(spread_over_kinds([prompt.kind for prompt in judged], sample_count)),
        scores_by_teacher=_scores_by([prompt.teacher for prompt in judged], judged),
    )


def _scores_by(groups: Sequence[str], judged: Sequence[JudgedPrompt]) -> dict[str, Scores]:
    """Of every group that has a name."""
    grouped: dict[str, list[JudgedPrompt]] = {}
    for group, prompt in zip(groups, judged, strict=True):
        if group:
            grouped.setdefault(group, []).append(prompt)
    return {group: score(prompts) for group, prompts in grouped.items()}


def score(judged: Sequence[JudgedPrompt]) -> Scores:
    correct_PN = np.array([prompt.correct for prompt in judged], np.bool_)
    return Scores(
        num_prompts=len(judged),
        avg_at_n=estimate(avg_at_n(correct_PN)),
        pass_at_n=estimate(pass_at_n(correct_PN)),
        maj_at_n=estimate(maj_at_n(correct_PN, [prompt.majority for prompt in judged])),
    )
