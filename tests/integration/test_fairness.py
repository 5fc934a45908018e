"""A job that floods slows itself alone: the real server over sockets, around an engine whose work takes time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fake_engine import FakeEngine, fake_scores
from tenants import SharedTeacher, shared_teacher
from vopd_server.engines.batching import Shape, plan_next_pass
from vopd_server.tenancy import TenantLimits
from vopd_server.types import ScoreRequest, Scores
from wire_client import Question

BATCH_TOKENS = 16_000
SECONDS_PER_TOKEN = 1e-5  # a full batch takes 0.16 s
LARGE = Question([5] * 3000, name="large")
SMALL = Question([5] * 40, name="small")
CONTEXTS: list[Sequence[int]] = [[1] * 200]


class SerialEngine(FakeEngine):
    """One pass at a time, planned as the transformers engine plans them; it takes as long as its tokens do."""

    def __init__(self) -> None:
        super().__init__(window_tokens=BATCH_TOKENS)
        self._queued: list[tuple[ScoreRequest, asyncio.Future[Scores]]] = []
        self._has_work = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self.pass_seconds: list[float] = []

    async def score(self, request: ScoreRequest) -> Scores:
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._queued.append((request, answer))
        self._has_work.set()
        return await answer

    async def _run(self) -> None:
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            while self._queued:
                await self._run_pass()

    async def _run_pass(self) -> None:
        shapes = [
            Shape(request.cache_salt.encode(), len(request.context_ids), len(request.completion_ids))
            for request, _ in self._queued
        ]
        members = plan_next_pass(shapes, max_tokens=BATCH_TOKENS).members
        taken = [self._queued[index] for index in members]
        self._queued = [entry for index, entry in enumerate(self._queued) if index not in members]
        began_s = time.monotonic()
        await asyncio.sleep(SECONDS_PER_TOKEN * sum(len(request.completion_ids) for request, _ in taken))
        for request, answer in taken:
            if not answer.done():
                answer.set_result(scores_of(request))
        self.pass_seconds.append(time.monotonic() - began_s)

    async def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
        await super().close()


def scores_of(request: ScoreRequest) -> Scores:
    """At no cost: what is right is tested elsewhere."""
    if request.request_id.startswith("golden"):
        return fake_scores(request)
    return Scores(np.zeros(len(request.completion_ids), np.float32))


async def latencies_s(shared: SharedTeacher, tenant_id: str, *, number: int) -> list[float]:
    """Of one small request after the other."""
    async with shared.connect(tenant_id) as client:
        found = []
        for _ in range(number):
            began_s = time.monotonic()
            await client.score(CONTEXTS, [SMALL])
            found.append(time.monotonic() - began_s)
            await asyncio.sleep(0.02)
        return found


async def flood(shared: SharedTeacher, tenant_id: str, question: Question, *, outstanding: int) -> None:
    """Keeps so many requests outstanding, until it is cancelled."""
    async with shared.connect(tenant_id) as client:

        async def ask_on() -> None:
            while True:
                await client.score(CONTEXTS, [question])

        async with asyncio.TaskGroup() as group:
            for _ in range(outstanding):
                group.create_task(ask_on())


async def stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def sequences_scored(shared: SharedTeacher) -> dict[str, int]:
    return {tenant.id: tenant.sequences_scored for tenant in shared.teacher.server.service.status().tenants}


async def test_small_requests_beside_a_flood_wait_for_one_batch_at_most(tmp_path: Path) -> None:
    """p95 under 64 large requests outstanding: at most twice that alone, and one batch of the engine.

    The bound has room: a small request finds the engine half through a batch on average, and 40 of them give a p95
    that is the third largest. A machine that stops for a moment in three of them would fail it falsely.
    """
    engine = SerialEngine()
    tenants = {"flood": TenantLimits(), "small": TenantLimits()}
    async with shared_teacher(tmp_path, tenants, engine) as shared:
        alone_s = await latencies_s(shared, "small", number=40)
        flooding = asyncio.create_task(flood(shared, "flood", LARGE, outstanding=64))
        await asyncio.sleep(0.5)
        engine.pass_seconds.clear()
        beside_s = await latencies_s(shared, "small", number=40)
        await stop(flooding)
        batch_s = float(np.quantile(engine.pass_seconds, 0.95))
        p95_alone_s, p95_beside_s = (float(np.quantile(found, 0.95)) for found in (alone_s, beside_s))
        told = f"p95 {p95_alone_s:.3f} s alone, {p95_beside_s:.3f} s beside a flood, a batch {batch_s:.3f} s"
        assert len(engine.pass_seconds) > 5, "the flood did not keep the engine busy"
        assert p95_beside_s <= 2 * p95_alone_s + batch_s, told


async def test_shares_of_two_floods_are_those_of_their_weights_and_nothing_is_left_idle(tmp_path: Path) -> None:
    engine = SerialEngine()
    tenants = {"one": TenantLimits(weight=1), "three": TenantLimits(weight=3)}
    async with shared_teacher(tmp_path, tenants, engine) as shared:
        lengths = {"one": 700, "three": 1500}
        floods = [
            asyncio.create_task(flood(shared, name, Question([5] * length), outstanding=32))
            for name, length in lengths.items()
        ]
        await asyncio.sleep(0.5)
        before, engine.pass_seconds = sequences_scored(shared), []
        began_s = time.monotonic()
        await asyncio.sleep(5)
        seconds = time.monotonic() - began_s
        had = {name: (number - before[name]) * lengths[name] for name, number in sequences_scored(shared).items()}
        busy = sum(engine.pass_seconds) / seconds
        await stop(*floods)
        share = had["three"] / sum(had.values())
        told = f"{had}, share {share:.3f}, engine busy {busy:.0%}"
        assert abs(share - 0.75) <= 0.075, told
        assert busy >= 0.8, told
