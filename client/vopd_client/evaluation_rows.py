"""What rows of evals.jsonl and results of `vopd-client eval --json-file` measure, also those of older versions.

A row of greedy completions has exact_match; one of sampled completions has avg@n, pass@n and maj@n instead. Both have
`num_right`, of every judged prompt, and `questions_hash`, which prompts these are; rows of older versions have neither.
No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from vopd_client.sampled_metrics import Estimate, Float64Array, estimate

Row = Mapping[str, Any]
SAMPLED = {"avg_at_n": "avg", "pass_at_n": "pass", "maj_at_n": "maj"}


@dataclass(frozen=True)
class Measure:
    """One measure over the judged prompts; `estimate.low` and `high` are NaN where a row does not tell them."""

    key: str
    label: str  # "avg@8", "exact match"
    estimate: Estimate


def measures(row: Row | None) -> list[Measure]:
    """The main one first; empty where nothing was judged."""
    row = row or {}
    n = row.get("samples_per_prompt")
    if _estimate(row.get("avg_at_n")) is not None:
        found = [(key, f"{name}@{n}", _estimate(row.get(key))) for key, name in SAMPLED.items()]
        return [Measure(key, label, value) for key, label, value in found if value is not None]
    if row.get("exact_match") is None:
        return []
    values_P = values_by_prompt(row, "exact_match")
    if values_P is None:
        return [Measure("exact_match", "exact match", without_interval(row["exact_match"]))]
    return [Measure("exact_match", "exact match", estimate(values_P))]


def parts(row: Row | None, key: str, by: Literal["kind", "teacher"]) -> dict[str, Estimate]:
    """One measure by kind or by teacher, in the row's order."""
    row = row or {}
    if key == "exact_match":
        return {name: without_interval(share) for name, share in (row.get(f"exact_match_by_{by}") or {}).items()}
    found = {name: _estimate(scores.get(key)) for name, scores in (row.get(f"by_{by}") or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def values_by_prompt(row: Row, key: str) -> Float64Array | None:
    """One measure of every judged prompt, [P]; None where a row does not tell it."""
    num_right = row.get("num_right")
    if not num_right:
        return None
    num_right_P = np.asarray(num_right, np.float64)
    match key:
        case "avg_at_n":
            return num_right_P / float(row["samples_per_prompt"])
        case "pass_at_n" | "exact_match":
            return np.asarray(num_right_P > 0, np.float64)
        case "maj_at_n":
            return np.asarray(row["majority_right"], np.float64)
        case _:
            return None


def describe_measures(row: Row) -> str:
    """`avg@8 41.2% (38–44; capital 50.0%, plural 32.4%), pass@8 ...`: one line; by kind only the first. Or nothing."""
    found = measures(row)
    if not found:
        return ""
    by_kind = ", ".join(f"{kind} {value.mean:.1%}" for kind, value in parts(row, found[0].key, "kind").items())
    texts = []
    for place, measure in enumerate(found):
        notes = [interval(measure.estimate), by_kind if place == 0 else ""]
        notes_text = "; ".join(note for note in notes if note)
        texts.append(f"{measure.label} {measure.estimate.mean:.1%}" + (f" ({notes_text})" if notes_text else ""))
    return ", ".join(texts)


def interval(value: Estimate) -> str:
    """`38–44`, in percent; empty without one."""
    return "" if math.isnan(value.low) else f"{100 * value.low:.0f}–{100 * value.high:.0f}"


def without_interval(mean: float) -> Estimate:
    return Estimate(float(mean), math.nan, math.nan)


def summary_of_samples(before: Row, after: Row) -> dict[str, Any]:
    """What summary.json holds of sampled evaluations; nothing in a run without."""
    summary: dict[str, Any] = {}
    for name, row in (("before", before), ("after", after)):
        found = [measure for measure in measures(row) if measure.key in SAMPLED]
        if found:
            summary["eval_samples_per_prompt"] = row["samples_per_prompt"]
            summary |= {f"{measure.key}_{name}": asdict(measure.estimate) for measure in found}
    return summary


def sampled_lines(summary: Row) -> list[tuple[str, str, str]]:
    """(measure, before, after) of such a summary, as people read them."""
    n = summary.get("eval_samples_per_prompt")
    if n is None:
        return []
    lines = []
    for key, label in SAMPLED.items():
        values = [_estimate(summary.get(f"{key}_{name}")) for name in ("before", "after")]
        lines.append((f"{label}@{n}", *("-" if value is None else with_interval(value) for value in values)))
    return [(label, before, after) for label, before, after in lines]


def with_interval(value: Estimate) -> str:
    """`41.2% (38–44)`."""
    around = interval(value)
    return f"{value.mean:.1%}" + (f" ({around})" if around else "")


def _estimate(value: object) -> Estimate | None:
    if not isinstance(value, Mapping) or value.get("mean") is None:
        return None
    return Estimate(float(value["mean"]), float(value["low"]), float(value["high"]))
