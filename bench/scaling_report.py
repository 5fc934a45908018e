"""Rows and ratios of `make bench-scaling`, and how they are shown. Pure but for the printing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from scaling_memory import MEBIBYTE, Largest
from scaling_points import BASE, Curve, Point


@dataclass(frozen=True)
class Measured:
    """One pass over one point."""

    seconds: float
    num_sequences: int
    scored_tokens_per_s: float
    bytes_sent_per_token: float
    bytes_received_per_token: float
    peak_bytes: int


def medians(curve: Curve, point: Point, passes: Sequence[Measured], idle_bytes: int) -> dict[str, Any]:
    """A row of the results: medians of the passes; the memory is the first one's."""
    rates = [one.scored_tokens_per_s for one in passes]
    return {
        "curve": curve.name,
        "axis": curve.axis,
        "value": curve.value(point),
        "scored_tokens_per_s": statistics.median(rates),
        "scored_tokens_per_s_passes": rates,
        "seconds_per_sequence": statistics.median(one.seconds / one.num_sequences for one in passes),
        "bytes_sent_per_token": statistics.median(one.bytes_sent_per_token for one in passes),
        "bytes_received_per_token": statistics.median(one.bytes_received_per_token for one in passes),
        "peak_bytes": passes[0].peak_bytes,
        "idle_bytes": idle_bytes,
        "point": asdict(point),
    }


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Time of a scored token at the end of each curve over that at its beginning."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(row["curve"] for row in rows):
        mine = [row for row in rows if row["curve"] == name]
        first, last = mine[0], mine[-1]
        what = f"time a token, {name} {last['value']} over {first['value']}"
        found[what] = first["scored_tokens_per_s"] / last["scored_tokens_per_s"]
    return found


def largest_row(group: int, budget_bytes: int, found: Largest) -> dict[str, Any]:
    return {
        "group": group,
        "context": BASE.context,
        "k": BASE.k,
        "budget_bytes": budget_bytes,
        "limited_by": found.limited_by,
        "found": asdict(found.found) if found.found is not None else None,
        "probes": [asdict(probe) for probe in found.probes],
    }


def show(content: Mapping[str, Any]) -> None:
    table = Table("", "", "tokens/s", "s a sequence", "bytes out", "bytes back", "peak MiB", title=content["teacher"])
    for row in content["rows"]:
        numbers = (row["bytes_sent_per_token"], row["bytes_received_per_token"], row["peak_bytes"] / MEBIBYTE)
        table.add_row(
            row["curve"],
            str(row["value"]),
            f"{row['scored_tokens_per_s']:.0f}",
            f"{row['seconds_per_sequence']:.3f}",
            *(f"{number:.0f}" for number in numbers),
        )
    console = Console(width=110)
    console.print(table)
    for what, ratio in content["ratios"].items():
        console.print(f"{what}: {ratio:.2f}")
    for row in content["largest"]:
        budget = f"{row['budget_bytes'] / MEBIBYTE:.0f} MiB, {row['group']} a context"
        if (found := row["found"]) is None:
            console.print(f"{budget}: not even {row['probes'][0]['tokens']} tokens")
            continue
        ended = "" if row["limited_by"] == "memory" else f" (at least: the search ended by {row['limited_by']})"
        console.print(f"{budget}: {found['tokens']} tokens{ended}, peak {found['peak_bytes'] / MEBIBYTE:.0f} MiB")
