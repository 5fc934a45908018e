"""Whether one model answers better than another: the difference prompt by prompt, with its interval. No torch.

Axes: P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vopd_client.compared import Subject
from vopd_client.evaluation_rows import measures, values_by_prompt
from vopd_client.run_data import Row
from vopd_client.sampled_metrics import Estimate, Float64Array, estimate


@dataclass(frozen=True)
class Difference:
    """Of one measure, other - reference, over the same prompts; num_better, num_worse: prompts that moved."""

    measure: str
    estimate: Estimate
    num_prompts: int
    num_better: int
    num_worse: int

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.estimate.low > 0 or self.estimate.high < 0


@dataclass(frozen=True)
class Pairing:
    """Two subjects. note: why there is no difference, or what was left out of it."""

    reference: str
    other: str
    differences: tuple[Difference, ...]
    note: str


def pair_with_first(subjects: Sequence[Subject]) -> list[Pairing]:
    """Every subject against the first."""
    first, *others = subjects
    return [pair(first, other) for other in others]


def pair(reference: Subject, other: Subject) -> Pairing:
    """The differences in what both measured, or why they cannot be taken prompt by prompt."""
    sides = (reference, other)
    for subject in sides:
        if not subject.measures:
            return Pairing(reference.label, other.label, (), f"{subject.label} has no evaluation with answers")
    rows = [subject.evaluation or {} for subject in sides]
    reason = why_not(rows[0], rows[1])
    if reason:
        return Pairing(reference.label, other.label, (), reason)
    labels = [{measure.key: measure.label for measure in measures(row)} for row in rows]
    same_n = rows[0].get("samples_per_prompt") == rows[1].get("samples_per_prompt")
    keys = [key for key in labels[0] if same_n or key == "avg_at_n"]
    differences = []
    for key in keys:
        values = [values_by_prompt(row, key) for row in rows]
        assert values[0] is not None
        assert values[1] is not None, "why_not found both"
        label = labels[0][key] if same_n else f"{labels[1][key]} against {labels[0][key]}"
        differences.append(paired_difference(label, values[0], values[1]))
    notes = [_steps_differ(other=rows[1], reference=rows[0])]
    if not same_n:
        counts = [row.get("samples_per_prompt") for row in rows]
        notes.append(f"pass@n and maj@n are left out: they depend on n, which is {counts[0]} and {counts[1]}")
    return Pairing(reference.label, other.label, tuple(differences), "; ".join(note for note in notes if note))


def paired_difference(label: str, reference_P: Float64Array, other_P: Float64Array) -> Difference:
    """other - reference, with a 95 % percentile bootstrap interval over prompts.

    A prompt is resampled with both its values, so that what makes it hard for both cancels.
    """
    difference_P = other_P - reference_P
    return Difference(
        measure=label,
        estimate=estimate(difference_P),
        num_prompts=len(difference_P),
        num_better=int((difference_P > 0).sum()),
        num_worse=int((difference_P < 0).sum()),
    )


def why_not(first: Row, other: Row) -> str:
    """Why two evaluations cannot be compared prompt by prompt; empty where they can."""
    if not first.get("num_right") or not other.get("num_right"):
        return "written by an older version, which kept no results by prompt: evaluate again"
    if first.get("questions_hash") != other.get("questions_hash"):
        counts = [len(row["num_right"]) for row in (first, other)]
        asked = f"{counts[0]} against {counts[1]}" if counts[0] != counts[1] else f"both {counts[0]}, but others"
        return f"they answered other prompts ({asked}): there is nothing to pair"
    if ("samples_per_prompt" in first) != ("samples_per_prompt" in other):
        return "one is of greedy completions, the other of sampled ones"
    return ""


def _steps_differ(*, other: Row, reference: Row) -> str:
    steps = [row.get("step", 0) for row in (other, reference)]
    return "" if steps[0] == steps[1] else f"evaluated after step {steps[0]} and after step {steps[1]}"
