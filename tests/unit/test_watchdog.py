"""The watchdog: what it decides, with time handed in, and what it does to an engine, with very short times."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from fake_engine import FakeEngine, fake_scores, until
from vopd_server.errors import EngineDeadError, EngineError
from vopd_server.golden import GoldenReference, flat_logprobs, golden_requests, tolerance_of
from vopd_server.types import ScoreRequest, Scores
from vopd_server.watchdog import Step, Watch, Watchdog

INTERVAL_S, HANG_TIMEOUT_S = 0.01, 0.1
NEVER_S = float("-inf")
FAR_S = 10.0  # for what must happen: long on the slowest machine


# ---------------------------------------------------------------- decisions


def watch() -> Watch:
    return Watch(interval_s=30.0, hang_timeout_s=120.0, now_s=1000.0)


def test_a_quiet_engine_is_probed_and_one_that_answers_is_not() -> None:
    dog = watch()
    assert dog.next_step(1000.0, NEVER_S) == Step("wait", 30.0)
    assert dog.next_step(1029.0, NEVER_S) == Step("wait", 1.0)
    assert dog.next_step(1030.0, NEVER_S) == Step("probe")
    assert dog.next_step(1030.0, 1029.0) == Step("wait", 29.0)
    assert dog.next_step(9999.0, 9999.0) == Step("wait", 30.0)
    assert dog.next_step(9999.0, 9969.0) == Step("probe")


def test_an_answer_to_the_probe_counts_as_an_answer() -> None:
    dog = watch()
    dog.probe_begun(1030.0)
    assert not dog.probe_ended(1040.0, is_good=True)
    assert dog.next_step(1040.0, NEVER_S) == Step("wait", 30.0)
    assert dog.next_step(1070.0, NEVER_S) == Step("probe")


def test_an_engine_that_answers_nothing_while_a_probe_is_out_hangs() -> None:
    dog = watch()
    dog.probe_begun(1030.0)
    assert dog.next_step(1030.0, 1000.0) == Step("wait", 120.0)
    assert dog.next_step(1149.0, 1000.0) == Step("wait", 1.0)
    assert dog.next_step(1150.0, 1000.0) == Step("hung")


def test_a_probe_may_wait_as_long_as_others_are_answered() -> None:
    dog = watch()
    dog.probe_begun(1030.0)
    assert dog.next_step(1150.0, 1149.0) == Step("wait", 119.0)
    assert dog.next_step(5000.0, 4990.0) == Step("wait", 110.0)
    assert dog.next_step(5110.0, 4990.0) == Step("hung")


def test_two_bad_probes_in_a_row_are_the_end_and_a_good_one_between_them_is_not() -> None:
    dog = watch()
    verdicts = []
    for is_good in (False, True, False, True, True, False, False):
        dog.probe_begun(2000.0)
        verdicts.append(dog.probe_ended(2000.0, is_good=is_good))
    assert verdicts == [False] * 6 + [True]


def test_a_bad_probe_is_repeated_after_one_interval_whatever_is_answered() -> None:
    """An engine that scores differently answers students all the while."""
    dog = watch()
    dog.probe_begun(1030.0)
    dog.probe_ended(1031.0, is_good=False)
    assert dog.next_step(1060.0, 1060.0) == Step("wait", 1.0)
    assert dog.next_step(1061.0, 1060.9) == Step("probe")


# ---------------------------------------------------------------- on an engine


def reference() -> GoldenReference:
    request, *_ = golden_requests(vocab_size=300, max_context_length=100, supports={"sampled", "teacher_top_k"})
    return GoldenReference(request, flat_logprobs(fake_scores(request)), tolerance_of("float32"))


def watchdog(
    engine: FakeEngine, *, last_answer_s: Callable[[], float] = lambda: NEVER_S, hang_timeout_s: float = FAR_S
) -> Watchdog:
    return Watchdog(
        engine, reference(), interval_s=INTERVAL_S, hang_timeout_s=hang_timeout_s, last_answer_s=last_answer_s
    )


async def death_of(engine: FakeEngine, *, hang_timeout_s: float = FAR_S) -> EngineDeadError:
    return await asyncio.wait_for(watchdog(engine, hang_timeout_s=hang_timeout_s).wait_until_dead(), FAR_S)


async def assert_lives_on(engine: FakeEngine, num_probes: int) -> None:
    """It is still watched after so many probes."""
    watching = asyncio.create_task(watchdog(engine).wait_until_dead())
    await asyncio.wait_for(until(lambda: len(engine.requests) >= num_probes), FAR_S)
    assert not watching.done()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


def drifted(request: ScoreRequest) -> Scores:
    scores = fake_scores(request)
    return replace(scores, sampled_logprobs_T=scores.sampled_logprobs_T - np.float32(0.5))


def in_turn(*outcomes: Exception | None) -> Callable[[ScoreRequest], Exception | None]:
    """For `FakeEngine.fail`: these, one a call, and then None for ever."""
    left: Iterator[Exception | None] = iter(outcomes)
    return lambda _: next(left, None)


async def test_a_quiet_engine_is_probed_again_and_again_with_the_golden_request() -> None:
    engine = FakeEngine()
    await assert_lives_on(engine, 4)
    golden = reference().request
    for request in engine.requests:
        np.testing.assert_array_equal(request.completion_ids, golden.completion_ids)


async def test_a_busy_engine_is_left_alone() -> None:
    engine = FakeEngine()
    watching = asyncio.create_task(watchdog(engine, last_answer_s=time.monotonic).wait_until_dead())
    await asyncio.sleep(10 * INTERVAL_S)
    watching.cancel()
    assert engine.requests == []


async def test_a_hang_is_the_end_and_its_probe_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.hold()
    reason = await death_of(engine, hang_timeout_s=HANG_TIMEOUT_S)
    assert str(reason) == (
        "the engine has answered neither a request nor the watchdog's probe for 0.1 s (engine_hang_timeout_s)"
    )
    assert caplog.messages == [f"the watchdog gives the engine up: {reason}"]
    await until(lambda: engine.num_cancelled == 1)


async def test_a_probe_that_waits_while_others_are_answered_is_no_hang() -> None:
    engine = FakeEngine()
    engine.hold()
    others_are_answered = True

    def last_answer_s() -> float:
        return time.monotonic() if others_are_answered and engine.num_running else NEVER_S

    dog = watchdog(engine, last_answer_s=last_answer_s, hang_timeout_s=HANG_TIMEOUT_S)
    watching = asyncio.create_task(dog.wait_until_dead())
    await asyncio.sleep(4 * HANG_TIMEOUT_S)
    assert not watching.done()
    assert len(engine.requests) == 1  # the same probe all the time
    others_are_answered = False
    assert "has answered neither" in str(await asyncio.wait_for(watching, FAR_S))


async def test_a_slow_answer_is_an_answer() -> None:
    engine = FakeEngine()
    engine.hold()
    watching = asyncio.create_task(watchdog(engine).wait_until_dead())
    await until(lambda: engine.num_running == 1)
    engine.let_go()
    await asyncio.wait_for(until(lambda: len(engine.requests) >= 3), FAR_S)
    assert not watching.done()
    watching.cancel()


async def test_a_single_failure_is_told_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.fail(in_turn(EngineError("out of memory"), None, EngineError("out of memory"), None))
    await assert_lives_on(engine, 6)
    warning = "the watchdog's probe fails: EngineError('out of memory'); it will ask again in 0.01 s"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [warning] * 2


@pytest.mark.parametrize("error", [EngineError("no kernel"), RuntimeError("a mistake of ours")])
async def test_failing_twice_in_a_row_is_the_end(error: Exception) -> None:
    engine = FakeEngine()
    engine.fail(lambda _: error)
    assert str(await death_of(engine)) == f"the watchdog's probe fails: {error!r}, the second time in a row"
    assert len(engine.requests) == 2


async def test_an_engine_that_says_it_is_dead_is_believed_at_once() -> None:
    engine = FakeEngine()
    engine.fail(lambda _: EngineDeadError("vLLM died"))
    assert str(await death_of(engine)) == "vLLM died"
    assert len(engine.requests) == 1


async def test_scores_that_have_changed_twice_in_a_row_are_the_end() -> None:
    engine = FakeEngine()
    engine.answer(drifted)
    reason = str(await death_of(engine))
    assert "scores differently from the start, by 0.25 nats on average and 0.5 at most (> 0.01 nats on" in reason
    assert reason.endswith("the second time in a row")
    assert len(engine.requests) == 2


async def test_scores_that_have_changed_once_are_not(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.answer(lambda request: drifted(request) if len(engine.requests) == 1 else fake_scores(request))
    await assert_lives_on(engine, 4)
    assert sum("scores differently" in message for message in caplog.messages) == 1


async def test_a_failure_and_a_change_in_a_row_are_the_end() -> None:
    engine = FakeEngine()
    engine.fail(in_turn(EngineError("no kernel")))
    engine.answer(drifted)
    assert "scores differently" in str(await death_of(engine))
    assert len(engine.requests) == 2


async def test_nan_and_missing_rows_are_failures() -> None:
    for spoil in (lambda sampled_T: sampled_T * np.float32(np.nan), lambda sampled_T: sampled_T[1:]):
        engine = FakeEngine()

        def spoilt(request: ScoreRequest, spoil: Callable[..., np.ndarray] = spoil) -> Scores:
            scores = fake_scores(request)
            return replace(scores, sampled_logprobs_T=spoil(scores.sampled_logprobs_T))

        engine.answer(spoilt)
        assert "the watchdog's probe fails: EngineError" in str(await death_of(engine))


async def test_probes_that_the_engine_cancels_are_failures() -> None:
    engine = FakeEngine()
    engine.fail(lambda _: asyncio.CancelledError())  # type: ignore[arg-type, return-value]
    assert "fails: CancelledError('cancelled by the engine'), the second" in str(await death_of(engine))


async def test_cancelling_the_watchdog_cancels_its_probe() -> None:
    engine = FakeEngine()
    engine.hold()
    watching = asyncio.create_task(watchdog(engine).wait_until_dead())
    await until(lambda: engine.num_running == 1)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    await until(lambda: engine.num_cancelled == 1)
    assert engine.num_running == 0


async def test_cancelling_it_between_probes_leaves_nothing_behind() -> None:
    engine = FakeEngine()
    watching = asyncio.create_task(watchdog(engine).wait_until_dead())
    await asyncio.sleep(0)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert len(asyncio.all_tasks()) == 1
