"""A variance report as a picture: ratios to opd's variance over the support's size, a panel an owner of supports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from vopd_client.plots import BLUE, DASHES, GREEN, INK, ORANGE, PINK, PURPLE, STYLE
from vopd_client.variance_report import Estimate, Owner, Row, VarianceReport, label

OWNERS: tuple[Owner, ...] = ("student", "teacher")
DOTS = (0, (1, 1.6))
# vopd in warm colours, vopd-rb in cold ones; the default baseline of each is the thick line.
LOOKS: dict[str, dict[str, Any]] = {
    "vopd renormalise": {"color": ORANGE, "linewidth": 2.4},
    "vopd bucket": {"color": ORANGE, "linestyle": DASHES},
    "vopd optimal": {"color": PINK, "linestyle": DOTS},
    "vopd-rb none": {"color": PURPLE, "linestyle": DOTS, "linewidth": 1.3},
    "vopd-rb tail": {"color": PURPLE, "linestyle": DASHES, "linewidth": 1.3},
    "vopd-rb renormalise": {"color": GREEN, "linestyle": DASHES, "linewidth": 1.3},
    "vopd-rb bucket": {"color": GREEN, "linestyle": DOTS, "linewidth": 1.3},
    "vopd-rb optimal": {"color": BLUE, "linewidth": 2.4},
    "vopd-rb best": {"color": INK, "linewidth": 1.1},
}
WITH_ERRORS = ("vopd renormalise", "vopd-rb optimal")
UNKNOWABLE = "vopd-rb best"


def draw_report(report: VarianceReport, path: Path, *, title: str) -> None:
    """The format is the one that the name ends with. Raises: OSError."""
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03)
        figure = Figure(figsize=(12, 5.4), layout=layout)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, owner in zip(panels, OWNERS, strict=True):
            _panel(axes, report, owner)
        panels[0].set_ylabel("variance at a position, ratio to opd's")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", labelspacing=0.7)
        figure.savefig(path, dpi=150, facecolor="white")


def _panel(axes: Any, report: VarianceReport, owner: Owner) -> None:
    axes.set_title(f"S = the {owner}'s top-K{'' if report.approximation is None else ', approximate'}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color=INK, alpha=0.55, linewidth=1.1, label="opd")
    for name, look in LOOKS.items():
        row = report.row(name, owner)
        sizes = [size for size in report.sizes if _can_be_drawn(row.by_size[size])]
        values = [row.by_size[size].value for size in sizes]
        axes.plot(sizes, values, marker="o", markersize=4, label=_legend(name), **look)
        if name in WITH_ERRORS:
            axes.errorbar(sizes, values, _errors(row, sizes), fmt="none", ecolor=look["color"], elinewidth=1.2)
    _gap(axes, report, owner)
    for name, style in (("vopd-full kl", DASHES), ("vopd-full optimal", DOTS)):
        limit = report.row(name, None).whole
        if limit is not None and _can_be_drawn(limit):
            axes.axhline(limit.value, color=INK, alpha=0.7, linestyle=style, linewidth=1.1, label=label(name))
    axes.set_xlabel("K, ids in the support")
    axes.xaxis.set_major_locator(FixedLocator(report.sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))


def _gap(axes: Any, report: VarianceReport, owner: Owner) -> None:
    """What b = b* gives away, as an area."""
    default, best = report.row("vopd-rb optimal", owner), report.row(UNKNOWABLE, owner)
    sizes = [
        size for size in report.sizes if _can_be_drawn(default.by_size[size]) and _can_be_drawn(best.by_size[size])
    ]
    low, high = ([row.by_size[size].value for size in sizes] for row in (best, default))
    axes.fill_between(sizes, low, high, color=BLUE, alpha=0.13, linewidth=0, label="what b = b* gives away")


def _legend(name: str) -> str:
    notes = {
        "vopd renormalise": ", the paper's",
        "vopd-rb optimal": ", b = b*",
        UNKNOWABLE: ", which no run can know",
    }
    return label(name) + notes.get(name, "")


def _errors(row: Row, sizes: list[int]) -> list[float]:
    errors = [row.by_size[size].standard_error for size in sizes]
    return [0.0 if math.isnan(error) else error for error in errors]


def _can_be_drawn(estimate: Estimate) -> bool:
    """A logarithmic axis has no place for 0."""
    return estimate.value > 0
