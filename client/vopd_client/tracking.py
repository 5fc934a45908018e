"""What a run tells: rows on disk in step order, trackers, and a bar (or a line a step) for people.

Only the main process tells anything; the others hold a `RunLog` that does nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vopd_client.config import ONLY_TENSORBOARD, Tracker
from vopd_client.errors import RunDirectoryError
from vopd_client.evaluation_rows import describe_measures
from vopd_client.run_directory import RunDirectory
from vopd_client.trackers import TrackedRun, Trackers, scalars

MAX_PLAIN_LINES = 100  # of progress in a log file, over the whole run
WAITING_LINE_EVERY_S = 15.0


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one JSON line and waits until it is on the disk. What is not finite becomes null.

    Raises: RunDirectoryError with the system's reason.
    """
    line = json.dumps(_finite(dict(row)), allow_nan=False, ensure_ascii=False)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunDirectoryError(f"cannot write to {path}: {error.strerror}") from error


def describe_step(row: Mapping[str, Any], total_steps: int) -> str:
    """One line about a step, for people."""
    return (
        f"step {row['step']}/{total_steps}  KL {row['kl_nats']:.4f} nats{_kl_by_teacher(row)}  "
        f"loss {row['loss']:+.4f}  grad {row['grad_norm']:.3g}  {row['tokens_per_s']:.1f} tokens/s  "
        f"{row['step_s']:.2f} s (rollouts {row['rollout_s']:.2f}, update {row['update_s']:.2f}, "
        f"teacher wait {row['teacher_wait_s']:.2f})"
    )


def _kl_by_teacher(row: Mapping[str, Any]) -> str:
    """` (code 0.1200, math 0.3400)`: of the teachers with names that scored something of the step."""
    shown = [
        f"{name.split('/')[1]} {value:.4f}"
        for name, value in row.items()
        if name.startswith("teacher/") and name.endswith("/kl_nats")
    ]
    return f" ({', '.join(shown)})" if shown else ""


def describe_evaluation(row: Mapping[str, Any]) -> str:
    """One line about an evaluation, for people."""
    parts = [f"evaluation after step {row['step']}, {row['who']}:"]
    if measured := describe_measures(row):
        parts.append(measured)
    if row["kl_nats"] is not None:
        by_teacher = ", ".join(f"{name} {nats:.4f}" for name, nats in (row.get("kl_by_teacher") or {}).items())
        parts.append(f"KL {row['kl_nats']:.4f} nats" + (f" ({by_teacher})" if by_teacher else ""))
    return "  ".join(parts)


def print_line(console: Console, message: str) -> None:
    """A line for people. Square brackets in it are text, not markup."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


class RunLog:
    """Metrics, evaluations and progress of one run, from the step after `last_step` on.

    settings: of the run, for its trackers.
    """

    def __init__(
        self,
        run: RunDirectory,
        console: Console,
        *,
        total_steps: int,
        last_step: int,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        trackers: Sequence[Tracker] = ONLY_TENSORBOARD,
        tracker_project: str = "vopd",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._run = run
        self._console = console
        self._total_steps = total_steps
        self._last_step = last_step
        self._enabled = enabled
        self._clock = clock
        self._told_waiting_at = -math.inf
        tracked = TrackedRun(run, tracker_project, settings or {}, last_step)
        self._trackers = Trackers(trackers, tracked, self.tell)
        self._progress: Progress | None = None
        self._latest = ""  # the last complete step's numbers, kept on the bar while the next one is at work

    def __enter__(self) -> Self:
        if self._enabled:
            self._trackers.open()
            if self._console.is_terminal:
                self._progress = _progress_bar(self._console)
                self._task = self._progress.add_task("", total=self._total_steps, completed=self._last_step)
                self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._trackers.close()

    def tell(self, message: str) -> None:
        """A line for people, above the bar."""
        if self._enabled:
            print_line(self._console, message)

    def show(self, part: str | Table) -> None:
        """A line or a table for people, above the bar."""
        if isinstance(part, str):
            self.tell(part)
        elif self._enabled:
            self._console.print(part)

    def step(self, row: Mapping[str, Any]) -> None:
        """Writes the metrics of one complete step."""
        if not self._enabled:
            return
        append_row(self._run.metrics_file, row)
        self._trackers.log(scalars("train", row), row["step"])
        line = describe_step(row, self._total_steps)
        if self._progress is not None:
            self._latest = line.split("  ", 1)[1] + "  | "
            self._progress.update(self._task, completed=row["step"], description=self._latest)
        elif row["step"] % max(1, self._total_steps // MAX_PLAIN_LINES) == 0:
            self.tell(line)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Writes one evaluation, and its samples once more in a file of their own."""
        if not self._enabled:
            return
        for sample in row.get("samples", ()):
            append_row(self._run.samples_file, {"step": row["step"], "who": row["who"], **sample})
        append_row(self._run.evals_file, row)
        self._trackers.log(scalars(f"eval_{row['who']}", row), row["step"])
        self.tell(describe_evaluation(row))

    def doing(self, what: str, *, step: int) -> None:
        """What the current step is at; only the bar shows it."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"{self._latest}step {step}: {what}")

    def waiting(self, reason: str, teacher: str = "", *, step: int) -> None:
        """Why the step stands still, and for which teacher: on the bar at once, as a line now and then."""
        if not self._enabled:
            return
        if reason and teacher:
            reason = f"{teacher}: {reason}"
        if self._progress is not None:
            whose = f"{teacher}'s" if teacher else "the teacher's"
            what = reason or f"waiting for {whose} scores"
            self._progress.update(self._task, description=f"{self._latest}step {step}: {what}")
        elif reason and self._clock() - self._told_waiting_at >= WAITING_LINE_EVERY_S:
            self._told_waiting_at = self._clock()
            self.tell(f"step {step}: {reason}")


def _progress_bar(console: Console) -> Progress:
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _finite(value: Any) -> Any:
    """The same value with null for every float that JSON cannot hold."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(name): _finite(item) for name, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
