"""The real vLLM in float32 on the demo model, with a KV cache so small that requests are preempted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
import pytest_asyncio
import torch

from plain_forward import Reference
from vopd_server.engines.vllm import VllmEngine
from vopd_server.errors import EngineDeadError, InvalidRequestError, UnsupportedError
from vopd_server.types import Candidates, NoSupport, ScoreRequest, Support, TeacherTopK

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_CONTEXT_LENGTH = 255
BLOCK_SIZE = 32
# Measured: 1e-5 on average, 5e-5 at most.
MEAN_TOLERANCE_NATS = 1e-4
MAX_TOLERANCE_NATS = 1e-3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start_engine: Callable[..., Awaitable[VllmEngine]]) -> VllmEngine:
    return await start_engine(
        dtype="float32",
        max_context_length=MAX_CONTEXT_LENGTH,
        hang_timeout_s=10.0,
        block_size=BLOCK_SIZE,
        # Eight requests are let in, advance in turn by a block, and need twice as many blocks as there are.
        num_gpu_blocks_override=17,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        long_prefill_token_threshold=BLOCK_SIZE,
        scheduler_reserve_full_isl=False,
    )


@pytest.fixture(scope="module")
def reference(demo_model_dir: Path) -> Reference:
    return Reference(demo_model_dir, torch.float32)


def ids(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 49_152, length)


def request(context: np.ndarray, completion: np.ndarray, support: Support | None = None) -> ScoreRequest:
    return ScoreRequest("test", context, completion, support or NoSupport())


async def assert_equal(engine: VllmEngine, reference: Reference, requests: list[ScoreRequest]) -> None:
    """Scores them at once and compares each with a forward of its own."""
    answers = await asyncio.gather(*map(engine.score, requests))
    differences = np.concatenate(list(map(reference.differences, requests, answers)))
    print(f"{len(requests)} requests: mean {differences.mean():.2g}, max {differences.max():.2g} nats")  # noqa: T201
    assert differences.mean() < MEAN_TOLERANCE_NATS
    assert differences.max() < MAX_TOLERANCE_NATS


def counter(name: str, **labels: str) -> float:
    """The sum of one of vLLM's own counters."""
    return sum(
        sample.value
        for metric in prometheus_client.REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def test_it_tells_what_it_is(engine: VllmEngine) -> None:
    info = engine.info
    assert (info.engine, info.dtype, info.vocab_size, info.hidden_size) == ("vllm", "float32", 49_152, 576)
    assert info.max_context_length == MAX_CONTEXT_LENGTH
    assert info.supports == {"sampled", "teacher_top_k"}  # a CPU has the V1 runner
    assert not info.any_temperature
    assert not info.deterministic
    assert engine.tokenizer.tokens[engine.tokenizer.end_ids[-1]] == b"<|im_end|>"


@pytest.mark.parametrize("support", [NoSupport(), TeacherTopK(100)])
@pytest.mark.parametrize(("context_length", "completion_length"), [(1, 1), (1, 70), (64, 33), (40, 215)])
async def test_scores_equal_a_plain_forward(
    engine: VllmEngine, reference: Reference, context_length: int, completion_length: int, support: Support
) -> None:
    """One-token contexts, a context that ends on a block, and the longest request there may be."""
    asked = request(ids(1, context_length), ids(2, completion_length), support)
    await assert_equal(engine, reference, [asked])


async def test_the_teachers_ids_are_its_most_likely_ones(engine: VllmEngine, reference: Reference) -> None:
    asked = request(ids(3, 50), ids(4, 20), TeacherTopK(100))
    scores = await engine.score(asked)
    expected_TV = np.sort(reference.logprobs_TV(asked), axis=1)[:, ::-1]
    assert scores.support_logprobs is not None
    assert scores.support_ids_TK is not None
    np.testing.assert_allclose(scores.support_logprobs, expected_TV[:, :100], atol=MAX_TOLERANCE_NATS)
    assert all(len(set(row)) == 100 for row in scores.support_ids_TK.tolist())


async def test_concurrent_rollouts_with_common_openings_are_exact_though_preempted(
    engine: VllmEngine, reference: Reference
) -> None:
    """Two contexts, six completions each that begin with the same 40 tokens, all three supports there are."""
    preempted_before = counter("vllm:num_preemptions_total")
    supports = [NoSupport(), TeacherTopK(1), TeacherTopK(7)]
    requests = [
        request(ids(context, 60 + context), np.concatenate((ids(10, 40), ids(100 + n, 20 + 3 * n))), supports[n % 3])
        for n in range(6)
        for context in (5, 6)
    ]
    await assert_equal(engine, reference, requests)
    assert counter("vllm:num_preemptions_total") > preempted_before


async def test_the_same_tokens_again_are_exact(engine: VllmEngine, reference: Reference) -> None:
    asked = request(ids(7, 50), ids(8, 60), TeacherTopK(3))
    for _ in range(2):
        await assert_equal(engine, reference, [asked])


async def test_the_same_completion_after_another_context_is_exact(engine: VllmEngine, reference: Reference) -> None:
    """vLLM's freed buffers then hold the right tokens with another context's scores."""
    completion = ids(9, 60)
    for context in (ids(11, 50), ids(12, 50), ids(11, 50)):
        await assert_equal(engine, reference, [request(context, completion, TeacherTopK(3))])


async def test_a_completion_that_an_earlier_context_began_with_is_exact(
    engine: VllmEngine, reference: Reference
) -> None:
    """A hit beyond the context that the engine cannot foresee."""
    context, completion = ids(13, 50), ids(14, 60)
    await assert_equal(engine, reference, [request(np.concatenate((context, completion)), ids(15, 5))])
    await assert_equal(engine, reference, [request(context, completion, TeacherTopK(3))])


async def test_a_shared_context_is_read_from_the_cache(engine: VllmEngine, reference: Reference) -> None:
    context = ids(16, 3 * BLOCK_SIZE + 1)
    await engine.score(request(context, ids(17, 10)))
    hits_before = counter("vllm:prefix_cache_hits_total")
    await assert_equal(engine, reference, [request(context, ids(18, 10))])
    assert counter("vllm:prefix_cache_hits_total") - hits_before == 3 * BLOCK_SIZE


async def test_a_context_that_ends_on_a_block_is_read_from_the_cache_but_for_its_last_block(
    engine: VllmEngine, reference: Reference
) -> None:
    context = ids(27, 3 * BLOCK_SIZE)
    await engine.score(request(context, ids(28, 10)))
    hits_before, asked_again_before = counter("vllm:prefix_cache_hits_total"), engine.stats.asked_again
    await assert_equal(engine, reference, [request(context, ids(29, 10), TeacherTopK(3))])
    assert counter("vllm:prefix_cache_hits_total") - hits_before == 2 * BLOCK_SIZE
    assert engine.stats.asked_again == asked_again_before


async def test_completions_that_open_alike_are_asked_once(engine: VllmEngine, reference: Reference) -> None:
    context, opening = ids(90, 2 * BLOCK_SIZE + 5), ids(91, 2 * BLOCK_SIZE)
    await engine.score(request(context, opening))
    asked_again_before = engine.stats.asked_again
    await assert_equal(engine, reference, [request(context, np.concatenate((opening, ids(92, 10))), TeacherTopK(3))])
    assert engine.stats.asked_again == asked_again_before


async def test_another_tenants_context_is_not_read_from_the_cache(engine: VllmEngine, reference: Reference) -> None:
    mine = request(ids(25, 3 * BLOCK_SIZE + 1), ids(26, 10))
    await engine.score(replace(mine, cache_salt="mine"))
    hits_before = counter("vllm:prefix_cache_hits_total")
    await assert_equal(engine, reference, [replace(mine, cache_salt="yours")])
    assert counter("vllm:prefix_cache_hits_total") == hits_before


async def test_cancelled_requests_leave_vllm_and_the_others_are_answered(
    engine: VllmEngine, reference: Reference
) -> None:
    """Of forty requests eight run at a time; the rest would be scheduled before the last one is answered."""
    scheduled_before = counter("vllm:prefix_cache_queries_total")
    long = [request(ids(30 + n, 100), ids(80 + n, 100), TeacherTopK(100)) for n in range(40)]
    cancelled = [asyncio.create_task(engine.score(asked)) for asked in long]
    while counter("vllm:num_requests_running") == 0:  # noqa: ASYNC110 (vLLM offers nothing to wait for)
        await asyncio.sleep(0.01)
    for task in cancelled:
        task.cancel()
    await asyncio.wait(cancelled)
    assert sum(task.cancelled() for task in cancelled) > len(long) / 2  # some may have been answered by then
    await assert_equal(engine, reference, [request(ids(20, 30), ids(21, 30))])
    num_tokens_scheduled = counter("vllm:prefix_cache_queries_total") - scheduled_before
    assert num_tokens_scheduled < sum(asked.num_tokens for asked in long) / 2


async def test_an_empty_completion_has_no_rows(engine: VllmEngine) -> None:
    scores = await engine.score(request(ids(1, 5), np.empty(0, np.int64), TeacherTopK(3)))
    assert scores.sampled_logprobs_T.shape == (0,)


@pytest.mark.parametrize(
    "bad",
    [
        request(np.array([1, 2]), np.array([49_152])),
        request(np.array([-1, 2]), np.array([3])),
        request(ids(1, MAX_CONTEXT_LENGTH), ids(2, 1)),
        request(ids(1, 5), ids(2, 5), TeacherTopK(49_153)),
    ],
    ids=["id beyond the vocabulary", "negative id", "too long", "k beyond the vocabulary"],
)
async def test_what_vllm_could_not_bear_is_refused_and_hurts_nobody(
    engine: VllmEngine, reference: Reference, bad: ScoreRequest
) -> None:
    good = asyncio.create_task(assert_equal(engine, reference, [request(ids(22, 30), ids(23, 30))]))
    with pytest.raises(InvalidRequestError):
        await engine.score(bad)
    await good
    await assert_equal(engine, reference, [request(ids(22, 30), ids(24, 30))])


async def test_candidates_are_refused_where_the_runner_has_none(engine: VllmEngine) -> None:
    with pytest.raises(UnsupportedError, match="candidates"):
        await engine.score(request(ids(1, 5), ids(2, 1), Candidates(np.array([1]), np.array([1]))))


async def test_a_living_engine_passes_its_check_and_a_frozen_one_does_not(
    engine: VllmEngine, engine_core_pids: Callable[[], list[int]]
) -> None:
    """The last test of this module: an engine that was given up stays so."""
    await engine.check()
    for pid in engine_core_pids():
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(EngineDeadError, match="has not answered for 10 s"):
            await engine.check()
        with pytest.raises(EngineDeadError, match="has not answered"):
            await engine.score(request(ids(1, 5), ids(2, 5)))
    finally:
        for pid in engine_core_pids():
            os.kill(pid, signal.SIGCONT)
