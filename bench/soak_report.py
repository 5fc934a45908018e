"""What is asked of the soak's figures, and how both are shown. Pure but for the printing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soak_figures import SHARE_TOLERANCE, share_bars
from soak_plan import JobPlan, Tally
from soak_process import ProcessSample
from soak_workload import TOLERANCE_NATS, Power

MOST_GROWTH = 0.05  # of memory, from the minute after the warm-up to the last one
MOST_DESCRIPTORS_MORE = 32  # under load: a connection for each job, since those that hang up come and go; quiet: none
MOST_THREADS_MORE = 2
LEAST_BUSY_TENANTS = 6
MOST_JUDGED_SHARE = 0.5  # a bar beyond it, of half of the tenants, says nothing
LEAST_JUDGED_S = 240.0  # shorter soaks end before memory and connections have settled
BUDGETS = ("held_sequences", "queued_sequences", "queued_tokens", "running_sequences", "running_tokens")
BUDGETS += ("reserved_tokens", "reserved_bytes")


@dataclass(frozen=True)
class Check:
    """holds: None where the soak was too short, or too little happened, to say."""

    what: str
    found: str
    bar: str
    holds: bool | None


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
            more["descriptors"] <= MOST_DESCRIPTORS_MORE if long_enough else None,
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


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    words = {True: "holds", False: "[bold red]FAILS", None: "[dim]not judged"}
    table = Table("check", "found", "bar", "")
    for check in checks:
        table.add_row(check.what, escape(check.found), check.bar, words[check.holds])  # a log line is no markup
    console.print(table)


def print_report(console: Console, figures: Mapping[str, Any], checks: Sequence[Check]) -> None:
    print_checks(console, checks)
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
