"""Pictures of bench/results/objectives.json: what was learned over steps and seconds, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from objectives_report import mean_over_steps, objectives_of, tasks_of
from objectives_results import Results, curve
from vopd_client.plots import BLUE, DASHES, GREEN, INK, ORANGE, PINK, PURPLE, STYLE

# Sampled estimators with a paler look than ours; the two that are differentiated end the list.
LOOKS: Mapping[str, Mapping[str, Any]] = {
    "opd": {"color": INK, "linestyle": "-", "marker": "o"},
    "vopd": {"color": ORANGE, "linestyle": "-", "marker": "s"},
    "vopd-bucket-4": {"color": ORANGE, "linestyle": DASHES, "marker": "D"},
    "vopd-full": {"color": PINK, "linestyle": "-", "marker": "^"},
    "vopd-rb": {"color": BLUE, "linestyle": "-", "marker": "o", "linewidth": 2.6},
    "topk-kl": {"color": PURPLE, "linestyle": DASHES, "marker": "v"},
    "full-kl": {"color": GREEN, "linestyle": DASHES, "marker": "P"},
}
LABELS = {"vopd": "vopd (paper, K = 100)", "vopd-bucket-4": "vopd (bucket, K = 4)", "vopd-rb": "vopd-rb (K = 100)"}


def write_pictures(results: Results, directory: Path) -> list[Path]:
    """objectives-curves.png and objectives-costs.png. Raises: OSError."""
    paths = []
    with mpl.rc_context(STYLE):
        for name, figure in (("curves", _curves(results)), ("costs", _costs(results))):
            paths.append(directory / f"objectives-{name}.png")
            figure.savefig(paths[-1], dpi=150, facecolor="white")
    return paths


def _curves(results: Results) -> Figure:
    """A row a task: exact match over steps, KL over steps, KL over seconds of training."""
    tasks = tasks_of(results)
    figure = _figure(13.5, 4.0 * len(tasks) + 0.5)
    for task, (match, kl, kl_seconds) in zip(tasks, figure.subplots(len(tasks), 3, squeeze=False), strict=True):
        match.set_title(f"{task}: exact match, held-out prompts")
        kl.set_title("KL(student ‖ teacher), nats a token, held-out")
        kl_seconds.set_title("the same over seconds of training")
        for objective in objectives_of(results, task):
            _line(match, results, task, objective, "exact_match")
            _line(kl, results, task, objective, "kl_nats")
            _line(kl_seconds, results, task, objective, "kl_nats", over_seconds=True)
        if task in results.teachers:
            own = results.teachers[task]["exact_match"]
            match.axhline(own, color=INK, alpha=0.6, linestyle=(0, (1, 1.6)), linewidth=1.3, label="the teacher")
        match.set_ylim(-0.03, 1.03)
        match.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        kl.set_ylim(bottom=0)
        kl_seconds.set_ylim(bottom=0)
        for axes, unit in ((match, "step"), (kl, "step"), (kl_seconds, "seconds of training, mean over seeds")):
            axes.set_xlabel(unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    _legend(figure)
    return figure


def _line(axes: Any, results: Results, task: str, objective: str, column: str, *, over_seconds: bool = False) -> None:
    """The mean over seeds, and one standard deviation to both sides, within what was seen."""
    points = curve(results.rows, task, objective, column)
    if over_seconds:
        seconds = curve(results.rows, task, objective, "seconds")
        xs = [seconds[step].mean for step in points]
    else:
        xs = [float(step) for step in points]
    look = LOOKS.get(objective, {})
    axes.plot(xs, [found.mean for found in points.values()], markersize=4.5, label=_label(objective), **look)
    lows = [max(found.low, found.mean - found.std) for found in points.values()]
    highs = [min(found.high, found.mean + found.std) for found in points.values()]
    axes.fill_between(xs, lows, highs, color=look.get("color"), alpha=0.08, linewidth=0)


def _costs(results: Results) -> Figure:
    """A row a task: the gradient's variance, and bytes a token against the mean KL of training."""
    tasks = tasks_of(results)
    figure = _figure(13, 3.9 * len(tasks) + 0.4)
    for task, (variance, scatter) in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False), strict=True):
        objectives = objectives_of(results, task)
        variance.set_title(f"{task}: in-state variance of the gradient, share of opd's")
        scatter.set_title("Bytes of the teacher a token, and the KL of training")
        for place, objective in enumerate(objectives):
            runs = [run for run in results.runs if (run["task"], run["objective"]) == (task, objective)]
            look = LOOKS.get(objective, {})
            if ratio := mean_over_steps(runs, "variance_over_opd"):
                hatch = "//" if objective == "vopd-bucket-4" else None  # its colour is the paper's vopd's
                colours = {"color": look.get("color"), "ecolor": INK, "edgecolor": "white"}
                variance.barh(place, ratio.mean, xerr=ratio.std, alpha=0.85, height=0.66, hatch=hatch, **colours)
                right = ratio.mean + ratio.std
                variance.annotate(
                    f"{ratio.mean:.2f}", (right, place), xytext=(6, 0), textcoords="offset points", va="center"
                )
            sent, kl = mean_over_steps(runs, "teacher_bytes_per_token"), mean_over_steps(runs, "kl_nats")
            if sent and kl:
                style = {"color": look.get("color"), "marker": look.get("marker", "o")}
                scatter.errorbar(
                    sent.mean,
                    kl.mean,
                    yerr=kl.std,
                    markersize=8,
                    linestyle="",
                    capsize=2,
                    label=_label(objective),
                    **style,
                )
        variance.set_yticks(range(len(objectives)), [_label(objective) for objective in objectives])
        variance.invert_yaxis()
        variance.grid(axis="y", visible=False)
        variance.margins(x=0.12)
        scatter.set_xscale("log")
        scatter.margins(x=0.15)
        scatter.set_ylim(bottom=0)
        scatter.set_xlabel("bytes a token, both ways")
        scatter.set_ylabel("mean KL over the steps, nats")
    _legend(figure)
    return figure


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.05)
    return Figure(figsize=(width, height), layout=layout)


def _legend(figure: Figure) -> None:
    """One for all panels."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=8, columnspacing=1.4)


def _label(objective: str) -> str:
    return LABELS.get(objective, objective)
