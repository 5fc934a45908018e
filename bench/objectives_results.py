"""bench/results/objectives.json: what a run leaves in it, and sums over the runs. Values in, values out; no torch.

The file holds `machine`, `settings`, `teachers` (a task's teacher's own exact match), and

    rows   one an evaluation: task, objective, seed, step, exact_match, kl_nats (of held-out prompts' fresh rollouts,
           over the whole vocabulary), seconds (of training until then, evaluations left out)
    runs   one a run: task, objective, seed, cpu (what it ran on), failed (what stopped it, or null), seconds
           (everything), and `steps`, its metrics as columns over the training steps
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from objectives_plan import RunId
from vopd_client.run_data import number
from vopd_client.run_directory import write_atomically

STEP_METRICS = (
    *("kl_nats", "variance", "variance_over_opd", "adam_moment_variance", "grad_norm", "num_valid_tokens"),
    *("teacher_bytes_per_token", "rollout_s", "update_s", "teacher_wait_s", "step_s"),
)
SIGNIFICANT_DIGITS = 6

Row = Mapping[str, Any]


@dataclass
class Results:
    """What is known so far; `save` replaces the file at once."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises: ValueError for a file that does not hold such results."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: content[name] for name in ("settings", "machine", "teachers", "rows", "runs")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold results of this benchmark: {error!r}") from error

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(vars(self)))

    @property
    def done(self) -> list[RunId]:
        return [RunId(run["task"], run["objective"], run["seed"]) for run in self.runs]

    def add(self, run: RunId, result: RunResult) -> None:
        names = {"task": run.task, "objective": run.objective, "seed": run.seed}
        self.rows += [{**names, **row} for row in evaluation_rows(result)]
        columns = {name: [rounded(row.get(name)) for row in result.metrics] for name in STEP_METRICS}
        self.runs.append(
            {
                **names,
                "cpu": result.cpu,
                "failed": result.failed,
                "seconds": round(result.seconds, 1),
                "steps": columns,
            },
        )

    def start_of(self, task: str, seed: int) -> dict[str, Any] | None:
        """The evaluation before the first step, which all objectives of a task and seed share."""
        for row in self.rows:
            if (row["task"], row["seed"], row["step"]) == (task, seed, 0):
                return row
        return None


@dataclass(frozen=True)
class RunResult:
    """metrics, evaluations: the rows of metrics.jsonl, and the student's of evals.jsonl."""

    metrics: Sequence[Row]
    evaluations: Sequence[Row]
    seconds: float
    cpu: str  # a benchmark that goes on elsewhere has seconds of two kinds
    failed: str | None = None


def evaluation_rows(result: RunResult) -> list[dict[str, Any]]:
    """step, exact_match, kl_nats, and the seconds of the training steps before."""
    return [
        {
            "step": row["step"],
            "exact_match": rounded(row["exact_match"]),
            "kl_nats": rounded(row["kl_nats"]),
            "seconds": rounded(sum(step["step_s"] for step in result.metrics if step["step"] <= row["step"])),
        }
        for row in sorted(result.evaluations, key=lambda row: int(row["step"]))
    ]


def rounded(value: object) -> float | None:
    """Six significant digits; None for what is missing or not finite."""
    as_float = number(value)
    return float(f"{as_float:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(as_float) else None


def to_json(content: Mapping[str, Any]) -> str:
    """One row a line, so that a difference between two files can be read."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join(f"    {json.dumps(item)}" for item in value)
            parts.append(f'  "{name}": [\n{lines}\n  ]' if value else f'  "{name}": []')
        else:
            parts.append(f'  "{name}": {json.dumps(value, indent=4)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


# ---------------------------------------------------------------- sums over seeds


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with what lies around it; std is the sample's, 0 for one seed."""

    mean: float
    std: float
    low: float
    high: float
    count: int


def spread(values: Iterable[object]) -> Spread | None:
    """None when no value is a number."""
    numbers = [value for value in map(number, values) if math.isfinite(value)]
    if not numbers:
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return Spread(statistics.fmean(numbers), std, min(numbers), max(numbers), len(numbers))


def curve(rows: Sequence[Row], task: str, objective: str, column: str) -> dict[int, Spread]:
    """The spread over seeds after every evaluated step, in the order of steps."""
    chosen = [row for row in rows if row["task"] == task and row["objective"] == objective]
    by_step = {step: spread(row[column] for row in chosen if row["step"] == step) for step in _steps(chosen)}
    return {step: found for step, found in by_step.items() if found is not None}


def steps_to_reach(points: Sequence[tuple[int, float]], height: float) -> int | None:
    """The first evaluated step at which the value is at least `height`; None when it never is."""
    return next((step for step, value in sorted(points) if value >= height), None)


def _steps(rows: Sequence[Row]) -> list[int]:
    return sorted({int(row["step"]) for row in rows})
