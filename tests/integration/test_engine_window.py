"""What waits for its turn in the engine: deadlines that pass meanwhile, and an engine that small jobs leave busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from fake_engine import FakeEngine, until
from tenants import SharedTeacher, shared_teacher
from vopd_server.tenancy import TenantLimits
from vopd_server.types import ScoreRequest, Scores
from wire_client import (
    Question,
    RefusedError,
    WireClient,
    refusal_of,
    score_request,
    stream_context,
    stream_sequence,
    stream_settings,
)

CONTEXTS: list[Sequence[int]] = [[1, 2, 3]]
FILLING = Question([7] * 20)
WAITING = Question([5] * 6)
WAYS = ["Score", "ScoreStream", "HTTP"]
TWO = {"a": TenantLimits(), "b": TenantLimits()}


async def ask(client: WireClient, way: str, timeout_s: float) -> None:
    """Raises: RefusedError."""
    request = score_request(CONTEXTS, [WAITING])
    if way == "Score":
        await client.send_score(request, timeout_s=timeout_s)
    elif way == "HTTP":
        await client.post_score(request, timeout_s=timeout_s)
    else:
        stream = client.stream(timeout_s=timeout_s)
        try:
            for message in (stream_settings(), stream_context(0, CONTEXTS[0]), stream_sequence(WAITING, CONTEXTS)):
                await stream.write(message)
            await stream.done_writing()
            while await stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            raise RefusedError(refusal_of(error)) from error


async def test_a_deadline_that_passes_in_the_queue_leaves_it_and_never_reaches_the_engine(tmp_path: Path) -> None:
    async with (
        shared_teacher(tmp_path, TWO, engine_window_tokens=24) as shared,
        shared.connect("a") as a,
        shared.connect("b") as b,
    ):
        shared.engine.hold()
        first = asyncio.ensure_future(a.score(CONTEXTS, [FILLING]))
        await until(lambda: shared.engine.num_running == 1)
        asked = {(way, client): asyncio.ensure_future(ask(client, way, 2.0)) for way in WAYS for client in (a, b)}
        await until(lambda: (shared.sums["a"][3], shared.sums["b"][3]) == (3, 3))  # queued
        for (way, _), call in asked.items():
            with pytest.raises(RefusedError) as late:
                await call
            assert late.value.refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED, way
        await until(lambda: shared.sums["b"] == (0, 0, 0, 0, 0) and shared.sums["a"][3] == 0)
        assert (len(shared.engine.requests), shared.engine.num_cancelled) == (1, 0)
        assert not first.done()
        shared.engine.let_go()
        await first
        assert await b.score(CONTEXTS, [WAITING])
        assert shared.is_empty


async def test_one_deadline_takes_what_runs_and_what_is_queued_and_makes_room_for_another_tenant(
    tmp_path: Path,
) -> None:
    async with (
        shared_teacher(tmp_path, TWO, engine_window_tokens=24) as shared,
        shared.connect("a") as a,
        shared.connect("b") as b,
    ):
        shared.engine.hold()
        request = score_request(CONTEXTS, [FILLING, FILLING])  # of which one fits the window
        both = asyncio.ensure_future(a.send_score(request, timeout_s=2.0))
        await until(lambda: shared.engine.num_running == 1)
        other = asyncio.ensure_future(b.score(CONTEXTS, [FILLING]))
        await until(lambda: shared.sums["b"][3] == 1)
        with pytest.raises(RefusedError) as late:
            await both
        assert late.value.refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: shared.engine.num_cancelled == 1 and shared.engine.num_running == 1)
        assert shared.sums["a"] == (0, 0, 0, 0, 0)
        assert shared.sums["b"][4] == 1, "it entered in the place of what was cancelled"
        shared.engine.let_go()
        await other
        assert shared.is_empty


# ---------------------------------------------------------------- nothing is left idle for the sake of the small


class OneAtATime(FakeEngine):
    """A sequence takes as long as its tokens, after those before it; what it has done is in `tokens_done`."""

    def __init__(self) -> None:
        super().__init__(window_tokens=16_000)
        self._turn = asyncio.Lock()
        self.tokens_done = 0

    async def score(self, request: ScoreRequest) -> Scores:
        if request.request_id.startswith("golden"):
            return await super().score(request)
        async with self._turn:
            await asyncio.sleep(1e-5 * request.num_tokens)
        self.tokens_done += request.num_tokens
        return Scores(np.zeros(len(request.completion_ids), np.float32))


async def tokens_a_second(engine: OneAtATime, seconds: float) -> float:
    began_s, before = time.monotonic(), engine.tokens_done
    await asyncio.sleep(seconds)
    return (engine.tokens_done - before) / (time.monotonic() - began_s)


async def ask_on(client: WireClient, length: int, *, pause_s: float = 0.0) -> None:
    while True:
        await client.score(CONTEXTS, [Question([5] * length)])
        await asyncio.sleep(pause_s)


async def test_a_flood_gets_what_a_small_job_leaves_of_the_engine(tmp_path: Path) -> None:
    """All that the engine does beside a small job, against what it does for the flood alone: measured alone before
    and after, as the machine may be busier in between. A third is left for that; a flood that is held back
    while the small job has something to do would leave the engine nine tenths idle."""
    engine = OneAtATime()
    async with (
        shared_teacher(tmp_path, {"flood": TenantLimits(), "small": TenantLimits()}, engine) as shared,
        shared.connect("flood") as flood,
        shared.connect("small") as small,
    ):
        flooding = [asyncio.create_task(ask_on(flood, 3000)) for _ in range(64)]
        await asyncio.sleep(0.3)
        alone = [await tokens_a_second(engine, 1.2)]
        asking = asyncio.create_task(ask_on(small, 40, pause_s=0.02))
        await asyncio.sleep(0.2)
        before = sequences_of(shared, "small")
        beside = await tokens_a_second(engine, 1.2)
        num_small = sequences_of(shared, "small") - before
        asking.cancel()
        alone.append(await tokens_a_second(engine, 1.2))
        for task in flooding:
            task.cancel()
        await asyncio.gather(asking, *flooding, return_exceptions=True)
        told = f"{beside:.0f} tokens/s beside {num_small} small requests, {alone[0]:.0f} and {alone[1]:.0f} alone"
        assert num_small >= 3, told
        assert beside >= 0.67 * min(alone), told
        await until(lambda: shared.is_empty)


def sequences_of(shared: SharedTeacher, tenant_id: str) -> int:
    tenants = shared.teacher.server.service.status().tenants
    return next(tenant.sequences_scored for tenant in tenants if tenant.id == tenant_id)
