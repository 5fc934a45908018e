"""Several runs, one after the other, in a group of training processes: `python process_runs.py jobs.json`.

One launch for many runs: what takes time is to start a process, not to train a tiny model. Each process writes what
came of each run, and what it asked its teacher, to `results-{rank}.json` beside the jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from process_group import process_group

PATIENCE_S = 400.0


@dataclass(frozen=True)
class Job:
    """settings: of the run, its name among them. gone_at: a rank, and which of its requests nobody answers any more.

    nan_at: a rank, and the step in which its student's weights turn out not to be numbers.
    """

    settings: dict[str, Any]
    gone_at: tuple[int, int] | None = None
    nan_at: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """Of one run in one process. asked: context and completion of every request, in order; error: what was raised.

    own_numbers: of weights and of AdamW's moments in the end, that this process has in its memory.
    """

    name: str
    exit_code: int | None
    error: str
    told: str
    asked: list[tuple[list[int], list[int]]] = field(default_factory=list)
    own_numbers: int = 0


def run_in_processes(
    models: Path, output_dir: Path, jobs: Sequence[Job], *, size: int = 2, device: str = "cpu"
) -> list[list[Outcome]]:
    """What came of the jobs, by rank and job, in `size` processes that start together."""
    directory = output_dir / "jobs"
    directory.mkdir(parents=True)
    content = {
        "models": str(models),
        "output_dir": str(output_dir),
        "device": device,
        "jobs": [asdict(job) for job in jobs],
    }
    (directory / "jobs.json").write_text(json.dumps(content))
    started = []
    with contextlib.ExitStack() as stack:
        for rank, env in enumerate(process_group(size)):
            log = stack.enter_context((directory / f"log-{rank}.txt").open("wb"))
            command = [sys.executable, __file__, str(directory / "jobs.json")]
            env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))
        try:
            codes = wait_for(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
    logs = "\n".join((directory / f"log-{rank}.txt").read_text(errors="replace") for rank in range(size))
    assert codes == [0] * size, logs
    return [
        [Outcome(**row) for row in json.loads((directory / f"results-{rank}.json").read_text())] for rank in range(size)
    ]


def wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Their exit codes; None for those that are left when one has failed, which a launcher would end, or time is up."""
    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > give_up_s:
            return codes
        time.sleep(0.05)


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Runs end without drawing anything, which takes ten times as long as they do."""
    import vopd_client.report as report

    drawn = report.write_report
    report.write_report = lambda path: None
    try:
        yield
    finally:
        report.write_report = drawn


def main(path: Path) -> None:
    from accelerate import PartialState

    PartialState.destroy_process_group = lambda self, group=None: None  # the next run goes on with the group
    content = json.loads(path.read_text())
    rank = int(os.environ["RANK"])
    outcomes = []
    for job in content["jobs"]:
        models, output_dir = Path(content["models"]), Path(content["output_dir"])
        with without_reports():
            outcomes.append(run_job(Job(**job), rank, models, output_dir, content["device"]))
    (path.parent / f"results-{rank}.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


def run_job(job: Job, rank: int, models: Path, output_dir: Path, device: str) -> Outcome:
    from accelerate.state import AcceleratorState

    from fake_local_teacher import FakeLocalTeacher
    from training_runs import Runs
    from vopd_client.errors import TeacherUnavailableError, VopdError

    AcceleratorState._reset_state()  # which would keep another precision
    asked: list[tuple[list[int], list[int]]] = []

    class Teacher(FakeLocalTeacher):
        def submit(self, sequence: Any) -> Any:
            asked.append((sequence.context_ids.tolist(), sequence.completion_ids.tolist()))
            return super().submit(sequence)

    def leave(number: int) -> None:
        if job.gone_at is not None and job.gone_at[0] == rank and number >= job.gone_at[1]:
            raise TeacherUnavailableError("gone for 600 s")

    runs = Runs(models, output_dir)
    exit_code, error, own_numbers = None, "", [0]
    with (
        counting_own_numbers(own_numbers),
        not_a_number(job.nan_at[1]) if job.nan_at is not None and job.nan_at[0] == rank else contextlib.nullcontext(),
    ):
        try:
            teacher = Teacher(models / "teacher", on_submit=leave)
            exit_code = runs.train(teacher, **{"device": device, **job.settings})
        except VopdError as raised:
            error = f"{type(raised).__name__}: {raised}"
    return Outcome(job.settings["name"], exit_code, error, runs.told, asked, own_numbers[-1])


@contextlib.contextmanager
def counting_own_numbers(into: list[int]) -> Iterator[None]:
    """How many a run has after its last step."""
    import vopd_client.trainer as trainer

    whole = trainer.Trainer.train

    def train(self: Any) -> None:
        whole(self)
        states = self.run.optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        tensors = [*self.run.student.module.parameters(), *moments]
        into.append(sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors))

    trainer.Trainer.train = train  # type: ignore[method-assign]
    try:
        yield
    finally:
        trainer.Trainer.train = whole  # type: ignore[method-assign]


@contextlib.contextmanager
def not_a_number(step: int) -> Iterator[None]:
    """The loss of a step's first microbatch is NaN, in this process alone."""
    import vopd_client.trainer as trainer

    whole, seen = trainer.Trainer._loss_sum, []

    def loss_sum(self: Any, microbatch: Any, sent: Any, notes: Any) -> Any:
        loss = whole(self, microbatch, sent, notes)
        if notes.step == step and not seen:
            seen.append(step)
            raise trainer.stopped_before_update(step, [], trainer.NonFiniteError("the loss is nan"))
        return loss

    trainer.Trainer._loss_sum = loss_sum  # type: ignore[method-assign]
    try:
        yield
    finally:
        trainer.Trainer._loss_sum = whole  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
