"""What `make bench-objectives` shows while it runs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from objectives_plan import RunId


class ToldLines(io.TextIOBase):
    """What a run prints, into a log file; every complete line is handed on as well."""

    def __init__(self, log: Path, hand_on: Callable[[str], None]) -> None:
        self._log = log
        self._hand_on = hand_on
        self._line = ""

    def write(self, text: str) -> int:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._hand_on(line)
        return len(text)


class ProgressOfRuns:
    """A bar over all runs, with what the current one is at."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # The speed is that of the last hour: a run takes minutes, and the bar moves at its end only.
        self._progress = Progress(*columns, console=console, speed_estimate_period=3600)
        self._bar = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def describe(self, what: str) -> None:
        self._progress.update(self._bar, description=what)

    def line(self, run: RunId, line: str) -> None:
        """Something that the run said; where it is, is shown."""
        if found := re.match(r"step \d+/\d+  KL \S+ nats|evaluation after step \d+", line):
            self.describe(f"{run.name}  {found[0]}")

    def end(self, result: str) -> None:
        """A run is done; `result` stays above the bar."""
        self._progress.advance(self._bar)
        self._progress.console.print(result, markup=False, highlight=False)
