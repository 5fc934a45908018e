"""What a run directory tells about its run, finished or not. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vopd_client.errors import RunDirectoryError
from vopd_client.evaluation_rows import Measure, measures
from vopd_client.run_directory import RunDirectory, read_rows

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunData:
    """`metrics` has a row a step, at least one, in the order of steps; `summary` is empty while the run goes on.

    timeline: rows as `Timeline.to_row` makes them, in the order of steps; none in a run of an older version.
    """

    path: Path
    config: Row
    metrics: Sequence[Row]
    evaluations: Sequence[Row]
    summary: Row
    timeline: Sequence[Row] = ()

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"])

    def column(self, name: str) -> list[float]:
        """One metric over the steps, NaN where it is missing or was not finite."""
        return [number(row.get(name)) for row in self.metrics]

    @property
    def teacher_names(self) -> list[str]:
        """Of the teachers that have one, in the order of their metrics; see `step_metrics`."""
        columns = (name.split("/") for row in self.metrics for name in row if name.startswith("teacher/"))
        return list(dict.fromkeys(parts[1] for parts in columns))

    @property
    def student_evaluations(self) -> list[Row]:
        rows = [row for row in self.evaluations if row.get("who") == "student"]
        return sorted(rows, key=lambda row: int(row["step"]))

    @property
    def before(self) -> Row | None:
        """The first evaluation of the student, if it was made before the first step."""
        return next((row for row in self.student_evaluations if row["step"] == 0), None)

    @property
    def after(self) -> Row | None:
        """The last evaluation of the student that was made after some training."""
        return next((row for row in reversed(self.student_evaluations) if row["step"] > 0), None)

    @property
    def teacher(self) -> Row | None:
        """The teacher's own evaluation."""
        return next((row for row in self.evaluations if row.get("who") == "teacher"), None)

    @property
    def kinds(self) -> list[str]:
        """Kinds of held-out prompts, in the order of the evaluations."""
        by_kind = [row.get(key) or {} for row in self.evaluations for key in ("exact_match_by_kind", "by_kind")]
        return list(dict.fromkeys(kind for kinds in by_kind for kind in kinds))

    @property
    def main_measure(self) -> Measure | None:
        """What the student's evaluations measure first: exact match, or avg@n; None: nothing but the KL."""
        found = (measures(row) for row in reversed(self.student_evaluations))
        return next((of_row[0] for of_row in found if of_row), None)


def number(value: object) -> float:
    """A metric as a float; NaN for null, for what is missing and for what is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_run(run_dir: Path) -> RunData:
    """Everything that is there of a run; only metrics.jsonl has to be, with a row.

    Raises: RunDirectoryError saying what is missing or damaged.
    """
    run = RunDirectory(run_dir)
    if not run_dir.is_dir():
        raise RunDirectoryError(f"{run_dir} is not a directory")
    if not run.metrics_file.exists():
        raise RunDirectoryError(f"{run_dir} holds no run: there is no {run.metrics_file.name} in it")
    metrics = read_rows(run.metrics_file)
    if not metrics:
        raise RunDirectoryError(f"{run.metrics_file} is empty: the run has not finished its first step")
    return RunData(
        path=run_dir,
        config=_read_mapping(run.config_file),
        metrics=sorted(metrics, key=lambda row: int(row["step"])),
        evaluations=read_rows(run.evals_file),
        summary=_read_mapping(run.summary_file),
        timeline=sorted(read_rows(run.timeline_file), key=lambda row: int(row["step"])),
    )


def _read_mapping(path: Path) -> Row:
    """A YAML or JSON file that holds one mapping; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{path} is damaged: it does not hold names and values")
    return value
