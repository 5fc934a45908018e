"""The vLLM engine's own logic, on a fake vLLM that has every known way to lose rows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest

from fake_vllm import BLOCK_SIZE, VOCAB_SIZE, FakeVllm, Output, row_logprobs
from vopd_server.engines.vllm import VllmEngine, VllmStats
from vopd_server.errors import ConfigError, EngineDeadError, EngineError, InvalidRequestError, UnavailableError
from vopd_server.types import Candidates, NoSupport, ScoreRequest, Scores, Support, TeacherTopK

Start = Callable[[FakeVllm], Awaitable[VllmEngine]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts an engine on a fake vLLM; it is closed at the end."""
    engines: list[VllmEngine] = []

    async def start_engine(fake: FakeVllm) -> VllmEngine:
        engine = VllmEngine(model="fake", hang_timeout_s=0.05, launch=lambda: fake)
        engines.append(engine)
        await engine.start()
        fake.asked.clear()
        fake.arrivals = asyncio.Queue()
        return engine

    yield start_engine
    for engine in engines:
        await engine.close()


def request(context: list[int], completion: list[int], support: Support | None = None) -> ScoreRequest:
    return ScoreRequest("same-id", np.array(context), np.array(completion), support or NoSupport())


def assert_exact(request: ScoreRequest, scores: Scores) -> None:
    prefix, completion = request.context_ids.tolist(), request.completion_ids.tolist()
    rows_TV = np.stack([row_logprobs(prefix + completion[:t]) for t in range(len(completion))])
    np.testing.assert_array_equal(scores.sampled_logprobs_T, rows_TV[np.arange(len(completion)), completion])
    match request.support:
        case TeacherTopK(k=k):
            assert scores.support_ids_TK is not None
            np.testing.assert_array_equal(scores.support_ids_TK, np.argsort(-rows_TV, kind="stable")[:, :k])
            np.testing.assert_array_equal(
                scores.support_logprobs, np.take_along_axis(rows_TV, scores.support_ids_TK, axis=1)
            )
        case Candidates(ids=ids, counts_T=counts_T):
            rows = np.repeat(np.arange(len(completion)), counts_T)
            np.testing.assert_array_equal(scores.support_logprobs, rows_TV[rows, ids])


CONTEXT = list(range(20))  # two blocks of 8 and a half
WAYS = [("v1", NoSupport()), ("v1", TeacherTopK(3)), ("v2", NoSupport()), ("v2", TeacherTopK(3))]
CANDIDATES = Candidates(np.arange(30) % VOCAB_SIZE, np.array([3] * 10))


