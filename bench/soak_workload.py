"""What the soak asks, and how it tells a right answer from another one. Pure.

An answer of a busy teacher is compared with what the same sequence scored alone. In 16 bits the two differ, since a
forward of another shape rounds otherwise: by a tenth of a nat or so in the mean over a sequence. Scores of another
sequence, or one's own a row later, differ by nats. `Power` measures that on the pool itself, so that the tolerance is
known to tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore, Support, TeacherTopK

Kind = Literal["short", "few-shot", "long completion", "long context"]

GROUP_SIZE = 8
TOP_K = 20
MOST_CANDIDATES = 100
# Of one sequence: mean absolute difference, of the sampled log-probabilities and of the support's apart; of fewer rows
# than these together, since a single number is off by more.
TOLERANCE_NATS = 0.2
ROWS_APART = 8
# Of the teacher's own top-k: share of the reference's ids. Near ties change places at the end of the list.
LEAST_IDS_SHARED = 0.75


@dataclass(frozen=True)
class Shape:
    """`groups` contexts of one of `context_tokens`, and `group_size` completions of each, of `completion_tokens`."""

    kind: Kind
    groups: int
    group_size: int
    context_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]


# Few lengths, so that many sequences are alike but for their ids: an exchange between them is only seen in numbers.
POOL = (
    Shape("short", 60, 1, (20, 40, 64), (1, 12, 32)),
    Shape("few-shot", 12, GROUP_SIZE, (160, 240), (8, 16, 16)),
    Shape("long completion", 10, 1, (40,), (128, 256)),
    Shape("long context", 5, 1, (1024, 1900), (16, 64)),
)


@dataclass(frozen=True)
class Reference:
    """A sequence of the pool, and what it scored alone. group: equal where contexts are."""

    kind: Kind
    group: int
    sequence: SequenceToScore
    scores: SequenceScores

    @property
    def num_tokens(self) -> int:
        return len(self.sequence.context_ids) + len(self.sequence.completion_ids)


def make_pool(rng: np.random.Generator, vocab_size: int) -> list[tuple[Kind, int, SequenceToScore]]:
    """Kind, group and sequence: random ids, every support in turn."""
    made: list[tuple[Kind, int, SequenceToScore]] = []
    group = 0
    for shape in POOL:
        for number in range(shape.groups):
            context_ids = rng.integers(vocab_size, size=shape.context_tokens[number % len(shape.context_tokens)])
            for _ in range(shape.group_size):
                length = int(rng.choice(shape.completion_tokens))
                support = _support(len(made), length, rng, vocab_size)
                completion_ids = rng.integers(vocab_size, size=length)
                made.append((shape.kind, group, SequenceToScore(context_ids, completion_ids, support)))
            group += 1
    return made


def _support(number: int, length: int, rng: np.random.Generator, vocab_size: int) -> Support:
    """A single row without a support would be one number, which tells little: it asks for the top-k."""
    if length == 1 or number % 3 == 1:
        return TeacherTopK(TOP_K)
    if number % 3 == 0:
        return NoSupport()
    counts_T = rng.integers(MOST_CANDIDATES + 1, size=length)  # ragged, now and then none at all
    return Candidates(rng.integers(vocab_size, size=int(counts_T.sum())), counts_T)


def units_of(pool: Sequence[Reference], kinds: frozenset[Kind]) -> dict[Kind, list[list[int]]]:
    """What is asked together, as indices into the pool: a group of completions, or one sequence."""
    by_group: dict[int, list[int]] = {}
    for index, reference in enumerate(pool):
        by_group.setdefault(reference.group, []).append(index)
    units: dict[Kind, list[list[int]]] = {}
    for indices in by_group.values():
        if (kind := pool[indices[0]].kind) in kinds:
            units.setdefault(kind, []).append(indices)
    return units


def draw(rng: np.random.Generator, units: dict[Kind, list[list[int]]]) -> list[int]:
    """Every kind as often; of a group two or more of its completions, or as many as it has."""
    of_kind = units[sorted(units)[int(rng.integers(len(units)))]]
    unit = of_kind[int(rng.integers(len(of_kind)))]
    size = int(rng.integers(min(2, len(unit)), len(unit) + 1))
    return [int(index) for index in rng.permutation(unit)[:size]]


# ---------------------------------------------------------------- is it the right answer?


@dataclass(frozen=True)
class Distance:
    """Of an answer from another one, in nats; infinite where they do not even have the same shape.

    ids_shared: of the other's support ids, row by row; 1 without a support.
    """

    mean_nats: float  # the larger of the two: in one mean a hundred ids a row would drown the sampled one
    ids_shared: float
    largest_nats: float

    @property
    def is_right(self) -> bool:
        return self.mean_nats <= TOLERANCE_NATS and self.ids_shared >= LEAST_IDS_SHARED


APART = Distance(float("inf"), 0.0, float("inf"))


def distance(found: SequenceScores, reference: Reference) -> Distance:
    """Row by row. A support is compared place by place: what the teacher lists is sorted, so ties do no harm."""
    right = reference.scores
    if not have_one_shape(found, right):
        return APART
    sampled = _absolute(found.sampled_logprobs_T, right.sampled_logprobs_T)
    support = _absolute(found.support_logprobs, right.support_logprobs)
    parts = [sampled, support] if len(sampled) >= ROWS_APART else [np.concatenate((sampled, support))]
    return Distance(
        mean_nats=max((float(part.mean()) for part in parts if len(part)), default=0.0),
        # Candidates' ids do not come with the answer: the client puts down those that it asked for.
        ids_shared=_ids_shared(found, right) if isinstance(reference.sequence.support, TeacherTopK) else 1.0,
        largest_nats=float(max(sampled.max(initial=0.0), support.max(initial=0.0))),
    )


def have_one_shape(one: SequenceScores, other: SequenceScores) -> bool:
    """Whether one could be taken for the other: what has another shape the client refuses by itself."""
    return len(one.sampled_logprobs_T) == len(other.sampled_logprobs_T) and len(one.support_logprobs) == len(
        other.support_logprobs
    )


def _absolute(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(np.float64) - other.astype(np.float64))


def _ids_shared(one: SequenceScores, other: SequenceScores) -> float:
    """[T, k] both."""
    num_rows = len(one.sampled_logprobs_T)
    rows, other_rows = (scores.support_ids.reshape(num_rows, -1).tolist() for scores in (one, other))
    shared = sum(len({*row} & {*other_row}) for row, other_row in zip(rows, other_rows, strict=True))
    return shared / len(other.support_ids)


def shifted(scores: SequenceScores) -> SequenceScores:
    """The same numbers a row later, as an answer would be that is off by one; the last row comes first."""
    starts = np.cumsum(scores.counts_T)
    last = int(scores.counts_T[-1]) if len(starts) else 0
    return SequenceScores(
        np.roll(scores.sampled_logprobs_T, 1),
        np.roll(scores.support_ids, last),
        np.roll(scores.support_logprobs, last),
        scores.counts_T,
    )


@dataclass(frozen=True)
class Power:
    """What would be noticed, of all pairs of sequences that could be taken for one another, and of all shifted answers.

    num_told_by_ids: wrong answers that list other ids of the teacher's own than the right one.
    least_nats: of the others, the least distance. num_unnoticed: those that the check would take for right.
    """

    num_swapped: int
    num_shifted: int
    num_told_by_ids: int
    least_nats: float
    num_unnoticed: int


def power(pool: Sequence[Reference]) -> Power:
    """Over every pair of the pool, and every sequence of two rows or more against itself a row later."""
    swapped = [
        distance(other.scores, one)
        for index, one in enumerate(pool)
        for other in pool[:index]
        if have_one_shape(one.scores, other.scores) and type(one.sequence.support) is type(other.sequence.support)
    ]
    shifts = [distance(shifted(one.scores), one) for one in pool if len(one.scores.sampled_logprobs_T) > 1]
    by_numbers = [found for found in (*swapped, *shifts) if found.ids_shared >= LEAST_IDS_SHARED]
    return Power(
        num_swapped=len(swapped),
        num_shifted=len(shifts),
        num_told_by_ids=len(swapped) + len(shifts) - len(by_numbers),
        least_nats=min((found.mean_nats for found in by_numbers), default=float("inf")),
        num_unnoticed=sum(found.is_right for found in by_numbers),
    )
