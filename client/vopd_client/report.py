"""What a run looks like to people: curves.png, timeline.png and report.html, drawn from the run's own files."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vopd_client.errors import RunDirectoryError
from vopd_client.evaluation_rows import SAMPLED, interval, measures, parts, with_interval
from vopd_client.page import render_template
from vopd_client.run_data import Row, RunData, number, read_run
from vopd_client.sampled_metrics import INTERVAL_METHOD, Estimate

NOT_MEASURED = "–"
TEACHER_NOTE = "the teacher itself:"
PACKAGES = ("vopd", "torch", "transformers", "accelerate", "peft", "numpy", "grpcio")


def write_report(run_dir: Path) -> list[Path]:
    """Writes curves.png, report.html, and timeline.png where there is a timeline; returns their paths.

    Works for a run that goes on, was cut off, has no evaluations, or has one step. The page is one file: no script,
    nothing from elsewhere.

    Raises: RunDirectoryError when there is no metrics.jsonl, a file is damaged, or the directory cannot be written.
    """
    run = read_run(run_dir)
    from vopd_client.plots import svg, write_png  # matplotlib, only once there is something to draw
    from vopd_client.timeline_plot import timeline_svg, write_timeline_png

    curves, page, timeline = run_dir / "curves.png", run_dir / "report.html", run_dir / "timeline.png"
    try:
        write_png(run, curves)
        text = render_page(run, curves_svg=svg(run), timeline_svg=timeline_svg(run))
        page.write_text(text, encoding="utf-8")
        has_timeline = write_timeline_png(run, timeline)
    except OSError as error:
        raise RunDirectoryError(f"cannot write the report into {run_dir}: {error.strerror or error}") from error
    return [curves, page, timeline] if has_timeline else [curves, page]


def render_page(run: RunData, *, curves_svg: str, timeline_svg: str | None = None) -> str:
    """report.html; everything that comes from the run is escaped. timeline_svg: None leaves that part out."""
    from markupsafe import Markup

    return render_template(
        "report_template.html.j2",
        {
            "name": run.name,
            "facts": facts(run),
            "figures": headline(run),
            "has_teacher": run.teacher is not None,
            "table": before_and_after(run),
            "sampled_hint": sampled_hint(run),
            "teachers": teacher_rows(run),
            "curves_svg": Markup(curves_svg),
            "timeline_svg": None if timeline_svg is None else Markup(timeline_svg),
            "comparisons": comparisons(run),
            "settings": {name: spelled(value) for name, value in run.config.items()},
            "environment": environment(),
        },
    )


# ---------------------------------------------------------------- what the page says


@dataclass(frozen=True)
class Figure:
    """One of the large numbers at the top."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class TableRow:
    """A measure before and after training; `teacher` is the teacher's own."""

    label: str
    before: str
    after: str
    teacher: str
    is_part: bool  # of the row above: one kind of prompt


@dataclass(frozen=True)
class Comparison:
    """One held-out prompt: who completed it, with what, and whether that was right (None: nothing to compare with)."""

    prompt: str
    answer: str | None
    completions: list[tuple[str, str, bool | None]]


def facts(run: RunData) -> list[str]:
    """The line under the title."""
    planned = run.config.get("steps")
    steps = f"{run.last_step} steps" if run.last_step != 1 else "1 step"
    if planned is not None and run.last_step < planned:
        steps = f"{run.last_step} of {planned} steps: the run goes on, or was cut off"
    named = run.config.get("teacher") or {}
    teacher = run.config.get("teacher_model") or ", ".join([*(run.config.get("teacher_url") or []), *named])
    parts = [
        ("objective", run.config.get("objective")),
        ("student", run.config.get("student")),
        ("teachers" if len(named) > 1 else "teacher", teacher),
    ]
    return [steps, *(f"{label} {value}" for label, value in parts if value)]


def headline(run: RunData) -> list[Figure]:
    """The numbers that a reader wants first; those that were not measured are left out."""
    before, after, teacher = (row or {} for row in (run.before, run.after, run.teacher))
    found = []
    for measure in measures(after)[:1]:
        start = next((of_start.estimate.mean for of_start in measures(before) if of_start.key == measure.key), None)
        around = f"{interval(measure.estimate)} %" if measure.key in SAMPLED else None
        of_teacher = None if teacher.get("exact_match") is None else percent(teacher["exact_match"])
        notes = [("95 %:", around), ("from", None if start is None else percent(start)), (TEACHER_NOTE, of_teacher)]
        note = "; ".join(f"{label} {value}" for label, value in notes if value is not None)
        label = "Exact match" if measure.key == "exact_match" else measure.label
        found.append(Figure(f"{label}, held-out", percent(measure.estimate.mean), note))
    if after.get("kl_nats") is not None:
        start, end, where = before.get("kl_nats"), after["kl_nats"], ", held-out"
    else:
        start, end, where = run.metrics[0].get("kl_nats"), run.metrics[-1].get("kl_nats"), ""
    note = "nats per token" + (f", from {nats(start)}" if start is not None else "")
    found.append(Figure(f"KL to the teacher{where}", nats(end), note))
    shares = _known(run.column("variance_over_opd"))
    if shares:
        found.append(
            Figure("Noise of the gradient", f"{sum(shares) / len(shares):.0%}", "of opd's variance at the same states")
        )
    seconds = run.summary.get("train_seconds", sum(_known(run.column("step_s"))))
    waited = run.summary.get("teacher_wait_seconds", sum(_known(run.column("teacher_wait_s"))))
    share = waited / seconds if seconds else 0.0
    found.append(Figure("Training time", duration(seconds), f"{share:.0%} of it waiting for the teacher"))
    per_token = run.summary.get("teacher_bytes_per_token", run.metrics[-1].get("teacher_bytes_per_token"))
    if per_token is not None:
        found.append(Figure("Traffic with the teacher", f"{per_token:,.0f} B", "per completion token, both ways"))
    return found


