"""The picture of bench/results/scaling.json: a column a variable; speed, bytes and memory below one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator

from capacity_check import Check, Compared
from vopd_client.plots import BLUE, DASHES, INK, ORANGE, STYLE

LABELS = {
    "context": "context, tokens",
    "completion": "completion, tokens",
    "k": "k, ids a position",
    "group": "completions a context",
    "concurrency": "sequences outstanding",
    "vocabulary": "rows of the output head",
}
COLOURS = {"candidates": BLUE, "teacher_top_k": ORANGE}
MEBIBYTE = 2**20


def write_picture(content: Mapping[str, Any], check: Check, path: Path) -> None:
    """Measured points, and dashed what the capacity model makes of the base point's rate. Raises: OSError."""
    rows = content["rows"]
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1, wspace=0.03, hspace=0.05)
        figure = Figure(figsize=(3.1 * len(axes_names), 8.4), layout=layout)
        panels = figure.subplots(3, len(axes_names), squeeze=False, sharey="row")
        for column, name in enumerate(axes_names):
            _column([row[column] for row in panels], name, [row for row in rows if row["axis"] == name], check.points)
        # The panels of a row share their axis: it is set once all of them are drawn.
        panels[0][0].set_ylim(bottom=0)
        panels[1][0].set_yscale("log")
        panels[2][0].set_ylim(bottom=0)
        for row, label in enumerate(("scored tokens a second", "bytes a scored token, both ways", "peak memory, MiB")):
            panels[row][0].set_ylabel(label)
        handles: dict[str, Any] = {}
        for panel in panels[0]:
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, facecolor="white")


def _column(panels: Sequence[Any], axis: str, rows: Sequence[Mapping[str, Any]], compared: Sequence[Compared]) -> None:
    speed, wire, memory = panels
    speed.set_title(LABELS[axis])
    for curve in dict.fromkeys(row["curve"] for row in rows):
        mine = [row for row in rows if row["curve"] == curve]
        support = mine[0]["point"]["support"]
        look = {"color": COLOURS[support], "marker": "o", "markersize": 4}
        values = [row["value"] for row in mine]
        speeds = [row["scored_tokens_per_s"] for row in mine]
        passes = [row["scored_tokens_per_s_passes"] for row in mine]
        spread = [
            [middle - min(found) for middle, found in zip(speeds, passes, strict=True)],
            [max(found) - middle for middle, found in zip(speeds, passes, strict=True)],
        ]
        speed.errorbar(values, speeds, yerr=spread, capsize=2, label=support.replace("_", " "), **look)
        if support == "candidates":
            _prediction(speed, [point for point in compared if point.curve == curve])
        wire.plot(values, [row["bytes_sent_per_token"] + row["bytes_received_per_token"] for row in mine], **look)
        memory.plot(values, [row["peak_bytes"] / MEBIBYTE for row in mine], **look)
    for panel in panels:
        panel.set_xscale("log", base=2 if axis not in ("k", "vocabulary") else 10)
        panel.set_xticks(sorted({row["value"] for row in rows}))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(axis="x", labelsize=7.5)


def _prediction(speed: Any, points: Sequence[Compared]) -> None:
    values, rates = [point.value for point in points], [point.one_rate_tokens_per_s for point in points]
    label = "by operations alone, at the base point's rate"
    speed.plot(values, rates, color=INK, alpha=0.7, linestyle=DASHES, linewidth=1.3, label=label)


def _short(value: float) -> str:
    """49152 as 49k."""
    return f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:.0f}"
