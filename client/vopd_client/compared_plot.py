"""Runs, or results, side by side in one figure: as a PNG, and as an SVG whose neutral colours follow the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from vopd_client.compared import Subject, held_out_kl
from vopd_client.compared_pairs import Pairing
from vopd_client.evaluation_rows import Measure, measures, parts
from vopd_client.plots import BLUE, GREEN, INK, MANY_STEPS, ORANGE, PINK, PURPLE, STYLE, band, running_mean, svg_of
from vopd_client.sampled_metrics import Estimate

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, PINK)
MARKERS = ("o", "s", "^", "D", "v")
SECOND_ROUND = (0, (4, 2))  # the dashes of subjects beyond five

Draw = Callable[[Any], None]


def write_comparison_png(subjects: Sequence[Subject], pairings: Sequence[Pairing], path: Path) -> None:
    """Raises: OSError."""
    with mpl.rc_context(STYLE):
        _figure(subjects, pairings, width_inches=13).savefig(path, dpi=150, facecolor="white")


def comparison_svg(subjects: Sequence[Subject], pairings: Sequence[Pairing]) -> str:
    """An <svg> element for the page."""
    with mpl.rc_context(STYLE):
        return svg_of(_figure(subjects, pairings, width_inches=11.4))


def look_of(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the subject at `place`, no two of ten the same.

    Lines that are drawn later are thinner: where two runs have the same numbers, the one below still shows.
    """
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if place < len(COLOURS) else SECOND_ROUND,
        "linewidth": max(1.3, 2.8 - 0.6 * place),
    }