def before_and_after(run: RunData) -> list[TableRow]:
    """Exact match and KL, over all prompts, by kind and by teacher; empty without evaluations of the student."""
    if not run.student_evaluations:
        return []
    sides = [row or {} for row in (run.before, run.after, run.teacher)]
    rows = sampled_rows(sides)
    for label, key, stem, show in (
        ("Exact match", "exact_match", "exact_match", percent),
        ("KL to the teacher, nats per token", "kl_nats", "kl", nats),
    ):
        if all(side.get(key) is None for side in sides):
            continue
        rows.append(_table_row(label, [show(side.get(key)) for side in sides]))
        for by, prefix in (("kind", ""), ("teacher", "teacher ")):
            of_sides = [side.get(f"{stem}_by_{by}") or {} for side in sides]
            parts = list(dict.fromkeys(part for of_side in of_sides for part in of_side))
            if len(parts) > 1:
                for part in parts:
                    values = [show(of_side.get(part)) for of_side in of_sides]
                    rows.append(_table_row(prefix + part, values, is_part=True))
    return rows


def sampled_rows(sides: Sequence[Row]) -> list[TableRow]:
    """avg@n, pass@n and maj@n with intervals, by kind and by teacher; a side without has dashes."""

    def shown(values: Sequence[Estimate | None]) -> list[str]:
        return [NOT_MEASURED if value is None else with_interval(value) for value in values]

    found = [{measure.key: measure for measure in measures(side)} for side in sides]
    rows = []
    for key in SAMPLED:
        there = next((of_side[key] for of_side in found if key in of_side), None)
        if there is None:
            continue
        values = [of_side[key].estimate if key in of_side else None for of_side in found]
        rows.append(_table_row(there.label, shown(values)))
        for by, prefix in (("kind", ""), ("teacher", "teacher ")):
            of_sides = [parts(side, key, "kind" if by == "kind" else "teacher") for side in sides]
            names = list(dict.fromkeys(name for of_side in of_sides for name in of_side))
            for name in names if len(names) > 1 else []:
                cells = shown([of_side.get(name) for of_side in of_sides])
                rows.append(_table_row(prefix + name, cells, is_part=True))
    return rows


def sampled_hint(run: RunData) -> str:
    """What stands in the parentheses of sampled measures; empty in a run without."""
    main = run.main_measure
    return f"In parentheses: {INTERVAL_METHOD}." if main is not None and main.key in SAMPLED else ""


def _table_row(label: str, values: Sequence[str], *, is_part: bool = False) -> TableRow:
    before, after, teacher = values
    return TableRow(label, before, after, teacher, is_part)


@dataclass(frozen=True)
class TeacherRow:
    """What one of a run's teachers did in training. KL: of the first and of the last step that has rows of its own."""

    name: str
    address: str
    share_of_tokens: str
    first_kl: str
    last_kl: str
    waited: str
    bytes_per_token: str


def teacher_rows(run: RunData) -> list[TeacherRow]:
    """A row for each teacher that has a name; empty in a run whose only teacher has none."""
    all_tokens = sum(_known(run.column("num_valid_tokens")))
    rows = []
    for name in run.teacher_names:
        tokens, waited, num_bytes, kl = (
            _known(run.column(f"teacher/{name}/{metric}"))
            for metric in ("num_valid_tokens", "wait_s", "bytes", "kl_nats")
        )
        rows.append(
            TeacherRow(
                name=name,
                address=", ".join((run.config.get("teacher") or {}).get(name) or []) or NOT_MEASURED,
                share_of_tokens=percent(sum(tokens) / all_tokens if all_tokens else None),
                first_kl=nats(kl[0] if kl else None),
                last_kl=nats(kl[-1] if kl else None),
                waited=duration(sum(waited)),
                bytes_per_token=f"{sum(num_bytes) / sum(tokens):,.0f} B" if sum(tokens) else NOT_MEASURED,
            )
        )
    return rows


def comparisons(run: RunData) -> list[Comparison]:
    """The samples that the evaluations show, prompt by prompt."""
    sides = [("before training", run.before), ("after training", run.after), ("the teacher", run.teacher)]
    found: dict[str, Comparison] = {}
    for who, row in sides:
        for sample in (row or {}).get("samples") or []:
            comparison = found.setdefault(sample["prompt"], Comparison(sample["prompt"], sample.get("answer"), []))
            comparison.completions.append((who, sample["completion"], sample.get("correct")))
    return list(found.values())


def environment() -> dict[str, str]:
    """Of the process that writes the report; that is the run's own where the run wrote it."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "Python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
        "system": platform.platform(terse=True),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
    }


# ---------------------------------------------------------------- how it says it


def percent(value: object) -> str:
    return NOT_MEASURED if value is None else f"{number(value):.1%}".replace(".0%", "%")


def nats(value: object) -> str:
    return NOT_MEASURED if value is None else f"{number(value):.3f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if value == value]


def spelled(value: Any) -> str:
    """A setting as a configuration file would spell it."""
    if value in (None, [], {}, ""):
        return NOT_MEASURED
    match value:
        case bool():
            return str(value).lower()
        case list():
            return ", ".join(str(item) for item in value)
        case dict():
            return ", ".join(f"{name}={spelled(item)}" for name, item in value.items())
        case _:
            return str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
