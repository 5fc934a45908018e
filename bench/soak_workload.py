"""What the soak asks, and how it tells a right answer from another sequence's. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK

# Context length, completions of it, their length.
SHAPES = ((20, 1, 12), (60, 1, 40), (256, 8, 48), (300, 8, 24), (900, 4, 64), (1800, 1, 128), (40, 1, 250), (8, 1, 1))
CONTEXTS_OF_A_SHAPE = 4
TOLERANCE_NATS = 0.2  # mean of a sequence: 16-bit kernels of other batch shapes differ by hundredths


@dataclass(frozen=True)
class Reference:
    """A sequence, and what it scored alone."""

    sequence: SequenceToScore
    scores: SequenceScores


def make_pool(rng: np.random.Generator, vocab_size: int) -> list[SequenceToScore]:
    """Random ids, in groups that share a context; every support in turn."""
    pool = []
    for context_length, group_size, completion_length in SHAPES:
        for _ in range(CONTEXTS_OF_A_SHAPE):
            context_ids = rng.integers(vocab_size, size=context_length)
            for _ in range(group_size):
                counts_T = rng.integers(0, 101, size=completion_length)
                candidates = Candidates(rng.integers(vocab_size, size=int(counts_T.sum())), counts_T)
                support = (NoSupport(), TeacherTopK(20), candidates)[len(pool) % 3]
                completion_ids = rng.integers(vocab_size, size=completion_length)
                pool.append(SequenceToScore(context_ids, completion_ids, support))
    return pool


def draw(rng: np.random.Generator, pool: list[Reference]) -> list[Reference]:
    """A batch: neighbours, so that some share a context."""
    start, size = int(rng.integers(len(pool))), int(rng.integers(1, 13))
    return [pool[(start + offset) % len(pool)] for offset in range(size)]


def distance_nats(one: SequenceScores, other: SequenceScores) -> float:
    """Mean absolute difference of the sampled log-probabilities, or of the support's where that is larger.

    Infinite where there are not as many. Of a support of the teacher's own ids the near ties may change places, which
    makes no difference to the log-probabilities in their order.
    """
    pairs = (
        (one.sampled_logprobs_T, other.sampled_logprobs_T),
        (one.support_logprobs, other.support_logprobs),
    )
    if any(left.shape != right.shape for left, right in pairs):
        return float("inf")
    means = [np.abs(left.astype(np.float64) - right).mean() for left, right in pairs if len(left)]
    return float(np.max(means))


def smallest_distance(pool: list[Reference]) -> float:
    """Between two different sequences that could be taken for one another by their shapes."""
    found = [
        distance_nats(one.scores, other.scores)
        for index, one in enumerate(pool)
        for other in pool[:index]
        if isinstance(one.sequence.support, type(other.sequence.support))
    ]
    return min(found)


@dataclass
class Tally:
    """What was asked and what came of it. refused: as it should be, by why."""

    calls: Counter[str]
    num_right: int = 0
    num_wrong: int = 0
    num_given_up: int = 0
    num_tokens: int = 0
    num_scored_tokens: int = 0
    largest_distance_nats: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def took(self, kind: str, seconds: float) -> None:
        """A batch was answered."""
        self.calls[kind] += 1
        self.seconds.setdefault(kind, []).append(seconds)

    def check(self, reference: Reference, scores: SequenceScores) -> None:
        distance = distance_nats(scores, reference.scores)
        self.largest_distance_nats = max(self.largest_distance_nats, distance)
        if distance <= TOLERANCE_NATS:
            self.num_right += 1
        else:
            self.num_wrong += 1
        sequence = reference.sequence
        self.num_scored_tokens += len(sequence.completion_ids)
        self.num_tokens += len(sequence.context_ids) + len(sequence.completion_ids)
