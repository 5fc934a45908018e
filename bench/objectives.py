"""Objectives side by side: the same start, the same prompts, five seeds, two tasks; about two and a half hours.

Every run is a real training run (`vopd_client.training_run.run_training`) against one real teacher process on loopback,
one after the other with all cores: two side by side with half of the cores each took as long. A finished run is
written to objectives.json at once. When the benchmark is interrupted the same command goes on with the first run
that is missing; one that was cut off in the middle starts anew.

    python bench/objectives.py --model .cache/smollm2-135m-instruct
    python bench/objectives.py --model .cache/smollm2-135m-instruct --quick --only vopd-rb/capitals
"""

from __future__ import annotations

import argparse
import gc
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console

from machine import cpu_name, machine_facts, teacher_process
from objectives_plan import (
    QUICK,
    ROOT,
    RunId,
    Scale,
    bench_settings,
    check_same_bench,
    missing_runs,
    read_jsonl,
    runs_in_order,
    train_config,
    write_data,
)
from objectives_progress import ProgressOfRuns, ToldLines
from objectives_results import Results, RunResult
from objectives_variance import Variances
from vopd_client.errors import TeacherError, VopdError
from vopd_client.interruption import Interrupted
from vopd_client.run_directory import RunDirectory, read_rows
from vopd_client.tracking import append_row

PACKAGES = ("torch", "transformers", "numpy", "vopd")


def main() -> int:
    arguments = _arguments()
    scale = QUICK if arguments.quick else Scale()
    out: Path = arguments.out or (ROOT / "runs" / "bench-quick" if arguments.quick else ROOT / "bench" / "results")
    work: Path = arguments.work or ROOT / "runs" / ("bench-quick-work" if arguments.quick else "bench-objectives")
    console = Console()
    try:
        wanted = runs_in_order(scale.seeds, arguments.only)
        write_data(work / "data", scale.max_rows)
        settings = bench_settings(scale, model=arguments.model, data=work / "data")
        bench = Bench(_results(out / "objectives.json", settings), out, work, scale, arguments.model)
        finished = bench.all_of(wanted, console)
    except (ValueError, RuntimeError, VopdError) as error:  # settings that differ, no teacher, what training raises
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    except (Interrupted, KeyboardInterrupt):
        finished = False
    if not finished:
        console.print("interrupted; the same command goes on from here")
        return 130
    return 0


