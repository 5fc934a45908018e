"""Which rows `make bench-teacher` measures, and in what order. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from teacher_servers import CONTESTANTS, Contestant
from teacher_workload import Play, Sharing

# The null engine's pass takes milliseconds, and so is played several times.
NULL_TIMES = 10
NUM_TRIAL_PASSES = 4  # a warm-up and three ways to ask stock vLLM, before the first repetition


@dataclass(frozen=True)
class Row:
    """One line of the table. slot: rows with the same one score the same sequences in a repetition.

    times: passes in a row that make one measurement.
    """

    contestant: Contestant
    sharing: Sharing
    support: Literal["dense", "top_k"] | float
    slot: int
    times: int = 1

    @property
    def is_adaptive(self) -> bool:
        return isinstance(self.support, float)

    def label(self, group_size: int, k: int) -> str:
        """ "G = 8, the student's 100"."""
        size = group_size if self.sharing == "shared" else 1
        match self.support:
            case "dense":
                what = f"the student's {k}"
            case "top_k":
                what = f"the teacher's {k}"
            case mass:
                what = f"the student's for {mass:g}"
        return f"G = {size}, {what}"


def rows_of(masses: Sequence[float], only: Collection[Contestant] = CONTESTANTS) -> list[Row]:
    """All rows, a contestant's side by side. vLLM on a CPU scores no ids but its own best ones."""
    rows = [Row("stock", "shared", "top_k", 0), Row("stock", "alone", "top_k", 1)]
    rows += [Row("vllm", "shared", "top_k", 0), Row("vllm", "alone", "top_k", 1)]
    rows += [Row("transformers", "shared", "dense", 0), Row("transformers", "alone", "dense", 1)]
    rows += [Row("transformers", "shared", float(mass), 2 + place) for place, mass in enumerate(masses)]
    rows += [Row("null", "shared", "dense", 0, NULL_TIMES), Row("null", "shared", "top_k", 0, NULL_TIMES)]
    return [row for row in rows if row.contestant in only]


def play_of(row: Row, repetition: int, *, num_contexts: int, num_masses: int) -> Play:
    """What a row plays in a repetition; 0 is the warm-up. No two slots or repetitions have a context in common."""
    num_slots = 2 + num_masses
    number = NUM_TRIAL_PASSES + repetition * num_slots + row.slot
    return Play(row.sharing, row.support, num_contexts, number)


def trial_play(trial: int, *, num_contexts: int) -> Play:
    """Of one way to ask stock vLLM."""
    assert 0 <= trial < NUM_TRIAL_PASSES
    return Play("shared", "top_k", num_contexts, trial)
