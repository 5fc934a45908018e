"""What a training step costs beside what it must: teacher forward, rollouts, update and optimizer against their floors.

The pieces take turns; medians. A floor is the operations of the matrix products and of attention over this machine's
measured rate at the same shapes, and for decoding the bytes that each step reads over the measured bandwidth. Each
piece is profiled once more, outside the timed runs.

    python bench/trainer_cost.py --model .cache/smollm2-135m-instruct --json bench/results/trainer.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from floors import ModelShape, measure_rates
from machine import machine_facts
from trainer_profile import profile_of
from trainer_workload import Piece, Sizes, TeacherForward, TrainingStep, threads
from vopd_client.model_files import load_causal_lm

MOST_OF_FLOOR, MOST_PADDING = 2.0, 0.2
PIECES = ("teacher forward", "rollouts", "update", "optimizer")
BARRED = PIECES[:3]  # the optimizer is told beside them


def main() -> int:
    arguments = _arguments()
    console = Console(width=120, stderr=True)
    sizes = Sizes()
    shape = ModelShape.of(load_causal_lm(arguments.model, trust_remote_code=False).config)
    rates = measure_rates(shape, tell=console.print)
    step = TrainingStep(arguments.model, sizes, rates)
    teacher = TeacherForward(arguments.model, sizes, rates, shape)
    try:
        seconds, pieces = _measure(step, teacher, arguments.repetitions, console)
        profiles = _profiles(step, teacher, shape.vocab_size, console)
    finally:
        teacher.close()
    rows = [_row(name, seconds[name], pieces[name], profiles[name]) for name in PIECES]
    show(rows, Console(width=120))
    if arguments.json:
        content = {
            "machine": machine_facts(("torch", "transformers")) | {"threads": threads()},
            "model": str(arguments.model),
            "sizes": asdict(sizes),
            "repetitions": arguments.repetitions,
            "rates": asdict(rates),
            "bars": {"time_over_floor": MOST_OF_FLOOR, "padding": MOST_PADDING},
            "rows": rows,
            "ratios": {row["piece"]: row["time_over_floor"] for row in rows},
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the results go")
    return parser.parse_args()


def _measure(
    step: TrainingStep, teacher: TeacherForward, repetitions: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, list[Piece]]]:
    """Rounds of all pieces, one after the other; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in PIECES}
    pieces: dict[str, list[Piece]] = {name: [] for name in PIECES}
    for number in range(repetitions + 1):

        def timed(name: str, work: Callable[[], Piece], counts: bool = number > 0) -> None:
            began = time.perf_counter()
            piece = work()
            if counts:
                seconds[name].append(time.perf_counter() - began)
                pieces[name].append(piece)

        timed("teacher forward", teacher.score)
        timed("rollouts", step.rollouts)
        batches = step.batches()
        timed("update", lambda: step.update(batches))  # noqa: B023 - called at once
        timed("optimizer", lambda: step.optimizer(batches))  # noqa: B023
        told = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items() if values)
        console.print(f"round {number} of {repetitions}: {told or 'warm-up'}")
    return seconds, pieces


def _profiles(
    step: TrainingStep, teacher: TeacherForward, vocab_size: int, console: Console
) -> dict[str, dict[str, Any]]:
    console.print("profiling")
    batches = step.batches()
    work: dict[str, Callable[[], Piece]] = {
        "teacher forward": teacher.score,
        "rollouts": step.rollouts,
        "update": lambda: step.update(batches),
        "optimizer": lambda: step.optimizer(batches),
    }
    return {name: profile_of(run, vocab_size=vocab_size, is_sampling=name == "rollouts") for name, run in work.items()}


def _row(name: str, seconds: list[float], pieces: list[Piece], profiled: dict[str, Any]) -> dict[str, Any]:
    ratios = [took / piece.floor_s for took, piece in zip(seconds, pieces, strict=True) if piece.floor_s]
    paddings = [piece.padding for piece in pieces if piece.padding is not None]
    return {
        "piece": name,
        "tokens": statistics.median(piece.tokens for piece in pieces),
        "seconds": statistics.median(seconds),
        "seconds_each": seconds,
        "tokens_per_s": statistics.median(piece.tokens / took for piece, took in zip(pieces, seconds, strict=True)),
        "floor_s": statistics.median(piece.floor_s for piece in pieces if piece.floor_s) if ratios else None,
        "time_over_floor": statistics.median(ratios) if ratios else None,
        "padding": max(paddings) if paddings else None,
        "profile": profiled,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a piece, its largest groups beside it; a bar that does not hold is marked."""
    table = Table(title="what a step costs, and what it must")
    for column in ("piece", "tokens", "seconds", "tokens/s", "floor s", "ratio", "padding"):
        table.add_column(column, justify="left" if column == "piece" else "right", no_wrap=True)
    table.add_column("where the time goes")
    for row in rows:
        shares = list(row["profile"]["shares"].items())[:5]
        ratio_bar = MOST_OF_FLOOR if row["piece"] in BARRED else None
        table.add_row(
            row["piece"],
            f"{row['tokens']:.0f}",
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_s']:.0f}",
            "-" if row["floor_s"] is None else f"{row['floor_s']:.3f}",
            _judged(row["time_over_floor"], ratio_bar, ".2f"),
            _judged(row["padding"], MOST_PADDING, ".1%"),
            ", ".join(f"{name} {share:.0%}" for name, share in shares),
        )
    console.print(table)


def _judged(value: float | None, most: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + (" (!)" if most is not None and value > most else "")


if __name__ == "__main__":
    raise SystemExit(main())
