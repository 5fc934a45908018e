"""`make bench-objectives` on a tiny model: from a teacher of its own to pictures, killed and taken up again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from objectives_plan import OBJECTIVES, QUICK
from tiny_model import write_tiny_model
from warm_python import WarmProcess

BENCH = Path(__file__).parents[2] / "bench"
PATIENCE_S = 240.0


class Place:
    """Where a benchmark of a tiny model writes, and its process."""

    def __init__(self, directory: Path) -> None:
        self.out, self.work = directory / "results", directory / "work"
        self.model = write_tiny_model(directory / "model")
        self.log = directory / "log.txt"
        self._started: list[WarmProcess] = []

    def start(self, *flags: str) -> WarmProcess:
        given = ["--model", str(self.model), "--quick", "--out", str(self.out), "--work", str(self.work), *flags]
        with self.log.open("ab") as log_file:
            process = WarmProcess(
                str(BENCH / "objectives.py"),
                given,
                stdout=log_file.fileno(),
                stderr=log_file.fileno(),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                own_group=False,
                draws=False,
            )
        self._started.append(process)
        return process

    def complete(self, *flags: str) -> int:
        return self.start(*flags).wait(PATIENCE_S)

    def results(self) -> dict[str, Any]:
        path = self.out / "objectives.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
        return found

    def wait_until(self, process: WarmProcess, condition: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up_s, self.log.read_text()
            time.sleep(0.02)

    def teacher_is_there(self) -> bool:
        """Whether the last one that was started still listens."""
        (port,) = re.findall(r"ready at grpc://127\.0\.0\.1:(\d+)", (self.work / "teacher.log").read_text())
        return is_listening(int(port))

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.end()


def in_the_middle_of(run: str, place: Place) -> bool:
    """A training step of the run is done, and its results are not there."""
    metrics = place.work / run / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= 1


@pytest.mark.timeout(600)
def test_a_killed_benchmark_goes_on_where_it_was_and_is_drawn_at_the_end(place: Place, tmp_path: Path) -> None:
    process = place.start("--only", "capitals")
    place.wait_until(process, lambda: in_the_middle_of("capitals-vopd-1", place))
    process.send_signal(signal.SIGKILL)
    process.wait()
    give_up_s = time.monotonic() + PATIENCE_S
    while place.teacher_is_there():  # nobody was left to end it
        assert time.monotonic() < give_up_s
        time.sleep(0.1)
    before = place.results()
    assert [run["objective"] for run in before["runs"]] == ["opd"]

    assert place.complete("--only", "capitals") == 0, place.log.read_text()
    after = place.results()
    assert [run["objective"] for run in after["runs"]] == list(OBJECTIVES)
    assert after["runs"][:1] == before["runs"]
    assert "1 of 7 runs are there already" in place.log.read_text()
    assert not [path for path in place.work.iterdir() if path.name.startswith("capitals-")]

    steps_of_runs: dict[str, list[int]] = {objective: [] for objective in OBJECTIVES}
    for row in after["rows"]:
        assert isinstance(row["exact_match"], float)
        assert row["kl_nats"] > 0
        steps_of_runs[row["objective"]].append(row["step"])
    assert steps_of_runs == {objective: [0, 2, QUICK.steps] for objective in OBJECTIVES}
    assert len({row["kl_nats"] for row in after["rows"] if row["step"] == 0}) == 1
    assert len({row["kl_nats"] for row in after["rows"] if row["step"] == QUICK.steps}) > 1
    assert all(len(run["steps"]["variance"]) == QUICK.steps and not run["failed"] for run in after["runs"])
    assert after["teachers"]["capitals"]["num_prompts"] == QUICK.max_rows
    payload = {run["objective"]: sum(run["steps"]["teacher_bytes_per_token"]) for run in after["runs"]}
    assert payload["opd"] < payload["vopd-bucket-4"] < payload["vopd"]

    variance = json.loads((place.out / "variance.json").read_text())
    assert variance["tasks"]["capitals"]["settings"]["max_new_tokens"] == 12

    written = [(place.out / name).read_text() for name in ("objectives.json", "variance.json")]
    assert not [text for text in written if str(place.work) in text]  # results tell nothing of where they were made

    command = [sys.executable, str(BENCH / "objectives_report.py"), str(place.out / "objectives.json")]
    told = subprocess.run([*command, "--images", str(tmp_path)], check=True, capture_output=True, text=True).stdout
    assert re.search(r"^\| vopd-bucket-4 \| 1 \|", told, re.MULTILINE)
    assert (tmp_path / "objectives-curves.png").stat().st_size > 10_000
    assert (tmp_path / "objectives-costs.png").stat().st_size > 10_000


@pytest.mark.timeout(600)
def test_ctrl_c_ends_the_teacher_too_and_other_settings_are_refused(place: Place) -> None:
    process = place.start("--only", "opd/capitals")
    place.wait_until(process, lambda: in_the_middle_of("capitals-opd-1", place))
    process.send_signal(signal.SIGINT)
    code = process.wait(PATIENCE_S)
    told = place.log.read_text()
    if code == 0:  # the last step was done before the signal was looked at
        assert len(place.results()["runs"]) == 1
    else:
        assert code == 130, told
        assert "the same command goes on from here" in told
    assert not place.teacher_is_there()

    assert place.complete("--only", "opd/capitals") == 0, place.log.read_text()
    path = place.out / "objectives.json"
    path.write_text(path.read_text().replace('"learning_rate": 5e-05', '"learning_rate": 1e-05'))
    assert place.complete("--only", "opd/capitals") == 2
    assert "learning_rate: 1e-05 -> 5e-05" in place.log.read_text()


def is_listening(port: int) -> bool:
    listening = "0A"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == listening for line in lines)
