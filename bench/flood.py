"""A job that floods beside one that asks little, at a real teacher: how long do the small requests take?

One tenant keeps 64 large requests outstanding; another one sends small requests, one after the other, first alone and
then beside the flood. The bar: their 95th percentile is at most twice what it is alone, and one batch of the engine.

    python bench/flood.py --model .cache/smollm2-135m-instruct --json bench/results/flood.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from machine import machine_facts
from soak_process import SoakTeacher, soak_teacher
from vopd_client.teacher.client import TeacherClient
from vopd_client.types import SequenceToScore, TeacherTopK
from vopd_server.tenancy import TenantLimits

OUTSTANDING = 64
LARGE, SMALL = (900, 128), (40, 16)  # tokens of context and completion
K = 20
PAUSE_S = 0.05  # between two small requests: they shall not come in step with the batches


@dataclass
class Flood:
    """What came back of it. engine_s: of the batch that each answer was part of."""

    num_tokens: int = 0
    engine_s: list[float] = field(default_factory=list)


def sequence(rng: np.random.Generator, vocab_size: int, lengths: tuple[int, int]) -> SequenceToScore:
    """Fresh random ids, so that nothing computed before can help."""
    context, completion = lengths
    return SequenceToScore(
        rng.integers(vocab_size, size=context), rng.integers(vocab_size, size=completion), TeacherTopK(K)
    )


async def latencies_s(client: TeacherClient, rng: np.random.Generator, number: int) -> list[float]:
    found = []
    for _ in range(number):
        asked = sequence(rng, client.info.vocab_size, SMALL)
        began_s = time.monotonic()
        await client.score([asked])
        found.append(time.monotonic() - began_s)
        await asyncio.sleep(PAUSE_S)
    return found


async def flood(client: TeacherClient, rng: np.random.Generator, counted: Flood) -> None:
    """Until it is cancelled."""

    async def ask_on() -> None:
        while True:
            asked = sequence(rng, client.info.vocab_size, LARGE)
            [scores] = await client.score([asked])
            counted.num_tokens += sum(LARGE)
            counted.engine_s.append(scores.engine_time_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(OUTSTANDING):
            group.create_task(ask_on())


async def measure(teacher: SoakTeacher, number: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    async with (
        TeacherClient(teacher.url, api_key=teacher.keys["small"]) as small,
        TeacherClient(teacher.url, api_key=teacher.keys["flood"]) as large,
    ):
        await latencies_s(small, rng, 5)  # a warm-up
        alone_s = await latencies_s(small, rng, number)
        counted = Flood()
        flooding = asyncio.create_task(flood(large, rng, counted))
        while len(counted.engine_s) < OUTSTANDING:  # noqa: ASYNC110  # the queue is as long as it gets
            await asyncio.sleep(0.05)
        counted.num_tokens, counted.engine_s = 0, []
        began_s = time.monotonic()
        beside_s = await latencies_s(small, rng, number)
        seconds = time.monotonic() - began_s
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
    p95_alone_s, p95_beside_s = (float(np.quantile(found, 0.95)) for found in (alone_s, beside_s))
    batch_s = float(np.median(counted.engine_s))
    return {
        "p95_alone_s": p95_alone_s,
        "p95_beside_a_flood_s": p95_beside_s,
        "p50_beside_a_flood_s": float(np.median(beside_s)),
        "batch_s": batch_s,
        "bar_s": 2 * p95_alone_s + batch_s,
        "flood_tokens_per_s": counted.num_tokens / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=60, help="small ones, alone and beside the flood")
    parser.add_argument("--flags", default="--max-batch-tokens 4096", help="of vopd-server serve")
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    flags = arguments.flags.split()
    tenants = {"flood": TenantLimits(), "small": TenantLimits()}
    with (
        tempfile.TemporaryDirectory() as scratch,
        soak_teacher(arguments.model, Path(scratch), tenants, flags) as teacher,
    ):
        found = asyncio.run(measure(teacher, arguments.requests))
    holds = found["p95_beside_a_flood_s"] <= found["bar_s"]
    table = Table("small requests", "seconds")
    for name, value in found.items():
        table.add_row(name.removesuffix("_s").replace("_", " "), f"{value:.3f}")
    console = Console()
    console.print(table)
    console.print("The bar holds." if holds else "[bold red]The bar is missed.")
    if arguments.json:
        settings = {"flags": arguments.flags, "requests": arguments.requests, "outstanding": OUTSTANDING}
        settings |= {"large": LARGE, "small": SMALL, "k": K, "model": Path(arguments.model).name}
        content = {"machine": machine_facts(("grpcio",)), "settings": settings, "figures": found, "holds": holds}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
