"""`vopd-client compare`: runs, or results of evaluations, beside one another: a picture, a page and tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vopd_client.command_config import CompareConfig
from vopd_client.compared import Subject, read_subjects
from vopd_client.compared_pairs import Pairing, pair_with_first
from vopd_client.compared_tables import Line, final_numbers, paired_lines, paired_notes, settings_that_differ
from vopd_client.errors import RunDirectoryError
from vopd_client.page import render_template
from vopd_client.report import Comparison
from vopd_client.sampled_metrics import INTERVAL_METHOD

MAX_NAME_LENGTH = 100  # of the directory that is made, in characters
MAX_COMPARISONS = 8  # prompts whose completions the page shows


def run_compare(config: CompareConfig, console: Console | None = None) -> list[Path]:
    """Writes comparison.png and comparison.html, prints the tables, and returns the two paths.

    Raises: ConfigError and RunDirectoryError, before anything is written, for what cannot be compared or read.
    """
    subjects = read_subjects(config.inputs)
    directory = config.comparison_dir or default_directory(subjects)
    if (directory / "metrics.jsonl").exists():
        raise RunDirectoryError(f"{directory} holds a run: give another comparison_dir")
    pairings = pair_with_first(subjects)
    from vopd_client.compared_plot import comparison_svg, write_comparison_png  # matplotlib, once there is what to draw

    png, page = directory / "comparison.png", directory / "comparison.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_comparison_png(subjects, pairings, png)
        page.write_text(render_page(subjects, pairings, svg=comparison_svg(subjects, pairings)), encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"cannot write the comparison into {directory}: {error.strerror or error}") from error
    show(subjects, pairings, console or Console())
    return [png, page]


def default_directory(subjects: Sequence[Subject]) -> Path:
    """`comparison-a-b` beside the first that is compared; of more than three, the first two and how many more."""
    names = [re.sub(r"[^\w.=+-]+", "-", subject.label).strip("-.") for subject in subjects]
    if len(names) > 3:
        names = [*names[:2], f"and-{len(names) - 2}-more"]
    return subjects[0].path.resolve().parent / "-".join(["comparison", *names])[:MAX_NAME_LENGTH]


def render_page(subjects: Sequence[Subject], pairings: Sequence[Pairing], *, svg: str) -> str:
    """comparison.html; everything that comes from runs and results is escaped."""
    from markupsafe import Markup

    from vopd_client.compared_plot import look_of

    of_runs = subjects[0].run is not None
    numbers = final_numbers(subjects)
    return render_template(
        "comparison_template.html.j2",
        {
            "title": title(subjects),
            "facts": facts(subjects),
            "of_runs": of_runs,
            "subjects": [
                {"label": subject.label, "path": str(subject.path.resolve()), "colour": look_of(place)["color"]}
                for place, subject in enumerate(subjects)
            ],
            "numbers": numbers,
            "interval_hint": _interval_hint(numbers, of_runs=of_runs),
            "pairs": paired_lines(pairings),
            "pair_notes": paired_notes(pairings),
            "svg": Markup(svg),
            "settings": settings_that_differ(subjects),
            "comparisons": same_prompts(subjects),
        },
    )


def title(subjects: Sequence[Subject]) -> str:
    names = [subject.label for subject in subjects]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def facts(subjects: Sequence[Subject]) -> list[str]:
    """The line under the title: what is the same in all of them."""
    what = "runs" if subjects[0].run is not None else "results"
    shared = []
    for name in ("objective", "student", "model", "prompts", "eval_prompts"):
        values = [subject.settings.get(name) for subject in subjects]
        if values[0] and all(value == values[0] for value in values):
            shared.append(f"{name.replace('_', ' ')} {values[0]}")
    return [f"{len(subjects)} {what}", *shared]


def same_prompts(subjects: Sequence[Subject]) -> list[Comparison]:
    """The completions that the last evaluations show, of prompts that more than one of them shows."""
    found: dict[str, Comparison] = {}
    for subject in subjects:
        for sample in shown_samples(subject):
            comparison = found.setdefault(sample["prompt"], Comparison(sample["prompt"], sample.get("answer"), []))
            comparison.completions.append((subject.label, sample["completion"], sample.get("correct")))
    return [it for it in found.values() if len({who for who, *_ in it.completions}) > 1][:MAX_COMPARISONS]


def shown_samples(subject: Subject) -> list[dict[str, Any]]:
    """prompt, completion, answer, correct: of an evaluation in a run, and of a result, which keeps them by prompt."""
    row = subject.evaluation or {}
    if "samples" in row:
        return list(row["samples"])
    return [
        {
            "prompt": prompt["prompt"],
            "completion": prompt["first_completion"],
            "answer": prompt["answer"],
            "correct": prompt["correct"][0],
        }
        for prompt in row.get("per_prompt") or []
        if "first_completion" in prompt
    ]


def show(subjects: Sequence[Subject], pairings: Sequence[Pairing], console: Console) -> None:
    """The tables of the page, for the terminal."""
    numbers = final_numbers(subjects)
    console.print(_table("", subjects, numbers))
    if hint := _interval_hint(numbers, of_runs=subjects[0].run is not None):
        console.print(hint, markup=False, highlight=False)
    if pairs := paired_lines(pairings):
        table = Table("paired difference", "measure", box=box.SIMPLE_HEAD)
        for column in ("95 % interval over prompts", "prompts"):
            table.add_column(column, justify="right")
        for pair in pairs:
            cells = (pair.pair, pair.measure, pair.difference, pair.prompts)
            table.add_row(*(Text(cell, style="bold" if pair.is_clear else "") for cell in cells))
        console.print(table)
    for note in paired_notes(pairings):
        console.print(note, markup=False, highlight=False)
    if settings := settings_that_differ(subjects):
        console.print(_table("set differently", subjects, settings))


def _table(first: str, subjects: Sequence[Subject], lines: Sequence[Line]) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD)
    for subject in subjects:
        table.add_column(Text(subject.label), justify="right")
    for line in lines:
        label = Text(f"  {line.label}", style="dim") if line.is_part else Text(line.label)
        table.add_row(label, *(Text(cell) for cell in line.cells))
    return table


def _interval_hint(numbers: Sequence[Line], *, of_runs: bool) -> str:
    """What stands in parentheses, and of which evaluation the numbers are."""
    has_interval = any("(" in cell for line in numbers for cell in line.cells)
    parts = ["Held-out numbers are those of each run's last evaluation."] if of_runs else []
    return " ".join([*parts, *([f"In parentheses: {INTERVAL_METHOD}."] if has_interval else [])])
