"""The soak's figures, what is asked of them, and how they are shown. Pure but for the printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from soak_process import ProcessSample
from soak_workload import TOLERANCE_NATS, Tally

WARM_UP_S = 60.0
MOST_GROWTH = 0.05  # of memory, from the minute after the warm-up to the last
ALWAYS_BUSY = 0.95  # of the samples
SHARE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Check:
    what: str
    found: str
    bar: str
    holds: bool


def figures_of(
    tally: Tally,
    samples: Sequence[ProcessSample],
    statuses: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    weights: Mapping[str, float],
) -> dict[str, Any]:
    latencies = {
        kind: {"batches": len(found), "p50_s": float(np.quantile(found, 0.5)), "p95_s": float(np.quantile(found, 0.95))}
        for kind, found in sorted(tally.seconds.items())
    }
    early, late = minute_after_warm_up(samples), samples[-max(1, len(samples) // 5) :]
    shares = busy_shares(statuses, weights)
    return {
        "answers_right": tally.num_right,
        "answers_wrong": tally.num_wrong,
        "given_up": tally.num_given_up,
        "refused_as_they_should_be": dict(tally.refused),
        "largest_distance_from_reference_nats": tally.largest_distance_nats,
        "tokens_per_s": tally.num_tokens / seconds,
        "scored_tokens_per_s": tally.num_scored_tokens / seconds,
        "batches": latencies,
        "memory_bytes": [median(early, "memory_bytes"), median(late, "memory_bytes")],
        "file_descriptors": [median(early, "file_descriptors"), median(late, "file_descriptors")],
        "threads": [median(early, "threads"), median(late, "threads")],
        "tenants_always_busy": len(shares),
        "share_over_fair_share": shares,
    }


def minute_after_warm_up(samples: Sequence[ProcessSample]) -> Sequence[ProcessSample]:
    """Of a soak that is shorter than that, its first third."""
    found = [sample for sample in samples if WARM_UP_S <= sample.at_s < 2 * WARM_UP_S]
    return found if found and samples[-1].at_s > 3 * WARM_UP_S else samples[: max(1, len(samples) // 3)]


def median(samples: Sequence[ProcessSample], name: str) -> float:
    return float(np.median([getattr(sample, name) for sample in samples]))


def busy_shares(statuses: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, float]:
    """Share over fair share of the tenants that had something queued at almost every look, among themselves."""
    seen = statuses[len(statuses) // 4 :]
    queued = dict.fromkeys(weights, 0)
    had = dict.fromkeys(weights, 0.0)
    for status in seen:
        for tenant in status["tenants"]:
            queued[tenant["id"]] += tenant["queued_sequences"] > 0
            had[tenant["id"]] += tenant["share"]
    busy = [name for name in weights if queued[name] >= ALWAYS_BUSY * len(seen)]
    all_had, all_weight = sum(had[name] for name in busy), sum(weights[name] for name in busy)
    return {name: (had[name] / all_had) / (weights[name] / all_weight) for name in busy} if all_had else {}


def checks_of(figures: Mapping[str, Any], last: Mapping[str, Any]) -> list[Check]:
    wrong, right = figures["answers_wrong"], figures["answers_right"]
    distance = figures["smallest_distance_between_references_nats"]
    memory, descriptors = figures["memory_bytes"], figures["file_descriptors"]
    growth = memory[1] / memory[0] - 1
    names = ("held_sequences", "queued_sequences", "running_sequences", "reserved_tokens", "reserved_bytes")
    left = {tenant["id"]: {name: tenant[name] for name in names} for tenant in last["tenants"]}
    unfinished = {tenant_id: sums for tenant_id, sums in left.items() if any(sums.values())}
    shares = figures["share_over_fair_share"].values()
    worst = max((abs(share - 1) for share in shares), default=0.0)
    return [
        Check("answers", f"{right} right, {wrong} wrong", "none wrong", wrong == 0 and right > 0),
        Check(
            "another sequence's answer would show",
            f"{distance:.2f} nats away at least",
            f"> {TOLERANCE_NATS} nats, the tolerance",
            distance > TOLERANCE_NATS,
        ),
        Check("memory", f"{growth:+.1%}", f"at most +{MOST_GROWTH:.0%}", growth <= MOST_GROWTH),
        Check(
            "file descriptors", f"{descriptors[1] - descriptors[0]:+.0f}", "no more", descriptors[1] <= descriptors[0]
        ),
        Check(
            "budgets at the end",
            f"{len(unfinished)} tenants with something left, {last['calls_in_flight']} calls",
            "zero",
            not unfinished and not last["calls_in_flight"] and not last["running_tokens"],
        ),
        Check(
            "shares of those that were always busy",
            f"{len(shares)} tenants, off by {worst:.1%} at most",
            f"within {SHARE_TOLERANCE:.0%} of their weights",
            worst <= SHARE_TOLERANCE,
        ),
        Check(
            "strangers and wrong requests",
            str(figures["refused_as_they_should_be"]),
            "refused, every one",
            all(figures["refused_as_they_should_be"].get(why) for why in ("wrong key", "too long")),
        ),
    ]


def print_report(console: Console, figures: Mapping[str, Any], checks: Sequence[Check]) -> None:
    table = Table("check", "found", "bar", "")
    for check in checks:
        table.add_row(check.what, check.found, check.bar, "holds" if check.holds else "[bold red]FAILS")
    console.print(table)
    rates = Table("batches of", "batches", "p50", "p95")
    for kind, row in figures["batches"].items():
        rates.add_row(kind, str(row["batches"]), f"{row['p50_s']:.2f} s", f"{row['p95_s']:.2f} s")
    console.print(rates)
    console.print(
        f"{figures['tokens_per_s']:.0f} tokens/s, {figures['scored_tokens_per_s']:.0f} of them scored; "
        f"{figures['memory_bytes'][1] / 2**20:.0f} MiB, {figures['file_descriptors'][1]:.0f} file descriptors"
    )