def describe(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One line about a finished run."""
    name = RunId(run["task"], run["objective"], run["seed"])
    own = [row for row in rows if RunId(row["task"], row["objective"], row["seed"]) == name]
    matches = " ".join("-" if row["exact_match"] is None else f"{row['exact_match']:.0%}" for row in own)
    ending = f"  stopped: {run['failed']}" if run["failed"] else ""
    return f"{name.name}: exact match {matches}  in {run['seconds']:.0f} s{ending}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="of student and teacher: a directory or a hub id")
    parser.add_argument("--only", help="one objective, one task, or objective/task")
    parser.add_argument("--quick", action="store_true", help="a trial: one seed, three steps, four prompts")
    parser.add_argument("--out", type=Path, help="directory of objectives.json; default: bench/results")
    parser.add_argument("--work", type=Path, help="directory of the runs; default: runs/bench-objectives")
    return parser.parse_args()


def _results(path: Path, settings: dict[str, Any]) -> Results:
    """What is there already, or the start of it. Raises: ValueError when it was made under other settings."""
    if not path.exists():
        return Results(settings, machine_facts(PACKAGES))
    results = Results.load(path)
    check_same_bench(results.settings, settings, path)
    results.settings |= settings  # a new task or objective
    return results


@dataclass(frozen=True)
class Bench:
    """Carries runs out, one after the other, and writes down what they gave."""

    results: Results
    out: Path
    work: Path
    scale: Scale
    model: str

    def all_of(self, wanted: Sequence[RunId], console: Console) -> bool:
        """Every run of `wanted` that is missing, and the variances of its tasks; False when interrupted.

        Raises: RuntimeError, VopdError.
        """
        todo = missing_runs(wanted, self.results.done)
        done = len(wanted) - len(todo)
        if done:
            console.print(f"{done} of {len(wanted)} runs are there already")
        variances = Variances(self.out / "variance.json", self.model, self.work)
        unmeasured = variances.missing({run.task for run in wanted})
        if not todo and not unmeasured:
            return True
        with (
            teacher_process(self.model, self.work / "teacher.log", ["--allow-full-vocab"]) as url,
            ProgressOfRuns(console, total=len(wanted), done=done) as progress,
        ):
            for task in unmeasured:
                progress.describe(f"variances of {task.name}")
                variances.measure(task, url, self._log_console(lambda line: None))
            for run in todo:
                progress.describe(f"{run.name}  starting")
                if not self.carry_out(run, url, self._log_console(partial(progress.line, run))):
                    return False
                progress.end(describe(self.results.runs[-1], self.results.rows))
        return True

    def _log_console(self, hand_on: Callable[[str], None]) -> Console:
        return Console(file=cast(IO[str], ToldLines(self.work / "log.txt", hand_on)), width=160)

    def carry_out(self, run: RunId, teacher_url: str, console: Console) -> bool:
        """One run, from nothing, and its place in the results; False when it was interrupted.

        Raises: TeacherError, and RuntimeError when the teacher is gone. A run that the training itself stops is a
            result like any other.
        """
        from vopd_client.training_run import EXIT_DONE, EXIT_INTERRUPTED, run_training  # brings torch

        directory = RunDirectory(self.work / run.name)
        shutil.rmtree(directory.path, ignore_errors=True)
        self._hand_over_start(run, directory)
        config = train_config(
            run,
            self.scale,
            model=self.model,
            teacher_url=teacher_url,
            data=self.work / "data",
            output_dir=self.work,
            eval_teacher=run.task not in self.results.teachers,
        )
        began, failed = time.perf_counter(), None
        try:
            code = run_training(config, console=console)
        except TeacherError:
            raise
        except VopdError as error:
            code, failed = EXIT_DONE, str(error)
        if code == EXIT_INTERRUPTED:
            return False
        if code != EXIT_DONE:
            raise RuntimeError(f"{run.name} lost its teacher; see {self.work / 'teacher.log'}")
        self._write_down(run, directory, seconds=time.perf_counter() - began, failed=failed)
        shutil.rmtree(directory.path)
        gc.collect()  # the models of this run, before the next one's are loaded
        return True

    def _hand_over_start(self, run: RunId, directory: RunDirectory) -> None:
        """All runs of a task and seed start alike: what one evaluated before its first step, no other repeats."""
        start = self.results.start_of(run.task, run.seed)
        if start is None:
            return
        from vopd_client.evaluation import Evaluation  # brings torch

        known = Evaluation(
            step=0,
            who="student",
            exact_match=start["exact_match"],
            exact_match_by_kind={},
            num_prompts=len(read_jsonl(self.work / "data" / run.task / "heldout.jsonl")),
            kl_nats=start["kl_nats"],
            kl_by_kind={},
            exact_match_by_teacher={},
            kl_by_teacher={},
            samples=(),
            completion_ids=(),
        )
        directory.path.mkdir(parents=True)
        append_row(directory.evals_file, known.to_row())

    def _write_down(self, run: RunId, directory: RunDirectory, *, seconds: float, failed: str | None) -> None:
        evaluations = read_rows(directory.evals_file)
        for row in evaluations:
            if row["who"] == "teacher":
                self.results.teachers[run.task] = {
                    "exact_match": row["exact_match"],
                    "num_prompts": row["num_prompts"],
                }
        of_student = [row for row in evaluations if row["who"] == "student"]
        self.results.add(run, RunResult(read_rows(directory.metrics_file), of_student, seconds, cpu_name(), failed))
        self.results.save(self.out / "objectives.json")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the teacher is ended on the way out
    sys.exit(main())
