"""What bench/results/objectives.json says: a markdown table a task, and pictures in docs/images.

    python bench/objectives_report.py bench/results/objectives.json --images docs/images

Figures are means over seeds ± standard deviation over seeds. Failed runs count with what they reached.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from objectives_results import Results, Spread, area_under_curve, curve, spread, steps_to_reach

NOT_MEASURED = "–"

Row = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--images", type=Path, help="directory for the pictures; none: tables only")
    arguments = parser.parse_args()
    results = Results.load(arguments.results)
    if not results.runs:
        sys.exit(f"{arguments.results} holds no finished run")
    for task in tasks_of(results):
        print(markdown(results, task))
    if arguments.images is not None:
        from objectives_plots import write_pictures  # brings matplotlib

        arguments.images.mkdir(parents=True, exist_ok=True)
        for path in write_pictures(results, arguments.images):
            print(path)
    return 0


def tasks_of(results: Results) -> list[str]:
    return list(dict.fromkeys(str(run["task"]) for run in results.runs))


def objectives_of(results: Results, task: str) -> list[str]:
    """In the order in which they were run."""
    return list(dict.fromkeys(str(run["objective"]) for run in results.runs if run["task"] == task))


def markdown(results: Results, task: str) -> str:
    """The table of one task, an objective a row."""
    steps = sorted({row["step"] for row in results.rows if row["task"] == task and row["step"] > 0})
    teacher = results.teachers.get(task)
    heads = [
        "objective",
        "seeds",
        *(f"exact match, step {step}" for step in steps),
        "its mean over the run",
        "steps to half the teacher's",
        f"held-out KL, step {steps[-1]}" if steps else "held-out KL",
        "training KL, mean",
        "variance / opd's",
        "bytes a token",
        "s a step",
    ]
    lines = [f"### {task}", ""]
    if teacher is not None:
        lines += [f"The teacher itself: {percent(teacher['exact_match'])} of {teacher['num_prompts']}.", ""]
    cpus = Counter(run["cpu"] for run in results.runs if run["task"] == task)
    if len(cpus) > 1:
        counted = ", ".join(f"{count} on {cpu}" for cpu, count in cpus.items())
        lines += [f"Seconds are of several processors: {counted}.", ""]
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for objective in objectives_of(results, task):
        lines.append("| " + " | ".join(cells(results, task, objective, steps)) + " |")
    return "\n".join(lines) + "\n"


def cells(results: Results, task: str, objective: str, steps: Sequence[int]) -> list[str]:
    runs = [run for run in results.runs if run["task"] == task and run["objective"] == objective]
    matches = curve(results.rows, task, objective, "exact_match")
    kl = curve(results.rows, task, objective, "kl_nats")
    by_seed = exact_match_by_seed(results, task, objective)
    areas = spread(area_under_curve(points) for points in by_seed)
    failed = sum(run["failed"] is not None for run in runs)
    return [
        objective,
        f"{len(runs)}" + (f" ({failed} failed)" if failed else ""),
        *(with_spread(matches.get(step), percent) for step in steps),
        with_spread(areas, percent),
        reached(by_seed, results.teachers.get(task)),
        with_spread(kl.get(steps[-1]) if steps else None, "{:.3f}".format),
        with_spread(mean_over_steps(runs, "kl_nats"), "{:.3f}".format),
        with_spread(mean_over_steps(runs, "variance_over_opd"), "{:.3f}".format),
        whole(mean_over_steps(runs, "teacher_bytes_per_token")),
        with_spread(mean_over_steps(runs, "step_s"), "{:.1f}".format),
    ]


def exact_match_by_seed(results: Results, task: str, objective: str) -> list[list[tuple[int, float]]]:
    """(step, exact match) of every seed."""
    points: dict[int, list[tuple[int, float]]] = {}
    for row in results.rows:
        if (row["task"], row["objective"]) == (task, objective) and row["exact_match"] is not None:
            points.setdefault(row["seed"], []).append((row["step"], row["exact_match"]))
    return list(points.values())


def reached(by_seed: Sequence[Sequence[tuple[int, float]]], teacher: Row | None) -> str:
    """The median step of the seeds that reached half of the teacher's exact match, and how many did."""
    if teacher is None or not teacher["exact_match"]:
        return NOT_MEASURED
    found = [steps_to_reach(points, teacher["exact_match"] / 2) for points in by_seed]
    steps = [step for step in found if step is not None]
    median = f"{statistics.median(steps):g}" if steps else "never"
    return f"{median} ({len(steps)} of {len(found)})"


def mean_over_steps(runs: Iterable[Row], column: str) -> Spread | None:
    """The spread over runs of a step metric's mean over the run's steps."""
    means = (spread(run["steps"][column]) for run in runs)
    return spread(found.mean for found in means if found is not None)


def with_spread(found: Spread | None, form: Callable[[float], str]) -> str:
    if found is None:
        return NOT_MEASURED
    return form(found.mean) + (f" ± {form(found.std)}" if found.count > 1 else "")


def whole(found: Spread | None) -> str:
    return NOT_MEASURED if found is None else f"{found.mean:.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


if __name__ == "__main__":
    sys.exit(main())