def _figure(subjects: Sequence[Subject], pairings: Sequence[Pairing], *, width_inches: float) -> Figure:
    is_runs = subjects[0].run is not None
    panels = run_panels(subjects) if is_runs else result_panels(subjects, pairings)
    columns = 3 if len(panels) > 4 else max(1, min(2, len(panels)) if is_runs else len(panels))
    rows = max(1, -(-len(panels) // columns))
    legend_rows = sum(len(subject.label) + 8 for subject in subjects) // (11 * int(width_inches)) + 1
    height = 3.0 * rows if is_runs else _height_of_results(subjects)
    figure = Figure(
        figsize=(width_inches, height + 0.3 * legend_rows + 0.25),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06),
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, draw in zip(grid.flat, panels, strict=False):
        draw(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], label=subject.label, markersize=6, **look_of(place) | {"linewidth": 2 if is_runs else 0})
        for place, subject in enumerate(subjects)
    ]
    per_row = -(-len(subjects) // legend_rows)
    figure.legend(handles=handles, loc="outside upper left", ncols=per_row, fontsize=10, handlelength=2.2)
    return figure


# ---------------------------------------------------------------- runs: curves


def run_panels(subjects: Sequence[Subject]) -> list[Draw]:
    """What is drawn of runs: quality over steps and over cost, and how it was reached. Only what was measured."""
    main = next((subject.run.main_measure for subject in subjects if subject.run and subject.run.main_measure), None)
    by_step = _Axis("step", lambda subject: {step: float(step) for step in _all_steps(subject)})
    by_time = _time_axis(subjects)
    by_tokens = _Axis("completion tokens learned from", lambda subject: subject.tokens_at)
    candidates = [
        (_curves(subjects, by_step, "kl_nats", "KL of training rollouts, nats per token"), _has(subjects, "kl_nats")),
        (_held_out(subjects, by_step, "KL of held-out prompts, nats per token"), _has_held_out(subjects)),
        (_answers(subjects, by_step, main), main is not None),
        (_curves(subjects, by_time, "kl_nats", "KL of training rollouts, by time"), by_time.any_of(subjects)),
        (
            _held_out(subjects, by_tokens, "KL of held-out prompts, by tokens"),
            _has_held_out(subjects) and by_tokens.any_of(subjects),
        ),
        (_answers(subjects, by_time, main), main is not None and by_time.any_of(subjects)),
        (_curves(subjects, by_step, "tokens_per_s", "Completion tokens a second"), _has(subjects, "tokens_per_s")),
        (_curves(subjects, by_step, "grad_norm", "Gradient norm before clipping"), _has(subjects, "grad_norm")),
        (
            _curves(subjects, by_step, "variance_over_opd", "Noise of the gradient, share of opd's", is_share=True),
            _has(subjects, "variance_over_opd"),
        ),
    ]
    return [draw for draw, is_there in candidates if is_there]


class _Axis:
    """What stands below a panel: a value for every step of a subject; a subject without is left out."""

    def __init__(self, label: str, values: Callable[[Subject], dict[int, float]]) -> None:
        self.label = label
        self.values = values

    def any_of(self, subjects: Sequence[Subject]) -> bool:
        return any(len(self.values(subject)) > 1 for subject in subjects)

    def label_on(self, axes: Any) -> None:
        axes.set_xlabel(self.label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _time_axis(subjects: Sequence[Subject]) -> _Axis:
    longest = max((max(subject.seconds_at.values(), default=0.0) for subject in subjects), default=0.0)
    unit, seconds = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)
    return _Axis(
        f"training time, {unit}",
        lambda subject: {step: value / seconds for step, value in subject.seconds_at.items()},
    )


def _all_steps(subject: Subject) -> list[int]:
    run = subject.run
    return [] if run is None else [0, *(int(row["step"]) for row in run.metrics)]


def _curves(subjects: Sequence[Subject], axis: _Axis, column: str, title: str, *, is_share: bool = False) -> Draw:
    """A metric of every step; over many steps the single values step back behind their running mean."""

    def draw(axes: Any) -> None:
        axes.set_title(title)
        for place, subject in enumerate(subjects):
            run = subject.run
            at = axis.values(subject)
            if run is None or not at:
                continue
            xs = [at[int(row["step"])] for row in run.metrics]
            values = run.column(column)
            look = look_of(place) | {"marker": ""}
            if len(xs) > MANY_STEPS:
                axes.plot(xs, values, color=look["color"], alpha=0.16, linewidth=1)
                values = running_mean(values, len(values) // 50)
            axes.plot(xs, values, **look)
            if len(xs) == 1:
                axes.plot(xs, values, **look_of(place))
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(bottom=0)
        if is_share:
            axes.axhline(1, color=INK, alpha=0.55, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.label_on(axes)

    return draw


def _held_out(subjects: Sequence[Subject], axis: _Axis, title: str) -> Draw:
    def draw(axes: Any) -> None:
        axes.set_title(title)
        for place, subject in enumerate(subjects):
            at = axis.values(subject)
            points = (
                [] if subject.run is None else [(at[step], kl) for step, kl in held_out_kl(subject.run) if step in at]
            )
            if points:
                axes.plot(*zip(*points, strict=True), markersize=6, **look_of(place))
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(bottom=0)
        axis.label_on(axes)

    return draw


def _answers(subjects: Sequence[Subject], axis: _Axis, main: Measure | None) -> Draw:
    """The main measure with its interval; a run that measured another one is left out, and the title says which."""

    def draw(axes: Any) -> None:
        assert main is not None
        label = main.label[0].upper() + main.label[1:] if main.key == "exact_match" else main.label
        axes.set_title(f"{label}, held-out prompts" if axis.label == "step" else f"{label}, by time")
        for place, subject in enumerate(subjects):
            at = axis.values(subject)
            rows = [] if subject.run is None else subject.run.student_evaluations
            found = [(int(row["step"]), _same_measure(measures(row), main)) for row in rows]
            points = [(at[step], value) for step, value in found if value is not None and step in at]
            if points:
                look = look_of(place)
                band(axes, [x for x, _ in points], [value for _, value in points], look.pop("color"), None, **look)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(max(high, 0.1), 1.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.label_on(axes)

    return draw


def _same_measure(found: Sequence[Measure], main: Measure) -> Estimate | None:
    return next((it.estimate for it in found if (it.key, it.label) == (main.key, main.label)), None)


def _has(subjects: Sequence[Subject], column: str) -> bool:
    return any(subject.run and any(not math.isnan(v) for v in subject.run.column(column)) for subject in subjects)


def _has_held_out(subjects: Sequence[Subject]) -> bool:
    return any(subject.run and held_out_kl(subject.run) for subject in subjects)


# ---------------------------------------------------------------- results: points with intervals


def result_panels(subjects: Sequence[Subject], pairings: Sequence[Pairing]) -> list[Draw]:
    """The measures; the main one by kind where there are several; the paired differences where there are any."""
    labels = _measure_labels(subjects)
    rows = [(label, [_estimate_of(subject, label) for subject in subjects]) for label in labels]
    panels = [_intervals("Over all prompts", rows, [look_of(place) for place in range(len(subjects))])]
    main = next(measure for subject in subjects for measure in subject.measures)
    kinds = _kinds(subjects, main)
    if len(kinds) > 1:
        by_kind = [parts(subject.evaluation, main.key, "kind") for subject in subjects]
        kind_rows = [(kind, [of_subject.get(kind) for of_subject in by_kind]) for kind in kinds]
        looks = [look_of(place) for place in range(len(subjects))]
        panels.append(_intervals(f"{main.label} by kind of prompt", kind_rows, looks))
    if any(pairing.differences for pairing in pairings):
        names = list(dict.fromkeys(d.measure for pairing in pairings for d in pairing.differences))
        pair_rows = [
            (name, [next((d.estimate for d in it.differences if d.measure == name), None) for it in pairings])
            for name in names
        ]
        looks = [look_of(place + 1) for place in range(len(pairings))]
        panels.append(_intervals("Paired difference", pair_rows, looks, against=subjects[0].label))
    return panels


def shortened(label: str, length: int = 30) -> str:
    return label if len(label) <= length else f"{label[: length - 1]}…"


def _measure_labels(subjects: Sequence[Subject]) -> list[str]:
    return list(dict.fromkeys(measure.label for subject in subjects for measure in subject.measures))


def _estimate_of(subject: Subject, label: str) -> Estimate | None:
    return next((measure.estimate for measure in subject.measures if measure.label == label), None)


def _kinds(subjects: Sequence[Subject], main: Measure) -> list[str]:
    return list(dict.fromkeys(kind for subject in subjects for kind in parts(subject.evaluation, main.key, "kind")))


def _height_of_results(subjects: Sequence[Subject]) -> float:
    main = next(measure for subject in subjects for measure in subject.measures)
    groups = max(len(_measure_labels(subjects)), len(_kinds(subjects, main)))
    return max(2.2, 0.9 + groups * (0.26 + 0.19 * len(subjects)))


def _intervals(
    title: str,
    rows: Sequence[tuple[str, Sequence[Estimate | None]]],
    looks: Sequence[dict[str, Any]],
    *,
    against: str = "",
) -> Draw:
    """A group of points for each row, from the top down, each point with its interval, in percent.

    against: whom the values are differences to, in points.
    """

    def draw(axes: Any) -> None:
        axes.set_title(title)
        height = min(0.62, 0.28 * (len(looks) - 1))
        step = height / max(1, len(looks) - 1)
        for group, (_, values) in enumerate(rows):
            for place, (value, look) in enumerate(zip(values, looks, strict=True)):
                if value is None:
                    continue
                y = group - height / 2 + step * place
                has_interval = not math.isnan(value.low)
                if has_interval:
                    axes.plot(
                        [100 * value.low, 100 * value.high], [y, y], color=look["color"], linewidth=2.2, alpha=0.55
                    )
                axes.plot([100 * value.mean], [y], color=look["color"], marker=look["marker"], markersize=7)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [shortened(label, 22) for label, _ in rows])
        axes.grid(axis="y", visible=False)
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color=mpl.rcParams["grid.color"], linewidth=0.8)
        if against:
            axes.axvline(0, color=INK, alpha=0.6, linewidth=1.2)
            axes.set_xlabel(f"points more than {shortened(against)}")
        else:
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, -2), min(high, 102))
            axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))

    return draw
