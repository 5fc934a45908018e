"""Two steps of a run in lanes over seconds: who was busy when, and who waited for whom.

A step's rollouts keep one colour on their way: sampled, in flight to the teacher and back, learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from vopd_client.plots import BLUE, DASHES, GREEN, INK, ORANGE, PURPLE, STYLE, svg_of
from vopd_client.run_data import RunData

Row = Mapping[str, Any]

STEP_COLOURS = (BLUE, GREEN, PURPLE)  # three steps at most are under way at a time
LANES = ("sampling", "teacher in flight", "waiting for it", "forward, backward", "optimizer")
SHORTEST_WAIT_TOLD_S = 0.01
_HEIGHT = 0.72  # of a lane's bars
_FORWARD_ALPHA, _BACKWARD_ALPHA = 0.5, 0.9


@dataclass(frozen=True)
class Window:
    """The rows that are drawn: `shown` make the time axis, `flown` those whose requests may reach into it."""

    shown: Sequence[Row]
    flown: Sequence[Row]

    @property
    def seconds(self) -> float:
        return self.offset(self.shown[-1]) + float(self.shown[-1]["step_s"])

    def offset(self, row: Row) -> float:
        """Seconds from the start of the first step that is shown to that of `row`."""
        return float(row["started_at"]) - float(self.shown[0]["started_at"])


def choose_window(rows: Sequence[Row]) -> Window | None:
    """Two consecutive steps that took about as long as most pairs did, or the only step; None: there is nothing.

    The first two steps and the last are passed over where there are others: they fill and empty the pipeline, and
    the first use of everything takes its time.
    """
    if not rows:
        return None
    steady = rows[2:-1] if len(rows) >= 5 else rows
    pairs = [(first, second) for first, second in pairwise(steady) if _in_one_go(first, second)]
    if not pairs:
        return Window(rows[-1:], rows[-1:])
    middle = median_low(map(_pair_seconds, pairs))
    shown = min(pairs, key=lambda pair: (abs(_pair_seconds(pair) - middle), pair[0]["step"]))
    following = [row for row in rows if _in_one_go(shown[1], row) and any(sent_s < 0 for sent_s, _ in row["flights"])]
    return Window(shown, [*shown, *following])


def write_timeline_png(run: RunData, path: Path) -> bool:
    """Draws the picture; False when the run has no timeline. Raises: OSError."""
    window = choose_window(run.timeline)
    if window is None:
        return False
    with mpl.rc_context(STYLE):
        _figure(window, title=_title(run, window)).savefig(path, dpi=150, facecolor="white")
    return True


def timeline_svg(run: RunData) -> str | None:
    """An <svg> element for the report; None when the run has no timeline."""
    window = choose_window(run.timeline)
    if window is None:
        return None
    with mpl.rc_context(STYLE):
        return svg_of(_figure(window, title=None))


def _in_one_go(first: Row, second: Row) -> bool:
    """Consecutive steps with next to nothing in between: no evaluation, no checkpoint, no interruption."""
    gap_s = second["started_at"] - first["started_at"] - first["step_s"]
    return bool(second["step"] == first["step"] + 1 and -0.01 <= gap_s <= 0.1 * first["step_s"] + 0.1)


def _pair_seconds(pair: tuple[Row, Row]) -> float:
    return float(pair[0]["step_s"] + pair[1]["step_s"])


def _title(run: RunData, window: Window) -> str:
    steps = " and ".join(str(row["step"]) for row in window.shown)
    staleness = f"  ·  max_staleness {run.config['max_staleness']}" if "max_staleness" in run.config else ""
    return f"{run.name}, step{'s' if len(window.shown) > 1 else ''} {steps}{staleness}"


# ---------------------------------------------------------------- drawing


def _figure(window: Window, *, title: str | None) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(11.4, 3.6 if title else 3.3), layout=layout)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes: Any = figure.subplots()
    for row in window.flown:
        _flights(axes, window, row)
    for row in window.shown:
        _sampling(axes, window, row)
        start_s, own = window.offset(row), _colour(row["step"])
        _waiting(axes, start_s, row["waiting"])
        _bars(axes, "forward, backward", start_s, row["forward"], own, alpha=_FORWARD_ALPHA)
        _bars(axes, "forward, backward", start_s, row["backward"], own, alpha=_BACKWARD_ALPHA)
        _bars(axes, "optimizer", start_s, row["optimizer"], own, alpha=_BACKWARD_ALPHA)
        axes.axvline(start_s, color=INK, alpha=0.45, linestyle=DASHES, linewidth=1)
        axes.text(start_s, -0.62, f" step {row['step']}", color=INK, ha="left", va="bottom", fontsize=9)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.set_ylim(len(LANES) - 0.5, -0.62)
    axes.set_xlim(0, window.seconds)
    axes.set_xlabel("seconds")
    axes.grid(axis="y", visible=False)
    axes.legend(
        handles=_legend(window),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=6,
        columnspacing=1.4,
        fontsize=8.5,
    )
    return figure


def _sampling(axes: Any, window: Window, row: Row) -> None:
    """One bar a step that was sampled, in that step's colour."""
    for step, span in zip(row["sampled_steps"], row["sampling"], strict=False):
        _bars(axes, "sampling", window.offset(row), [span], _colour(step), alpha=0.9)


def _waiting(axes: Any, start_s: float, spans: Sequence[Sequence[float]]) -> None:
    """The bars, and how long they are together."""
    _bars(axes, "waiting for it", start_s, spans, ORANGE, alpha=0.9)
    waited_s = sum(end_s - begin_s for begin_s, end_s in spans)
    if waited_s >= SHORTEST_WAIT_TOLD_S:
        _, longest_end_s = max(spans, key=lambda span: span[1] - span[0])
        axes.text(
            start_s + longest_end_s,
            LANES.index("waiting for it"),
            f" {waited_s:.2f} s",
            color=INK,
            ha="left",
            va="center",
            fontsize=9,
        )


def _flights(axes: Any, window: Window, row: Row) -> None:
    """One thin line a request, those that left first on top, in a share of the lane for each step."""
    centre, flights = LANES.index("teacher in flight"), row["flights"]
    start_s, num_flights = window.offset(row), max(len(flights), 1)
    height = _HEIGHT / num_flights
    for place, (sent_s, answered_s) in enumerate(flights):
        top = centre - _HEIGHT / 2 + place * height
        axes.broken_barh(
            [(start_s + sent_s, max(answered_s - sent_s, 0.0))],
            (top, 0.8 * height),
            color=_colour(row["step"]),
            alpha=0.75,
            linewidth=0,
        )


def _bars(axes: Any, lane: str, start_s: float, spans: Sequence[Sequence[float]], colour: str, *, alpha: float) -> None:
    bars = [(start_s + begin_s, end_s - begin_s) for begin_s, end_s in spans]
    axes.broken_barh(bars, (LANES.index(lane) - _HEIGHT / 2, _HEIGHT), color=colour, alpha=alpha, linewidth=0)


def _legend(window: Window) -> list[Patch]:
    steps = sorted(
        {row["step"] for row in window.flown} | {step for row in window.shown for step in row["sampled_steps"]}
    )
    return [
        *(Patch(color=_colour(step), alpha=0.9, linewidth=0, label=f"rollouts of step {step}") for step in steps),
        Patch(color=ORANGE, alpha=0.9, linewidth=0, label="student waits for the teacher"),
    ]


def _colour(step: int) -> str:
    return STEP_COLOURS[step % len(STEP_COLOURS)]
