"""32 jobs with keys and weights of their own against one teacher process, for minutes: right, fair, and without a leak.

A third of the jobs streams over gRPC, a third calls over gRPC, a third goes over HTTP; sizes and supports are mixed,
and some jobs misbehave. Every answer is compared with what the same sequence scored alone, before.

    python bench/soak.py --model .cache/smollm2-135m-instruct --json bench/results/soak.json

Exits with 1 when a check fails. What is asked and how answers are compared is in soak_workload.py, who asks in
soak_plan.py and soak_jobs.py, the bars in soak_report.py.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from machine import machine_facts
from soak_figures import Look, busy_shares, growth_figures, latencies, rounded, total
from soak_jobs import Addresses, run_jobs
from soak_plan import REFERENCE_TENANT, JobPlan, Tally, make_plans
from soak_process import ProcessSample, SoakTeacher, sample_process, soak_teacher
from soak_report import (
    Check,
    check_answers,
    check_books,
    check_budgets,
    check_growth,
    check_log,
    check_power,
    check_rejections,
    check_shares,
    print_report,
)
from soak_workload import GROUP_SIZE, Power, Reference, make_pool, power
from vopd_client.teacher import TeacherClient
from vopd_server.tenancy import TenantLimits

LOAD_PROCESSES = 2
SAMPLE_EVERY_S = 2.0
IDLE_WITHIN_S = 30.0
# One forward is short on a CPU, so that tenants take turns every second or two and not every ten.
MAX_BATCH_TOKENS = 4096
NUM_AGAIN = 24


@dataclasses.dataclass
class Soak:
    """What was seen of one soak."""

    plans: list[JobPlan]
    seconds: float
    before: ProcessSample
    after: ProcessSample
    samples: list[ProcessSample]
    looks: list[Look]
    tallies: dict[str, Tally]
    again: Tally
    power: Power
    last_status: dict[str, Any]
    strangers: dict[str, int]
    errors_logged: list[str]
    reference_s: float
    drain_s: float


async def score_alone(teacher: SoakTeacher, seed: int) -> list[Reference]:
    """The pool, one sequence after the other while nobody else asks."""
    async with TeacherClient(teacher.url, api_key=teacher.keys[REFERENCE_TENANT]) as client:
        asked = make_pool(np.random.default_rng(seed), client.info.vocab_size)
        return [
            Reference(kind, group, sequence, (await client.score([sequence]))[0]) for kind, group, sequence in asked
        ]


async def score_again(teacher: SoakTeacher, pool: Sequence[Reference]) -> Tally:
    """Some of them alone once more."""
    tally = Tally()
    async with TeacherClient(teacher.url, api_key=teacher.keys[REFERENCE_TENANT]) as client:
        for one in pool[:: max(1, len(pool) // NUM_AGAIN)]:
            tally.asked += 1
            tally.check(one, (await client.score([one.sequence]))[0], seconds=0.0, in_time=False)
    return tally


async def idle_status(teacher: SoakTeacher) -> dict[str, Any]:
    """The first without a call in flight, or the last one when there is none in time."""
    give_up_s = time.monotonic() + IDLE_WITHIN_S
    while True:
        status = await teacher.status()
        if not status["calls_in_flight"] or time.monotonic() > give_up_s:
            return status
        await asyncio.sleep(0.2)


async def soak(teacher: SoakTeacher, plans: list[JobPlan], *, seconds: float, seed: int, console: Console) -> Soak:
    began_s = time.monotonic()
    with console.status("scoring the references, one by one"):
        pool = await score_alone(teacher, seed)
    reference_s = time.monotonic() - began_s
    before = sample_process(teacher.pid, 0.0)
    samples: list[ProcessSample] = []
    looks: list[Look] = []
    start_s = time.monotonic()
    addresses = Addresses(teacher.url, teacher.http_url)
    with ProcessPoolExecutor(LOAD_PROCESSES, mp_context=multiprocessing.get_context("spawn")) as processes:
        loads = [
            processes.submit(
                run_jobs, plans[first::LOAD_PROCESSES], dict(teacher.keys), addresses, pool, start_s + seconds
            )
            for first in range(LOAD_PROCESSES)
        ]
        with progress_line(console) as progress:
            task = progress.add_task("soaking", total=seconds, said="")
            while not all(load.done() for load in loads):
                at_s = time.monotonic() - start_s
                samples.append(sample_process(teacher.pid, at_s))
                status = await teacher.status()
                looks.append(look_at(status, at_s))
                progress.update(task, completed=min(at_s, seconds), said=said_of(status, samples[-1]))
                await asyncio.sleep(SAMPLE_EVERY_S)
        tallies = {tenant_id: tally for load in loads for tenant_id, tally in load.result().items()}
    drain_s = max(0.0, time.monotonic() - start_s - seconds)
    last_status = await idle_status(teacher)
    after = sample_process(teacher.pid, time.monotonic() - start_s)
    return Soak(
        plans=plans,
        seconds=seconds,
        before=before,
        after=after,
        samples=samples,
        looks=looks,
        tallies=tallies,
        again=await score_again(teacher, pool),
        power=power(pool),
        last_status=last_status,
        strangers=await teacher.rejections_of_strangers(),
        errors_logged=teacher.errors_logged(),
        reference_s=reference_s,
        drain_s=drain_s,
    )


def look_at(status: dict[str, Any], at_s: float) -> Look:
    tenants = status["tenants"]
    return Look(
        at_s,
        share={tenant["id"]: tenant["share"] for tenant in tenants},
        is_queued={tenant["id"]: tenant["queued_sequences"] > 0 for tenant in tenants},
    )


def progress_line(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
    return Progress(*columns, console=console)


def said_of(status: dict[str, Any], sample: ProcessSample) -> str:
    scored = sum(tenant["sequences_scored"] for tenant in status["tenants"])
    return (
        f"{scored} scored, {status['calls_in_flight']} calls, {sample.memory_mib:.0f} MiB, "
        f"{sample.descriptors} descriptors, {sample.threads} threads"
    )


# ---------------------------------------------------------------- what it comes to


def settled_looks(found: Soak) -> list[Look]:
    """From where the minute that a share is of lies within the soak; of a short one its second half."""
    from_s = min(60.0, found.seconds / 2)
    return [look for look in found.looks if from_s <= look.at_s <= found.seconds]


def weights_of(found: Soak) -> dict[str, float]:
    return {plan.tenant_id: float(plan.weight) for plan in found.plans if plan.role == "busy"}


def figures_of(found: Soak) -> dict[str, Any]:
    everything = total(found.tallies.values())
    by_transport: dict[str, list[float]] = {}
    for plan in found.plans:
        for seconds in found.tallies[plan.tenant_id].latencies_s.values():
            by_transport.setdefault(plan.transport, []).extend(seconds)
    weights = weights_of(found)
    shares = busy_shares(settled_looks(found), weights)
    load_samples = [sample for sample in found.samples if sample.at_s <= found.seconds]
    outcomes = ("asked", "right", "wrong", "missing", "duplicated", "given_up", "refused", "late", "failed")
    return {
        "sequences": {name: getattr(everything, name) for name in outcomes},
        "sequences_per_s": round(everything.in_time / found.seconds, 2),
        "tokens_per_s": round(everything.tokens / found.seconds, 1),
        "scored_tokens_per_s": round(everything.scored_tokens / found.seconds, 1),
        "bytes_sent_per_scored_token": round(everything.bytes_sent / max(1, everything.scored_tokens_ever), 1),
        "bytes_received_per_scored_token": round(everything.bytes_received / max(1, everything.scored_tokens_ever), 1),
        "latency_by_transport": latencies(by_transport),
        "latency_by_kind": latencies(everything.latencies_s),
        "server_cpu_s": round(load_samples[-1].cpu_s - found.before.cpu_s, 1),
        "growth": growth_figures(found.samples, found.seconds),
        "quiet": {"before": dataclasses.asdict(found.before), "after": dataclasses.asdict(found.after)},
        "noise": {
            "largest_mean_nats": rounded(everything.largest_mean_nats),
            "largest_nats": rounded(everything.largest_nats),
            "least_ids_shared": rounded(everything.least_ids_shared),
        },
        "power": {name: rounded(value) for name, value in dataclasses.asdict(found.power).items()},
        "misdeeds": dict(everything.misdeeds),
        "failures": dict(everything.failures),
        "rejections": {tenant["id"]: tenant["rejections"] for tenant in found.last_status["tenants"]},
        "rejections_of_strangers": found.strangers,
        "share_over_fair_share": {name: round(share, 3) for name, share in shares.items()},
        "reference_s": round(found.reference_s, 1),
        "drain_s": round(found.drain_s, 1),
    }


def checks_of(found: Soak) -> list[Check]:
    weights = weights_of(found)
    shares = busy_shares(settled_looks(found), weights)
    growth = growth_figures(found.samples, found.seconds)
    return [
        *check_answers(total(found.tallies.values()), found.again),
        check_power(found.power),
        check_books(found.plans, found.tallies, found.last_status),
        check_rejections(found.plans, found.tallies, found.last_status, found.strangers),
        check_budgets(found.last_status),
        *check_growth(growth, found.before, found.after, seconds=found.seconds),
        check_shares(shares, weights, sum(found.tallies[name].turn_tokens for name in shares)),
        check_log(found.errors_logged),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--jobs", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--teacher-log", type=Path, help="where the teacher's log is kept; default: nowhere")
    arguments = parser.parse_args()
    plans = make_plans(arguments.jobs)
    limits = {REFERENCE_TENANT: TenantLimits()} | {plan.tenant_id: plan.limits for plan in plans}
    flags = ("--max-batch-tokens", str(MAX_BATCH_TOKENS))
    console = Console()
    with (
        tempfile.TemporaryDirectory() as scratch,
        soak_teacher(arguments.model, Path(scratch), limits, flags) as teacher,
    ):
        found = asyncio.run(soak(teacher, plans, seconds=60 * arguments.minutes, seed=arguments.seed, console=console))
        if arguments.teacher_log:
            arguments.teacher_log.write_bytes(teacher.log_path.read_bytes())
    figures, checks = figures_of(found), checks_of(found)
    if arguments.json:
        content = {
            "machine": machine_facts(("grpcio", "torch", "transformers")),
            "settings": {
                "model": Path(arguments.model).name,
                "dtype": "bfloat16",
                "jobs": arguments.jobs,
                "minutes": arguments.minutes,
                "seed": arguments.seed,
                "load_processes": LOAD_PROCESSES,
                "max_batch_tokens": MAX_BATCH_TOKENS,
                "group_size": GROUP_SIZE,
                "plans": [dataclasses.asdict(plan) for plan in plans],
            },
            "figures": figures,
            "checks": [dataclasses.asdict(check) for check in checks],
            "samples": [dataclasses.asdict(sample) for sample in found.samples],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print_report(console, figures, checks)
    return 1 if any(check.holds is False for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
