"""The tables of `vopd-client compare`: final numbers, and the settings that differ. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vopd_client.compared import Subject, differing, held_out_kl, mean
from vopd_client.compared_pairs import Difference, Pairing
from vopd_client.evaluation_rows import parts, with_interval
from vopd_client.report import NOT_MEASURED, duration, spelled
from vopd_client.run_data import RunData, number


@dataclass(frozen=True)
class Line:
    """One number of every subject; is_part: of the line above, one kind of prompt."""

    label: str
    cells: list[str]
    is_part: bool = False


def final_numbers(subjects: Sequence[Subject]) -> list[Line]:
    """What was not measured by anybody is left out."""
    lines = [*_of_evaluations(subjects), *(_of_runs(subjects) if subjects[0].run is not None else [])]
    return [line for line in lines if any(cell != NOT_MEASURED for cell in line.cells)]


def settings_that_differ(subjects: Sequence[Subject]) -> list[Line]:
    return [Line(name, [spelled(value) for value in values]) for name, values in differing(subjects)]


@dataclass(frozen=True)
class PairLine:
    """One measure of a pairing, in words."""

    pair: str
    measure: str
    difference: str
    prompts: str
    is_clear: bool


def paired_lines(pairings: Sequence[Pairing]) -> list[PairLine]:
    return [
        PairLine(
            f"{pairing.other} − {pairing.reference}",
            difference.measure,
            points(difference),
            f"{difference.num_better} up, {difference.num_worse} down of {difference.num_prompts}",
            difference.is_clear,
        )
        for pairing in pairings
        for difference in pairing.differences
    ]


def paired_notes(pairings: Sequence[Pairing]) -> list[str]:
    """What people have to know of the pairings, or why there are none."""
    return [
        f"{pairing.other} and {pairing.reference}: {'' if pairing.differences else 'not paired: '}{pairing.note}"
        for pairing in pairings
        if pairing.note
    ]


def points(difference: Difference) -> str:
    """`+3.2 points (+0.4 to +6.1)`."""
    value = difference.estimate
    return f"{100 * value.mean:+.1f} points ({100 * value.low:+.1f} to {100 * value.high:+.1f})"


def _of_evaluations(subjects: Sequence[Subject]) -> list[Line]:
    lines = []
    labels = dict.fromkeys((measure.key, measure.label) for subject in subjects for measure in subject.measures)
    for key, label in labels:
        of_all = [
            next((m.estimate for m in subject.measures if (m.key, m.label) == (key, label)), None)
            for subject in subjects
        ]
        cells = [NOT_MEASURED if value is None else with_interval(value) for value in of_all]
        lines.append(Line(label, cells))
        by_kind = [
            {} if value is None else parts(subject.evaluation, key, "kind")
            for subject, value in zip(subjects, of_all, strict=True)
        ]
        kinds = list(dict.fromkeys(kind for kinds in by_kind for kind in kinds))
        for kind in kinds if len(kinds) > 1 else []:
            shown = [of_subject.get(kind) for of_subject in by_kind]
            lines.append(Line(kind, [NOT_MEASURED if it is None else with_interval(it) for it in shown], is_part=True))
    counts = [len((subject.evaluation or {}).get("num_right") or []) for subject in subjects]
    lines.append(Line("judged prompts", [str(count) if count else NOT_MEASURED for count in counts]))
    if any("num_cut" in (subject.evaluation or {}) for subject in subjects):
        lines.append(Line("completions cut at the limit", [_cut(subject) for subject in subjects]))
    return lines


def _cut(subject: Subject) -> str:
    row = subject.evaluation or {}
    return f"{row['num_cut']} of {row['num_completions']}" if row.get("num_completions") else NOT_MEASURED


def _of_runs(subjects: Sequence[Subject]) -> list[Line]:
    runs = [subject.run for subject in subjects if subject.run is not None]

    def line(label: str, value: Callable[[RunData], float], form: Callable[[float], str]) -> Line:
        found = [value(run) for run in runs]
        return Line(label, [NOT_MEASURED if math.isnan(item) else form(item) for item in found])

    def last_kl(run: RunData) -> float:
        measured = held_out_kl(run)
        return measured[-1][1] if measured else math.nan

    def rollout_kl(run: RunData) -> float:
        values = run.column("kl_nats")
        return mean(values[-max(1, len(values) // 10) :])

    def median_norm(run: RunData) -> float:
        known = [value for value in run.column("grad_norm") if not math.isnan(value)]
        return statistics.median(known) if known else math.nan

    def total(column: str) -> Callable[[RunData], float]:
        return lambda run: sum(run.column(column))

    def share_waited(run: RunData) -> float:
        seconds = sum(run.column("step_s"))
        return sum(run.column("teacher_wait_s")) / seconds if seconds else math.nan

    def tokens_per_s(run: RunData) -> float:
        seconds = sum(run.column("step_s"))
        return sum(run.column("num_valid_tokens")) / seconds if seconds else math.nan

    return [
        line("KL to the teacher, held-out, nats", last_kl, lambda value: f"{value:.3f}"),
        line("KL on the last tenth of the steps, nats", rollout_kl, lambda value: f"{value:.3f}"),
        Line("steps", [_steps(run) for run in runs]),
        line("completion tokens learned from", total("num_valid_tokens"), lambda value: f"{value:,.0f}"),
        line("training time", total("step_s"), duration),
        line("tokens a second", tokens_per_s, lambda value: f"{value:,.1f}"),
        line("time spent waiting for the teacher", share_waited, lambda value: f"{value:.0%}"),
        line("gradient norm, median", median_norm, lambda value: f"{value:.3g}"),
        line(
            "noise of the gradient, share of opd's",
            lambda run: mean(run.column("variance_over_opd")),
            lambda value: f"{value:.0%}",
        ),
    ]


def _steps(run: RunData) -> str:
    planned = number(run.config.get("steps"))
    is_short = not math.isnan(planned) and run.last_step < planned
    return f"{run.last_step} of {planned:.0f}, not finished" if is_short else str(run.last_step)