@pytest.mark.parametrize(("runner", "support"), [*WAYS, ("v2", CANDIDATES)])
class TestPrefixCache:
    async def test_rollouts_of_one_context_read_its_cache(self, runner: str, support: Support, start: Start) -> None:
        fake = FakeVllm(runner)
        engine = await start(fake)
        for first in range(6):
            asked = request(CONTEXT, [first, *range(9)], support)
            assert_exact(asked, await engine.score(asked))
        assert len(fake.asked) == 6
        reused = 5 * BLOCK_SIZE * (len(CONTEXT) // BLOCK_SIZE)
        assert engine.stats == VllmStats(requests=6, tokens_reused=reused)
        assert engine.counters.context_tokens_reused == reused

    async def test_concurrent_rollouts_with_a_common_opening_are_exact_and_asked_once(
        self, runner: str, support: Support, start: Start
    ) -> None:
        fake = FakeVllm(runner)
        engine = await start(fake)
        requests = [request(CONTEXT, [1, 2, 3, 4, 5, 6, 7, 8, 9, last], support) for last in range(6)]
        for asked, scores in zip(requests, await asyncio.gather(*map(engine.score, requests)), strict=True):
            assert_exact(asked, scores)
        late = request(CONTEXT, [1, 2, 3, 4, 5, 6, 7, 8, 9, 6], support)
        assert_exact(late, await engine.score(late))
        assert len(fake.asked) == 7
        assert engine.stats == VllmStats(requests=7, tokens_reused=16)

    async def test_the_same_tokens_twice_are_exact(self, runner: str, support: Support, start: Start) -> None:
        engine = await start(FakeVllm(runner))
        for _ in range(2):
            asked = request(CONTEXT, list(range(10)), support)
            assert_exact(asked, await engine.score(asked))

    async def test_a_hit_past_the_context_is_asked_again(self, runner: str, support: Support, start: Start) -> None:
        """The longer context before holds this completion's opening, and the scheduler is not ours."""
        fake = FakeVllm(runner)
        fake.stays_within_contexts = False
        engine = await start(fake)
        await engine.score(request([*CONTEXT, *range(20)], [1]))
        asked = request(CONTEXT, list(range(10)), support)
        assert_exact(asked, await engine.score(asked))
        assert [entry["read_cache"] for entry in fake.asked] == [True, True, False]

    async def test_a_hit_after_preemption_is_asked_again(self, runner: str, support: Support, start: Start) -> None:
        fake = FakeVllm(runner)
        engine = await start(fake)
        fake.preempt_with = 24
        asked = request(CONTEXT, list(range(10)), support)
        assert_exact(asked, await engine.score(asked))
        assert [entry["read_cache"] for entry in fake.asked] == [True, False]
        assert engine.stats == VllmStats(requests=1, asked_again=1)

    async def test_a_context_that_ends_on_a_block_boundary_is_exact(
        self, runner: str, support: Support, start: Start
    ) -> None:
        fake = FakeVllm(runner)
        engine = await start(fake)
        for first in range(3):
            asked = request(list(range(3 * BLOCK_SIZE)), [first, *range(9)], support)
            assert_exact(asked, await engine.score(asked))
        # All but the last block: its last row scores the first completion token.
        assert engine.stats == VllmStats(requests=3, tokens_reused=2 * 2 * BLOCK_SIZE)

    async def test_a_one_token_context_is_exact(self, runner: str, support: Support, start: Start) -> None:
        engine = await start(FakeVllm(runner))
        asked = request([5], list(range(10)), support)
        assert_exact(asked, await engine.score(asked))


async def test_stale_memory_of_the_same_tokens_is_not_taken_for_scores(start: Start) -> None:
    """The V1 runner's freed buffer holds the same completion's numbers after another context."""
    fake = FakeVllm("v1")
    fake.stays_within_contexts = False
    engine = await start(fake)
    other = [49, *CONTEXT[1:]]
    await engine.score(request([*CONTEXT, *range(16)], [1]))
    await engine.score(request(other, list(range(10))))
    asked = request(CONTEXT, list(range(10)))
    assert_exact(asked, await engine.score(asked))
    assert [entry["read_cache"] for entry in fake.asked] == [True, True, True, False]


async def test_a_second_answer_that_is_not_there_is_an_error_and_the_next_request_is_answered(start: Start) -> None:
    fake = FakeVllm("v1")
    engine = await start(fake)

    def lose_scores(output: Output) -> None:
        output.prompt_logprobs = None

    fake.spoil = lose_scores
    with pytest.raises(EngineError, match="no scores"):
        await engine.score(request(CONTEXT, [1, 2]))
    assert [entry["read_cache"] for entry in fake.asked] == [True, False]
    fake.spoil = None
    asked = request(CONTEXT, [1, 2])
    assert_exact(asked, await engine.score(asked))


class TestWhatItTells:
    @pytest.mark.parametrize(("runner", "has_candidates"), [("v1", False), ("v2", True)])
    async def test_candidates_are_offered_where_the_runner_scores_given_ids(
        self, runner: str, has_candidates: bool, start: Start
    ) -> None:
        engine = await start(FakeVllm(runner))
        expected = {"sampled", "teacher_top_k"} | ({"candidates"} if has_candidates else set())
        assert engine.info.supports == expected

    async def test_a_token_is_left_for_what_vllm_generates(self, start: Start) -> None:
        engine = await start(FakeVllm(max_model_len=100))
        assert engine.info.max_context_length == 99

    async def test_a_model_of_two_tokens_can_be_probed(self, start: Start) -> None:
        engine = await start(FakeVllm("v2", max_model_len=3))
        asked = request([1], [2])
        assert_exact(asked, await engine.score(asked))

    async def test_ways_that_disagree_are_refused_at_start(self) -> None:
        fake = FakeVllm("v2")

        def shift(output: Output) -> None:
            if output.prompt_token_id_logprobs is not None:
                output.prompt_token_id_logprobs = output.prompt_token_id_logprobs - 1

        fake.spoil = shift
        engine = VllmEngine(model="fake", launch=lambda: fake)
        with pytest.raises(ConfigError, match="differ by 1 nats"):
            await engine.start()
        await engine.close()
        assert fake.is_shut_down

    async def test_a_vllm_that_cannot_score_is_refused_at_start(self) -> None:
        fake = FakeVllm("v1")
        fake.error = EngineError("vLLM failed: no kernel")
        engine = VllmEngine(model="fake", launch=lambda: fake)
        with pytest.raises(ConfigError, match="cannot score with it: vLLM failed: no kernel"):
            await engine.start()
        await engine.close()

    async def test_queue_and_engine_time_are_told_apart(self, start: Start) -> None:
        engine = await start(FakeVllm())
        scores = await engine.score(request(CONTEXT, [1]))
        assert (scores.queue_time_s, scores.engine_time_s) == (2.0, 0.5)


class TestRequests:
    async def test_requests_with_one_id_are_answered_each_on_its_own(self, start: Start) -> None:
        engine = await start(FakeVllm())
        requests = [request([n + 1], [n]) for n in range(5)]
        for asked, scores in zip(requests, await asyncio.gather(*map(engine.score, requests)), strict=True):
            assert_exact(asked, scores)

    async def test_an_empty_completion_needs_no_vllm(self, start: Start) -> None:
        fake = FakeVllm()
        engine = await start(fake)
        scores = await engine.score(request(CONTEXT, [], TeacherTopK(3)))
        assert scores.support_logprobs is not None
        assert scores.support_logprobs.shape == (0, 3)
        assert fake.asked == []

    async def test_a_k_beyond_the_vocabulary_is_refused_before_vllm_sees_it(self, start: Start) -> None:
        fake = FakeVllm()
        engine = await start(fake)
        with pytest.raises(InvalidRequestError, match="k: 51 > vocab_size 50"):
            await engine.score(request(CONTEXT, [1], TeacherTopK(51)))
        assert fake.asked == []

    async def test_cancelling_aborts_the_request_and_no_other(self, start: Start) -> None:
        fake = FakeVllm()
        engine = await start(fake)
        fake.may_answer.clear()
        cancelled = asyncio.create_task(engine.score(request(CONTEXT, [1])))
        asked = request(CONTEXT, [2])
        kept = asyncio.create_task(engine.score(asked))
        await fake.arrivals.get()
        await fake.arrivals.get()
        cancelled.cancel()
        await asyncio.wait((cancelled,))
        assert cancelled.cancelled()
        assert len(fake.aborted) == 1
        fake.may_answer.set()
        assert_exact(asked, await kept)


class TestEnd:
    async def test_a_death_fails_the_request_that_meets_it_and_wakes_the_watcher(self, start: Start) -> None:
        fake = FakeVllm()
        engine = await start(fake)
        watcher = asyncio.create_task(engine.wait_until_dead())
        fake.is_dead = True
        with pytest.raises(EngineDeadError):
            await engine.score(request(CONTEXT, [1]))
        assert isinstance(await watcher, EngineDeadError)
        with pytest.raises(EngineDeadError, match="died"):
            await engine.score(request(CONTEXT, [1]))

    async def test_a_death_is_found_while_nobody_asks(self, start: Start) -> None:
        fake = FakeVllm()
        engine = await start(fake)
        watcher = asyncio.create_task(engine.wait_until_dead(interval_s=0.01))
        await asyncio.sleep(0.03)
        assert not watcher.done()
        fake.is_dead = True
        assert "died" in str(await watcher)

    async def test_a_hung_engine_is_given_up_and_fails_what_it_runs(self, start: Start) -> None:
        fake = FakeVllm()
        engine = await start(fake)
        fake.is_hung = True
        fake.may_answer.clear()
        running = asyncio.create_task(engine.score(request(CONTEXT, [1])))
        await fake.arrivals.get()
        with pytest.raises(EngineDeadError, match=r"not answered for 0\.05 s"):
            await engine.check()
        with pytest.raises(EngineDeadError, match="not answered"):
            await running
        assert len(fake.aborted) == 1

    async def test_closing_fails_what_runs_and_ends_vllm(self, start: Start) -> None:
        fake = FakeVllm()
        engine = await start(fake)
        fake.may_answer.clear()
        running = asyncio.create_task(engine.score(request(CONTEXT, [1])))
        await fake.arrivals.get()
        await engine.close()
        with pytest.raises(UnavailableError, match="closing"):
            await running
        with pytest.raises(UnavailableError, match="closing"):
            await engine.score(request(CONTEXT, [1]))
        assert len(fake.aborted) == 1
        assert fake.is_shut_down

    async def test_closing_during_the_launch_waits_for_it_and_ends_vllm(self) -> None:
        fake = FakeVllm()
        may_go_on = threading.Event()

        def launch() -> FakeVllm:
            may_go_on.wait(10)
            return fake

        engine = VllmEngine(model="fake", launch=launch)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait((starting,))
        assert starting.cancelled()
        asyncio.get_running_loop().call_later(0.05, may_go_on.set)
        await engine.close()
        assert fake.is_shut_down

    async def test_an_engine_that_was_not_started_says_so_and_can_be_closed(self) -> None:
        engine = VllmEngine(model="fake", launch=FakeVllm)
        with pytest.raises(UnavailableError, match="not been started"):
            await engine.score(request(CONTEXT, [1]))
        await engine.close()
