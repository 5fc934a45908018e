"""The curves of a run: six panels over the optimizer steps, as a matplotlib figure.

One figure serves both looks: on its own as a PNG, and inside the report as an SVG whose neutral colours follow the
page, light or dark.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vopd_client.evaluation_rows import parts
from vopd_client.run_data import RunData, number
from vopd_client.sampled_metrics import Estimate

# Colours that keep apart for colour-blind readers and read on white as well as on a dark page.
BLUE, ORANGE, GREEN, PURPLE, PINK = "#3f7fd9", "#e07b2f", "#2a9d78", "#8f6fd1", "#d0568c"
KIND_COLOURS = (ORANGE, GREEN, PURPLE, PINK)
TEACHER_COLOURS = (GREEN, PURPLE, PINK)  # beside the whole in blue and held-out prompts in orange
# Neutral colours, each used for nothing else, so that the SVG can hand them over to the page.
INK, GRID = "#333a42", "#e3e7ec"
DASHES = (0, (4, 3))

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "svg.hashsalt": "vopd",  # equal runs give equal files
}
MANY_STEPS = 60  # from here on: areas instead of bars, running means instead of dots


def write_png(run: RunData, path: Path) -> None:
    """Raises: OSError."""
    with mpl.rc_context(STYLE):
        _figure(run, width_inches=13, title=True).savefig(path, dpi=150, facecolor="white")


def svg(run: RunData) -> str:
    """An <svg> element for an HTML page: neutral colours are the page's text colour and its variable --grid."""
    with mpl.rc_context(STYLE):
        figure = _figure(run, width_inches=11.4, title=False)
        return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """An <svg> element whose neutral colours are the page's; inside `STYLE`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")


def _figure(run: RunData, *, width_inches: float, title: bool) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(width_inches, 7.2 if title else 6.6), layout=layout)
    if title:
        objective = f"  ·  {run.config['objective']}" if "objective" in run.config else ""
        figure.suptitle(f"{run.name}{objective}", x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    panels: Sequence[Callable[[Any, RunData], None]] = (
        _kl, _answers if run.kinds else _completions, _seconds, _grad_norm, _variance, _support,
    )  # fmt: skip
    for axes, draw in zip(figure.subplots(2, 3).flat, panels, strict=True):
        draw(axes, run)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
        first = 0 if run.student_evaluations else 1
        axes.set_xlim(first - 0.5, max(run.last_step, first + 1) + 0.5)
        axes.margins(y=0.08)
    return figure


# ---------------------------------------------------------------- panels


def _kl(axes: Any, run: RunData) -> None:
    axes.set_title("KL(student ‖ teacher), nats per token")
    _curve(axes, run, "kl_nats", BLUE, "training rollouts")
    names = run.teacher_names
    for name, colour in zip(names if len(names) > 1 else [], cycle(TEACHER_COLOURS), strict=False):
        _curve(axes, run, f"teacher/{name}/kl_nats", colour, f"those of teacher {name}", is_part=True)
    held_out = [(row["step"], number(row.get("kl_nats"))) for row in run.student_evaluations]
    held_out = [(step, value) for step, value in held_out if not math.isnan(value)]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=ORANGE, marker="o", markersize=6, label="held-out prompts")
    _from_zero(axes)
    axes.legend(loc="best")


def _answers(axes: Any, run: RunData) -> None:
    """Exact match or avg@n by kind, the latter with its interval."""
    main = run.main_measure
    label = "Exact match" if main is None or main.key == "exact_match" else main.label
    axes.set_title(f"{label}, held-out prompts")
    for index, kind in enumerate(run.kinds):
        colour = KIND_COLOURS[index % len(KIND_COLOURS)] if len(run.kinds) > 1 else BLUE
        found = (
            [(row["step"], parts(row, main.key, "kind").get(kind)) for row in run.student_evaluations] if main else []
        )
        points = [(step, value) for step, value in found if value is not None]
        if points:
            band(axes, [step for step, _ in points], [value for _, value in points], colour, kind)
        own = number(((run.teacher or {}).get("exact_match_by_kind") or {}).get(kind))
        axes.axhline(own, color=colour, linestyle=DASHES, linewidth=1.3)
    if run.teacher is not None:
        axes.plot([], [], color=INK, alpha=0.7, linestyle=DASHES, linewidth=1.3, label="the teacher itself")
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="best")


def _completions(axes: Any, run: RunData) -> None:
    axes.set_title("Completion length, tokens")
    _curve(axes, run, "completion_tokens_mean", BLUE)
    _from_zero(axes)


def _seconds(axes: Any, run: RunData) -> None:
    axes.set_title("Seconds per step")
    steps = run.column("step")
    parts = {
        "rollouts": (BLUE, _zero_for_missing(run.column("rollout_s"))),
        "update": (GREEN, _zero_for_missing(run.column("update_s"))),
        "teacher wait": (ORANGE, _zero_for_missing(run.column("teacher_wait_s"))),
    }
    if len(steps) > MANY_STEPS:
        colours = [colour for colour, _ in parts.values()]
        axes.stackplot(steps, *[values for _, values in parts.values()], colors=colours, labels=list(parts), alpha=0.85)
    else:
        bottom = [0.0] * len(steps)
        for label, (colour, values) in parts.items():
            axes.bar(steps, values, bottom=bottom, width=0.72, color=colour, alpha=0.85, label=label)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_ylim(0, 1.35 * max(map(sum, zip(*[values for _, values in parts.values()], strict=True))) or 1)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right", ncols=3, columnspacing=1.2, handletextpad=0.5)


def _grad_norm(axes: Any, run: RunData) -> None:
    axes.set_title("Gradient norm before clipping")
    _curve(axes, run, "grad_norm", BLUE)
    limit = number(run.config.get("max_grad_norm"))
    if not math.isnan(limit):
        axes.axhline(limit, color=INK, alpha=0.55, linestyle=DASHES, linewidth=1.2, label=f"clipped to {limit:g}")
        axes.legend(loc="upper right")
    _from_zero(axes)
    axes.set_xlabel("step")


def _variance(axes: Any, run: RunData) -> None:
    axes.set_title("Noise of the gradient, share of opd's")
    _curve(axes, run, "variance_over_opd", BLUE)
    axes.axhline(1, color=INK, alpha=0.55, linestyle=DASHES, linewidth=1.2, label="opd at the same states")
    axes.legend(loc="best")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _from_zero(axes)
    axes.set_xlabel("step")


def _support(axes: Any, run: RunData) -> None:
    axes.set_title("Support of a position")
    _curve(axes, run, "support_size_mean", BLUE)
    axes.set_ylabel("ids in the support", color=BLUE)
    _from_zero(axes)
    axes.set_xlabel("step")
    right = axes.twinx()
    right.grid(visible=False)
    right.spines["right"].set_visible(False)
    _curve(right, run, "left_out_mass_mean", ORANGE)
    right.set_ylabel("student probability left out", color=ORANGE)
    _from_zero(right)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


# ---------------------------------------------------------------- marks


def _curve(axes: Any, run: RunData, name: str, colour: str, label: str | None = None, *, is_part: bool = False) -> None:
    """Every step's value; over many steps the single values step back behind their running mean, a part's vanish."""
    steps, values = run.column("step"), run.column(name)
    width = 1.1 if is_part else STYLE["lines.linewidth"]
    if len(steps) <= MANY_STEPS:
        axes.plot(steps, values, color=colour, linewidth=width, marker=".", markersize=5, label=label)
        return
    if not is_part:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, running_mean(values, len(values) // 50), color=colour, linewidth=width, label=label)


def band(
    axes: Any, xs: Sequence[float], values: Sequence[Estimate], colour: str, label: str | None, **marks: Any
) -> None:
    """A line through means, and the area of their intervals where they have any."""
    axes.fill_between(
        xs, [value.low for value in values], [value.high for value in values], color=colour, alpha=0.16, linewidth=0
    )
    style = {"marker": "o", "markersize": 6} | marks
    axes.plot(xs, [value.mean for value in values], color=colour, label=label, **style)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """At each value the mean from `reach` values before it to as many after it; fewer at the ends, NaN left out.

    The same number on both sides, at the ends too, so that the mean does not lag behind a fall or a rise.
    """
    means = []
    for place in range(len(values)):
        within = min(reach, place, len(values) - 1 - place)
        near = [value for value in values[place - within : place + within + 1] if not math.isnan(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _from_zero(axes: Any) -> None:
    """Shows how large values are, not only how they differ; an estimate of a KL may be negative and stays in view."""
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)


def _zero_for_missing(values: Sequence[float]) -> list[float]:
    return [0.0 if math.isnan(value) else value for value in values]
