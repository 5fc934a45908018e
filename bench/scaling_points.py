"""What `make bench-scaling` measures: a base point, and one variable at a time away from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vopd_client.types import Candidates, SequenceToScore, TeacherTopK

SupportName = Literal["candidates", "teacher_top_k"]
Axis = Literal["context", "completion", "k", "group", "concurrency", "vocabulary"]


@dataclass(frozen=True)
class Point:
    """One workload. Lengths in tokens, k ids at every position, `concurrency` sequences outstanding at a time.

    vocabulary: rows of the model's output head.
    """

    context: int
    completion: int
    k: int
    group: int
    concurrency: int
    vocabulary: int
    support: SupportName = "candidates"

    @property
    def sequences_a_round(self) -> int:
        """Whole groups, and as many as may be outstanding. Both are powers of two, so the larger is a multiple."""
        return max(self.group, self.concurrency)

    @property
    def sharing(self) -> int:
        """Completions of one context that can be outstanding together: what the teacher can share it among."""
        return min(self.group, self.concurrency)

    @property
    def tokens_a_round(self) -> int:
        """Scored ones."""
        return self.sequences_a_round * self.completion


# Each value of a variable; the base point's is among them.
AXES: dict[Axis, tuple[int, ...]] = {
    "context": (64, 256, 1024, 2048, 4096),
    "completion": (16, 64, 256, 512, 1024),
    "k": (1, 10, 100, 1000),
    "group": (1, 2, 4, 8, 16, 32),
    "concurrency": (1, 2, 4, 8, 16, 32, 64),
    "vocabulary": (8_192, 49_152, 151_936),
}
BASE = Point(context=256, completion=64, k=100, group=8, concurrency=16, vocabulary=49_152)


@dataclass(frozen=True)
class Curve:
    """The points along one axis, in order."""

    axis: Axis
    support: SupportName
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return f"{self.axis} ({self.support})" if self.axis == "k" else self.axis

    def value(self, point: Point) -> int:
        return int(getattr(point, self.axis))


def curves(base: Point = BASE, axes: dict[Axis, tuple[int, ...]] = AXES) -> list[Curve]:
    """One an axis, and for k one a support."""
    made = []
    for axis, values in axes.items():
        supports: tuple[SupportName, ...] = ("candidates", "teacher_top_k") if axis == "k" else (base.support,)
        for support in supports:
            points = tuple(replace(base, **{axis: value}, support=support) for value in values)
            made.append(Curve(axis, support, points))
    return made


def distinct_points(all_curves: list[Curve]) -> list[Point]:
    """Every point once, in order: the base point is on all curves."""
    return list(dict.fromkeys(point for curve in all_curves for point in curve.points))


def round_of(point: Point, rng: np.random.Generator) -> Iterator[SequenceToScore]:
    """Fresh random sequences, so that nothing computed before can help; groups one after the other."""
    counts_T = np.full(point.completion, point.k)
    for _ in range(point.sequences_a_round // point.group):
        context_ids = rng.integers(point.vocabulary, size=point.context)
        for _ in range(point.group):
            completion_ids = rng.integers(point.vocabulary, size=point.completion)
            if point.support == "teacher_top_k":
                yield SequenceToScore(context_ids, completion_ids, TeacherTopK(point.k))
            else:
                ids = rng.integers(point.vocabulary, size=point.completion * point.k)
                yield SequenceToScore(context_ids, completion_ids, Candidates(ids, counts_T))
