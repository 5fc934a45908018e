"""Does a step wait for the teacher? Training with one that answers at once and one that answers two seconds later.

Real training runs of the demo model against one real teacher process, on-policy and with max_staleness 1, one after
the other and all of them once a round. The latency is injected by a proxy between the two, see overlap_proxy.py; at
0 s the same proxy stands in between. Teacher and student share the cores, so a step holds the teacher's work either
way.

    python bench/overlap.py --model .cache/smollm2-135m-instruct --json bench/results/overlap.json
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # teacher and student take turns on the cores

import argparse
import gc
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from machine import machine_facts, teacher_process
from overlap_plan import PEOPLE_CALL_IT, ROOT, Case, Ratio, cases, counted, ratios, summarise, train_config
from overlap_proxy import delayed
from vopd_client.run_directory import RunDirectory, read_rows

PACKAGES = ("torch", "transformers", "numpy", "vopd")


def main() -> int:
    arguments = _arguments()
    console = Console()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    plan = cases(arguments.latency)
    steps: dict[Case, list[Any]] = {case: [] for case in plan}
    began = time.perf_counter()
    with teacher_process(arguments.model, work / "teacher.log") as url:
        for number in range(1, arguments.rounds + 1):
            for case in plan:
                rows = train(case, url, model=arguments.model, work=work, counted_steps=arguments.steps)
                steps[case] += counted(rows)
                seconds = " ".join(f"{row['step_s']:.2f}" for row in rows)
                console.print(
                    f"{time.perf_counter() - began:4.0f} s  round {number} of {arguments.rounds}, {case.name}: "
                    f"steps of {seconds} s",
                    highlight=False,
                    soft_wrap=True,
                )
    results = [summarise(case, steps[case]) for case in plan]
    held = ratios(results, arguments.latency)
    console.print(table(results))
    for ratio in held:
        console.print(f"{ratio.what}: {ratio.value:.3f}, bar {ratio.bar} {'holds' if ratio.holds else 'MISSED'}")
    if arguments.json is not None:
        write_json(arguments.json, results, held, arguments.model)
    if arguments.images is not None:
        copy_timelines(work, arguments.images, arguments.latency)
    return 0


def train(case: Case, teacher_url: str, *, model: str, work: Path, counted_steps: int) -> list[dict[str, Any]]:
    """One training run from nothing; the rows of its steps. Its pictures stay in `work`, its weights do not."""
    from vopd_client.training_run import EXIT_DONE, run_training  # brings torch

    directory = RunDirectory(work / case.name)
    shutil.rmtree(directory.path, ignore_errors=True)
    with delayed(teacher_url, case.latency_s) as url, (work / "log.txt").open("a") as log:
        config = train_config(case, model=model, teacher_url=url, output_dir=work, counted_steps=counted_steps)
        code = run_training(config, console=Console(file=log, width=160))
    if code != EXIT_DONE:
        raise SystemExit(code)
    for weights in (directory.checkpoints, directory.model):
        shutil.rmtree(weights)
    gc.collect()  # the models of this run, before the next one's are loaded
    return read_rows(directory.metrics_file)


def table(results: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="medians, seconds a step")
    made.add_column("training", no_wrap=True)
    made.add_column("latency, s", justify="right", no_wrap=True)
    for column in ("step", "rollouts", "update", "wait", "steps"):
        made.add_column(column, justify="right")
    for row in results:
        made.add_row(
            PEOPLE_CALL_IT[row["max_staleness"]],
            f"{row['latency_s']:g}",
            *(f"{row[name]:.2f}" for name in ("step_s", "rollout_s", "update_s", "teacher_wait_s")),
            str(row["steps"]),
        )
    return made


def write_json(path: Path, results: Sequence[dict[str, Any]], held: Sequence[Ratio], model: str) -> None:
    content = {
        "machine": machine_facts(PACKAGES),
        "model": Path(model).name,
        "rows": results,
        "ratios": [ratio.to_row() for ratio in held],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def copy_timelines(work: Path, images: Path, latency_s: float) -> None:
    """The timeline of the last run with the latency, on-policy and sampled ahead."""
    images.mkdir(parents=True, exist_ok=True)
    for staleness, name in PEOPLE_CALL_IT.items():
        shutil.copy(work / Case(staleness, latency_s).name / "timeline.png", images / f"timeline-{name}.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="of student and teacher: a directory or a hub id")
    parser.add_argument("--latency", type=float, default=2.0, help="seconds by which answers are delayed; default: 2")
    parser.add_argument("--rounds", type=int, default=2, help="of all cases; default: 2")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a run; default: 4")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--images", type=Path, help="directory for the timelines of the runs with the latency")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench-overlap", help="directory of the runs")
    return parser.parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the teacher is ended on the way out
    sys.exit(main())
