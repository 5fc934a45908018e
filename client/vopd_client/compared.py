"""What `vopd-client compare` is given: run directories, or results of `vopd-client eval --json-file`. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from vopd_client.errors import ConfigError, RunDirectoryError
from vopd_client.evaluation_rows import Measure, measures
from vopd_client.run_data import Row, RunData, number, read_run

MAX_SUBJECTS = 10  # five colours, each as a full and as a dashed line
# Settings that say where a run lies and nothing of what it does.
_PLACES = frozenset({"name", "output_dir", "resume"})
_SETTINGS_OF_RESULTS = (
    "model", "prompts", "as_teacher", "samples_per_prompt", "temperature", "top_p", "sampling_top_k", "seed",
    "max_new_tokens", "verifier",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One of those compared.

    evaluation: the last one of a run's student, or the result; None: there is none.
    run: None for a result.
    """

    label: str
    path: Path
    settings: Row
    evaluation: Row | None
    run: RunData | None

    @property
    def measures(self) -> list[Measure]:
        return measures(self.evaluation)

    @property
    def seconds_at(self) -> dict[int, float]:
        """Training seconds until the end of each step, and 0 before the first; evaluations are not in it."""
        return self._running_sum("step_s")

    @property
    def tokens_at(self) -> dict[int, float]:
        """Completion tokens learned from until the end of each step."""
        return self._running_sum("num_valid_tokens")

    def _running_sum(self, column: str) -> dict[int, float]:
        if self.run is None:
            return {}
        values = self.run.column(column)
        if any(math.isnan(value) for value in values):
            return {}
        steps = [int(row["step"]) for row in self.run.metrics]
        return {0: 0.0} | dict(zip(steps, accumulate(values), strict=True))


def read_subjects(paths: Sequence[Path]) -> list[Subject]:
    """Raises: ConfigError for less than two, too many, one given twice, or runs among results; RunDirectoryError for
    what cannot be read."""
    if not 2 <= len(paths) <= MAX_SUBJECTS:
        raise ConfigError(f"inputs: {len(paths)} given, and 2 to {MAX_SUBJECTS} can be compared")
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise ConfigError(f"inputs: {paths[place]} is given twice")
        if not path.exists():
            raise ConfigError(f"inputs: {paths[place]}: no such file or directory")
    are_runs = [path.is_dir() for path in resolved]
    if len(set(are_runs)) > 1:
        run, result = paths[are_runs.index(True)], paths[are_runs.index(False)]
        raise ConfigError(
            f"inputs: {run} is a run and {result} a result: give directories of runs alone, or files alone"
        )
    read = _read_run if are_runs[0] else _read_result
    return [read(path, label) for path, label in zip(paths, distinct_names(resolved), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of every path, as few as keep it apart from the others: `a`, but `first/run` and `second/run`."""
    plain = [path.with_suffix("") if path.suffix == ".json" else path for path in paths]
    if len(set(plain)) < len(plain):
        plain = list(paths)

    def name(path: Path) -> str:
        others = [other for other in plain if other != path]
        for length in range(1, len(path.parts)):
            if all(other.parts[-length:] != path.parts[-length:] for other in others):
                return "/".join(path.parts[-length:])
        return str(path)

    return [name(path) for path in plain]


def differing(subjects: Sequence[Subject]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all, each with its values; one that a subject does not have is None."""
    names = dict.fromkeys(name for subject in subjects for name in subject.settings if name not in _PLACES)
    rows = [(name, [subject.settings.get(name) for subject in subjects]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _read_run(path: Path, label: str) -> Subject:
    run = read_run(path)
    evaluations = run.student_evaluations
    return Subject(label, path, run.config, evaluations[-1] if evaluations else None, run)


def _read_result(path: Path, label: str) -> Subject:
    try:
        row = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} is no result of `vopd-client eval --json-file`: {error}") from error
    if not isinstance(row, Mapping) or "model" not in row or not measures(row):
        raise RunDirectoryError(
            f"{path} is no result of `vopd-client eval --json-file`: no model, or neither exact_match nor avg_at_n"
        )
    settings = {name: row[name] for name in _SETTINGS_OF_RESULTS if name in row}
    return Subject(label, path, settings, row, None)


def mean(values: Sequence[float]) -> float:
    """Of those that are known; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def held_out_kl(run: RunData) -> list[tuple[int, float]]:
    """(step, nats) of the evaluations that measured it."""
    found = [(int(row["step"]), number(row.get("kl_nats"))) for row in run.student_evaluations]
    return [(step, value) for step, value in found if not math.isnan(value)]
