"""What bench/results/objectives.json says: two markdown tables a task, and pictures in docs/images.

    python bench/objectives_report.py bench/results/objectives.json --images docs/images

The first table holds means over seeds ± standard deviation over seeds, the second every seed. Failed runs count with
what they reached.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from objectives_results import Results, Spread, curve, spread, steps_to_reach

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
        print(every_seed(results, task))
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
    by_seed = list(by_seed_of(results, task, objective, "exact_match").values())
    failed = sum(run["failed"] is not None for run in runs)
    return [
        objective,
        f"{len(runs)}" + (f" ({failed} failed)" if failed else ""),
        *(with_spread(matches.get(step), percent) for step in steps),
        reached(by_seed, results.teachers.get(task)),
        with_spread(kl.get(steps[-1]) if steps else None, "{:.3f}".format),
        with_spread(mean_over_steps(runs, "kl_nats"), "{:.3f}".format),
        with_spread(mean_over_steps(runs, "variance_over_opd"), "{:.3f}".format),
        whole(mean_over_steps(runs, "teacher_bytes_per_token")),
        with_spread(median_of_steps(runs, "step_s"), "{:.1f}".format),
    ]


def by_seed_of(results: Results, task: str, objective: str, column: str) -> dict[int, list[tuple[int, float]]]:
    """(step, value) of every seed that has one, in the order of seeds and of steps."""
    points: dict[int, list[tuple[int, float]]] = {}
    for row in sorted(results.rows, key=lambda row: (row["seed"], row["step"])):
        if (row["task"], row["objective"]) == (task, objective) and row[column] is not None:
            points.setdefault(row["seed"], []).append((row["step"], row[column]))
    return points


def every_seed(results: Results, task: str) -> str:
    """Exact match in percent after every evaluation, and the last KL, an objective a row and a seed a column."""
    seeds = sorted({run["seed"] for run in results.runs if run["task"] == task})
    lines = ["| objective | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "| --- |" + " --- |" * len(seeds)]
    for objective in objectives_of(results, task):
        matches = by_seed_of(results, task, objective, "exact_match")
        kl = by_seed_of(results, task, objective, "kl_nats")
        told = []
        for seed in seeds:
            curve_of_seed = "/".join(f"{100 * value:.0f}" for _, value in matches.get(seed, []))
            last_kl = f", {kl[seed][-1][1]:.2f}" if seed in kl else ""
            told.append(f"{curve_of_seed} %{last_kl}" if curve_of_seed else NOT_MEASURED)
        lines.append(f"| {objective} | " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


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


def median_of_steps(runs: Iterable[Row], column: str) -> Spread | None:
    """The spread over runs of a step metric's median: the first step's warm-up, and a busy machine, weigh little."""
    return spread(statistics.median(run["steps"][column]) for run in runs if run["steps"][column])


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
