"""The soak's figures, what is asked of them, and how both are shown. Pure but for the printing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from soak_plan import JobPlan, Tally
from soak_process import ProcessSample
from soak_workload import TOLERANCE_NATS, Power

MOST_GROWTH = 0.05  # of memory, from the minute after the warm-up to the last one
MOST_DESCRIPTORS_MORE = 32  # under load: a connection for each job, since those that hang up come and go; quiet: none
MOST_THREADS_MORE = 2
ALWAYS_BUSY = 0.95  # of the looks
LEAST_BUSY_TENANTS = 6
MOST_JUDGED_SHARE = 0.5  # a bar beyond it, of half of the tenants, says nothing
# Of a share, beside a turn more or less than others have had: who came last by chance.
SHARE_TOLERANCE = 0.1
TURN_TOKENS = 450  # the largest of a busy tenant: a context and the completions that come along
LEAST_JUDGED_S = 240.0  # shorter soaks end before memory has settled
BUDGETS = ("held_sequences", "queued_sequences", "queued_tokens", "running_sequences", "running_tokens")
BUDGETS += ("reserved_tokens", "reserved_bytes")


@dataclass(frozen=True)
class Check:
    """holds: None where the soak was too short, or too little happened, to say."""

    what: str
    found: str
    bar: str
    holds: bool | None


# ---------------------------------------------------------------- figures


def total(tallies: Iterable[Tally]) -> Tally:
    """All jobs as one; of extremes the extreme."""
    everything = Tally()
    for tally in tallies:
        for name, value in vars(tally).items():
            match name, value:
                case "latencies_s", dict():
                    for kind, seconds in value.items():
                        everything.latencies_s.setdefault(kind, []).extend(seconds)
                case (("largest_mean_nats" | "largest_nats"), _):
                    setattr(everything, name, max(getattr(everything, name), value))
                case "least_ids_shared", _:
                    everything.least_ids_shared = min(everything.least_ids_shared, value)
                case _, Counter():
                    getattr(everything, name).update(value)
                case _:
                    setattr(everything, name, getattr(everything, name) + value)
    return everything


def latencies(by_name: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "sequences": len(found),
            "p50_s": round(float(np.quantile(found, 0.5)), 3),
            "p95_s": round(float(np.quantile(found, 0.95)), 3),
        }
        for name, found in sorted(by_name.items())
        if len(found)
    }


def window_of(samples: Sequence[ProcessSample], seconds: float) -> tuple[list[ProcessSample], list[ProcessSample]]:
    """The minute after the first one, and the last one; of a soak of less than four a quarter each."""
    length_s = min(60.0, seconds / 4)
    early = [sample for sample in samples if length_s <= sample.at_s < 2 * length_s]
    late = [sample for sample in samples if seconds - length_s <= sample.at_s <= seconds]
    return early, late


def slope_a_minute(samples: Sequence[ProcessSample], name: str, *, from_s: float) -> float:
    """Least squares over what came after the warm-up; 0 for fewer than two samples."""
    later = [sample for sample in samples if sample.at_s >= from_s]
    if len(later) < 2:
        return 0.0
    at_min = np.array([sample.at_s / 60 for sample in later])
    return float(np.polyfit(at_min, [getattr(sample, name) for sample in later], 1)[0])


def growth_figures(samples: Sequence[ProcessSample], seconds: float) -> dict[str, dict[str, float]]:
    """Of memory, descriptors and threads: median early and late, and the slope in between."""
    early, late = window_of(samples, seconds)
    figures = {}
    for name in ("memory_mib", "descriptors", "threads"):
        first, last = (float(np.median([getattr(one, name) for one in part])) for part in (early, late))
        slope = slope_a_minute(samples, name, from_s=min(60.0, seconds / 4))
        figures[name] = {"after_warm_up": first, "at_the_end": last, "slope_a_minute": round(slope, 3)}
    return figures


@dataclass(frozen=True)
class Look:
    """At /status.json: of every tenant its share of the last minute, and whether it had something queued."""

    at_s: float
    share: Mapping[str, float]
    is_queued: Mapping[str, bool]


def busy_shares(looks: Sequence[Look], weights: Mapping[str, float]) -> dict[str, float]:
    """What those that were always busy got of what they got together, over what their weights say."""
    if not looks:
        return {}
    busy = [name for name in weights if np.mean([look.is_queued[name] for look in looks]) >= ALWAYS_BUSY]
    had = {name: float(np.mean([look.share[name] for look in looks])) for name in busy}
    all_had, all_weight = sum(had.values()), sum(weights[name] for name in busy)
    return {name: (had[name] / all_had) / (weights[name] / all_weight) for name in busy} if all_had else {}


def share_bars(shares: Mapping[str, float], weights: Mapping[str, float], tokens: float) -> dict[str, float]:
    """How far a tenant's share may be off, in parts of it. tokens: what all of them got together.

    Fair queueing keeps two busy tenants within a turn of each of one another, over their weights (Goyal, Vin and Cheng
    1996, theorem 1). What little was had is therefore off by much.
    """
    all_weight = sum(weights[name] for name in shares)
    return {name: SHARE_TOLERANCE + 2 * TURN_TOKENS / max(1.0, tokens * weights[name] / all_weight) for name in shares}


# ---------------------------------------------------------------- checks


def check_answers(everything: Tally, after: Tally) -> list[Check]:
    found = f"{everything.right} right, {everything.wrong} wrong"
    noise = f"{everything.largest_mean_nats:.3f} nats from alone at most"
    return [
        Check(
            "answers",
            f"{found} ({noise})",
            f"none wrong: <= {TOLERANCE_NATS} nats",
            everything.right > 0 and everything.wrong == 0,
        ),
        Check(
            "missing, duplicated, failed",
            f"{everything.missing}, {everything.duplicated}, {everything.failed}",
            "none",
            not (everything.missing or everything.duplicated or everything.failures),
        ),
        Check(
            "the same again when it is quiet",
            f"{after.right} right, {after.wrong} wrong, {after.largest_nats:.3g} nats apart at most",
            "none wrong",
            after.right > 0 and after.wrong == 0,
        ),
    ]


def check_power(found: Power) -> Check:
    num_wrong = found.num_swapped + found.num_shifted
    return Check(
        "wrong answers would be noticed",
        f"{num_wrong - found.num_unnoticed} of {num_wrong}; what ids do not tell is {found.least_nats:.2f} nats away",
        f"all, and > {3 * TOLERANCE_NATS:.2f} nats",
        found.num_unnoticed == 0 and found.least_nats > 3 * TOLERANCE_NATS,
    )


def check_books(plans: Sequence[JobPlan], tallies: Mapping[str, Tally], last: Mapping[str, Any]) -> Check:
    """What the teacher says it has scored, tenant by tenant, against what its clients got."""
    scored = {tenant["id"]: tenant["sequences_scored"] for tenant in last["tenants"]}
    wrong = []
    for plan in plans:
        got, said = tallies[plan.tenant_id].right + tallies[plan.tenant_id].wrong, scored[plan.tenant_id]
        given_up = tallies[plan.tenant_id].given_up + tallies[plan.tenant_id].late
        if not got <= said <= got + given_up:
            wrong.append(f"{plan.tenant_id} {said} for {got}")
    return Check(
        "scored once for each answer",
        ", ".join(wrong) or f"{len(plans)} tenants agree",
        "as many as the clients got, or gave up on",
        not wrong,
    )


def check_rejections(
    plans: Sequence[JobPlan], tallies: Mapping[str, Tally], last: Mapping[str, Any], strangers: Mapping[str, int]
) -> Check:
    """By tenant and code: all that a client was told, what it may have left behind, and nothing else."""
    found = {tenant["id"]: tenant["rejections"] for tenant in last["tenants"]}
    wrong = []
    for plan in plans:
        tally, rejections = tallies[plan.tenant_id], found[plan.tenant_id]
        for code in sorted({*tally.told, *rejections}):
            least, most = tally.told[code], tally.told[code] + tally.untold[code]
            if code == "RESOURCE_EXHAUSTED" and plan.role == "tight":
                continue  # it asks for more than it may have; the client waits and asks again
            if not least <= rejections.get(code, 0) <= most:
                wrong.append(f"{plan.tenant_id} {rejections.get(code, 0)} {code}, not {least} to {most}")
    refused = sum(tally.strangers_refused for tally in tallies.values())
    if dict(strangers) != ({"UNAUTHENTICATED": refused} if refused else {}):
        wrong.append(f"strangers {dict(strangers)}, not {refused} UNAUTHENTICATED")
    codes: Counter[str] = Counter(strangers)
    for rejections in found.values():
        codes.update(rejections)
    said = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
    return Check("rejections", "; ".join(wrong) or said, "of each tenant, the codes its misdeeds ask for", not wrong)


def check_budgets(last: Mapping[str, Any]) -> Check:
    left = [
        f"{tenant['id']} {name} {tenant[name]}" for tenant in last["tenants"] for name in BUDGETS if tenant[name] != 0
    ]
    left += [f"{name} {last[name]}" for name in ("calls_in_flight", "running_tokens") if last[name]]
    return Check("budgets at the end", "; ".join(left) or "all zero", "zero, of every tenant", not left)


def check_growth(
    growth: Mapping[str, Mapping[str, float]], before: ProcessSample, after: ProcessSample, *, seconds: float
) -> list[Check]:
    memory, descriptors, threads = (growth[name] for name in ("memory_mib", "descriptors", "threads"))
    ratio = memory["at_the_end"] / memory["after_warm_up"] - 1
    more = {one: growth[one]["at_the_end"] - growth[one]["after_warm_up"] for one in ("descriptors", "threads")}
    long_enough = seconds >= LEAST_JUDGED_S
    return [
        Check(
            "memory",
            f"{memory['at_the_end']:.0f} MiB, {ratio:+.1%} ({memory['slope_a_minute']:+.1f} MiB a minute)",
            f"at most +{MOST_GROWTH:.0%}",
            ratio <= MOST_GROWTH if long_enough else None,
        ),
        Check(
            "file descriptors under load",
            f"{descriptors['at_the_end']:.0f}, {more['descriptors']:+.0f}",
            f"at most +{MOST_DESCRIPTORS_MORE}",
            more["descriptors"] <= MOST_DESCRIPTORS_MORE,
        ),
        Check(
            "file descriptors when it is quiet",
            f"{before.descriptors} before, {after.descriptors} after",
            "no more than before",
            after.descriptors <= before.descriptors,
        ),
        Check(
            "threads",
            f"{threads['at_the_end']:.0f}, {more['threads']:+.0f}",
            f"at most +{MOST_THREADS_MORE}",
            more["threads"] <= MOST_THREADS_MORE,
        ),
    ]


def check_shares(shares: Mapping[str, float], weights: Mapping[str, float], tokens: float) -> Check:
    """tokens: what those in `shares` got together."""
    if len(shares) < LEAST_BUSY_TENANTS or len({weights[name] for name in shares}) < 2:
        return Check("shares by weight", f"only {len(shares)} tenants were always busy", "not judged", None)
    bars = share_bars(shares, weights, tokens)
    over = {name: abs(shares[name] - 1) - bars[name] for name in shares}
    worst = max(over, key=lambda name: over[name])
    coarse = sorted(bars.values())[len(bars) // 2] > MOST_JUDGED_SHARE
    return Check(
        "shares by weight",
        f"{len(shares)} tenants always busy; {worst} (weight {weights[worst]:g}) has {shares[worst]:.2f} of its own",
        f"1 within {bars[worst]:.0%}: {SHARE_TOLERANCE:.0%} and two turns",
        None if coarse else over[worst] <= 0,
    )


def check_log(lines: Sequence[str]) -> Check:
    return Check("the teacher's log", lines[0][:160] if lines else "no errors", "no errors", not lines)


# ---------------------------------------------------------------- for people


def print_report(console: Console, figures: Mapping[str, Any], checks: Sequence[Check]) -> None:
    words = {True: "holds", False: "[bold red]FAILS", None: "[dim]not judged"}
    table = Table("check", "found", "bar", "")
    for check in checks:
        table.add_row(check.what, check.found, check.bar, words[check.holds])
    console.print(table)
    speeds = Table("sequences", "answered", "p50", "p95")
    for by_name in (figures["latency_by_transport"], figures["latency_by_kind"]):
        for name, row in by_name.items():
            speeds.add_row(name, str(row["sequences"]), f"{row['p50_s']:.2f} s", f"{row['p95_s']:.2f} s")
        speeds.add_section()
    console.print(speeds)
    console.print(
        f"{figures['sequences_per_s']:.1f} sequences/s, {figures['tokens_per_s']:.0f} tokens/s, "
        f"{figures['scored_tokens_per_s']:.0f} of them scored; "
        f"{figures['bytes_sent_per_scored_token']:.0f} bytes out and "
        f"{figures['bytes_received_per_scored_token']:.0f} back for each; "
        f"{figures['server_cpu_s']:.0f} CPU seconds of the server"
    )


def rounded(value: float, digits: int = 4) -> float | None:
    """For JSON, which has no infinity."""
    return round(value, digits) if math.isfinite(value) else None
