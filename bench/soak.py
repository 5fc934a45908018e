"""32 jobs with keys and weights of their own against one teacher process, for minutes: right, fair, and without a leak.

A third of the jobs stream over gRPC, a third send unary calls, a third go over HTTP; sizes and supports are mixed, some
give up in the middle, and strangers knock. Every answer is compared with what the same sequence scored alone, before.

    python bench/soak.py --model .cache/smollm2-135m-instruct --minutes 5 --json bench/results/soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from machine import machine_facts
from soak_process import ProcessSample, SoakTeacher, soak_teacher
from soak_report import Check, checks_of, figures_of, print_report
from soak_workload import Reference, Tally, draw, make_pool, smallest_distance
from vopd_client.errors import TeacherPermissionError, TeacherRequestError
from vopd_client.teacher.client import TeacherClient
from vopd_client.types import NoSupport, SequenceToScore

SAMPLE_EVERY_S = 5.0
GIVE_UP_EVERY = 12  # batches
KINDS = ("gRPC stream", "gRPC calls", "HTTP")
WEIGHTS = (1, 2, 4)


async def references_of(teacher: SoakTeacher, pool: list[SequenceToScore]) -> list[Reference]:
    """Each alone, one after the other."""
    found = []
    async with TeacherClient(teacher.url, api_key=teacher.keys["job-00"]) as client:
        for sequence in track(pool, "references"):
            found.append(Reference(sequence, (await client.score([sequence]))[0]))  # noqa: PERF401
    return found


async def run_job(teacher: SoakTeacher, number: int, pool: list[Reference], tally: Tally, end_s: float) -> None:
    """One job's batches until the end, each waited for; every so often it gives one up."""
    rng = np.random.default_rng(number)
    kind = KINDS[number % len(KINDS)]
    url = teacher.http_url if kind == "HTTP" else teacher.url
    async with TeacherClient(url, api_key=teacher.keys[f"job-{number:02}"], window=64) as client:
        stream = client.open_stream()
        num_batches = 0
        while time.monotonic() < end_s:
            batch = draw(rng, pool)
            num_batches += 1
            if kind == "gRPC calls":
                asked = [asyncio.ensure_future(client.score([one.sequence for one in batch]))]
            else:
                asked = [asyncio.ensure_future(stream.submit(one.sequence)) for one in batch]
            began_s = time.monotonic()
            if num_batches % GIVE_UP_EVERY == 0:
                await asyncio.wait(asked, timeout=float(rng.uniform(0, 0.5)))
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
                tally.num_given_up += len(batch)
                continue
            answers = await asyncio.gather(*asked)
            tally.took(kind, time.monotonic() - began_s)
            for one, scores in zip(batch, answers[0] if kind == "gRPC calls" else answers, strict=True):
                tally.check(one, scores)
        await stream.close()


async def knock(teacher: SoakTeacher, tally: Tally, end_s: float) -> None:
    """Strangers, and requests that can never be answered."""
    too_long = SequenceToScore(np.ones(9000, np.int64), np.ones(9000, np.int64), NoSupport())
    async with TeacherClient(teacher.http_url, api_key=teacher.keys["job-01"]) as client:
        while time.monotonic() < end_s:
            for url in (teacher.url, teacher.http_url):
                try:
                    await TeacherClient(url, api_key="job-00.wrong").connect()
                except TeacherPermissionError:
                    tally.refused["wrong key"] += 1
            try:
                await client.score([too_long])
            except TeacherRequestError:
                tally.refused["too long"] += 1
            await asyncio.sleep(1)


async def watch(
    teacher: SoakTeacher, samples: list[ProcessSample], statuses: list[dict[str, object]], end_s: float
) -> None:
    began_s = time.monotonic()
    with Progress() as progress:
        task = progress.add_task("soaking", total=end_s - began_s)
        while (now_s := time.monotonic()) < end_s:
            samples.append(teacher.sample(now_s - began_s))
            statuses.append(await teacher.status())
            progress.update(task, completed=now_s - began_s, description=f"{samples[-1].memory_bytes / 2**20:.0f} MiB")
            await asyncio.sleep(SAMPLE_EVERY_S)


async def soak(teacher: SoakTeacher, arguments: argparse.Namespace) -> tuple[dict[str, object], list[Check]]:
    pool = await references_of(teacher, make_pool(np.random.default_rng(7), arguments.vocab_size))
    sequences = [one.sequence for one in pool]
    tally = Tally(calls=Counter())
    samples: list[ProcessSample] = []
    statuses: list[dict[str, object]] = []
    end_s = time.monotonic() + 60 * arguments.minutes
    cpu_before_s = teacher.sample(0).cpu_s
    async with asyncio.TaskGroup() as group:
        for number in range(arguments.jobs):
            group.create_task(run_job(teacher, number, pool, tally, end_s))
        group.create_task(knock(teacher, tally, end_s))
        group.create_task(watch(teacher, samples, statuses, end_s))
    last = await teacher.status_when_idle()
    figures = figures_of(tally, samples, statuses, seconds=60 * arguments.minutes, weights=teacher.weights)
    figures["server_cpu_s"] = teacher.sample(0).cpu_s - cpu_before_s
    figures["smallest_distance_between_references_nats"] = smallest_distance(pool)
    figures["sequences_in_the_pool"] = len(sequences)
    return figures, checks_of(figures, last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--jobs", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    weights = {f"job-{number:02}": WEIGHTS[number // len(KINDS) % len(WEIGHTS)] for number in range(arguments.jobs)}
    with tempfile.TemporaryDirectory() as scratch, soak_teacher(arguments.model, Path(scratch), weights) as teacher:
        figures, checks = asyncio.run(soak(teacher, arguments))
        samples = [dataclasses.asdict(sample) for sample in teacher.samples]
    print_report(Console(), figures, checks)
    if arguments.json:
        content = {
            "machine": machine_facts(("grpcio", "torch", "transformers")),
            "settings": {"jobs": arguments.jobs, "minutes": arguments.minutes, "model": Path(arguments.model).name},
            "figures": figures,
            "checks": [dataclasses.asdict(check) for check in checks],
            "samples": samples,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
