"""The service without a transport: all or nothing, the budget given back, life and drain."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fake_engine import FakeEngine, fake_logprobs_TV, until
from open_service import open_service, reserved_tokens, take
from vopd_server.concurrency import deadline, task_group
from vopd_server.errors import (
    ConfigError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnsupportedError,
)
from vopd_server.service import TeacherService
from vopd_server.tenancy import OPEN_TENANT, Tenant, TenantLimits
from vopd_server.types import HiddenStates, NoSupport, ScoreRequest, Scores
from vopd_server.validation import Limits, SequenceShape

LIMITS = Limits(
    max_context_length=64, max_sequences_per_request=8, max_tokens_per_request=64, max_top_k=8, max_message_bytes=2**20
)


async def started_service(engine: FakeEngine, queue_tokens: int = 100) -> TeacherService:
    service = open_service(engine, LIMITS, queue_tokens=queue_tokens)
    await service.start()
    return service


def requests(*completions: Sequence[int]) -> list[ScoreRequest]:
    return [
        ScoreRequest("r", np.asarray([1, 2]), np.asarray(completion, np.int64), NoSupport())
        for completion in completions
    ]


def shapes(asked: Sequence[ScoreRequest]) -> list[SequenceShape]:
    return [
        SequenceShape(f"sequences[{index}]", len(request.context_ids), len(request.completion_ids))
        for index, request in enumerate(asked)
    ]


async def score(service: TeacherService, asked: list[ScoreRequest], temperature: float = 1.0) -> list[Scores]:
    async with service.scored_batch(OPEN_TENANT, shapes(asked), lambda: asked, temperature=temperature) as scored:
        return [scores for _, scores in scored]


async def test_sequences_of_a_batch_are_in_the_engine_together_and_answered_in_order() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.hold()
    asked = requests([5, 6], [], [7])
    scoring = asyncio.create_task(score(service, asked))
    await until(lambda: engine.num_running == 2)
    assert reserved_tokens(service) == 9
    engine.let_go()
    for request, scores in zip(asked, await scoring, strict=True):
        expected_TV = fake_logprobs_TV(request.context_ids, request.completion_ids)
        rows = np.arange(len(request.completion_ids))
        assert np.array_equal(scores.sampled_logprobs_T, expected_TV[rows, request.completion_ids])
    assert reserved_tokens(service) == 0


async def test_the_first_failure_cancels_the_rest_and_is_raised_as_it_is() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.hold()
    engine.fail(lambda request: EngineError("broken") if request.completion_ids[0] == 9 else None)
    with pytest.raises(EngineError, match="broken"):
        await score(service, requests([5], [9], [6]))
    assert engine.num_running == 0
    assert reserved_tokens(service) == 0


async def test_a_wrong_sequence_keeps_the_whole_batch_from_the_engine() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    with pytest.raises(InvalidRequestError, match=r"sequences\[1\].completion_ids: id 300"):
        await score(service, requests([5], [300]))
    assert engine.requests == []
    assert reserved_tokens(service) == 0


async def test_nothing_is_unpacked_before_it_is_admitted() -> None:
    service = await started_service(FakeEngine())
    take(service, 99)

    def unpack() -> list[ScoreRequest]:
        raise AssertionError("unpacked")

    with pytest.raises(OverloadedError) as refused:
        async with service.scored_batch(OPEN_TENANT, [SequenceShape("s", 1, 1)], unpack, temperature=1.0):
            raise AssertionError("scored")
    assert refused.value.retry_delay_s
    assert reserved_tokens(service) == 99


async def test_what_the_engine_did_not_mean_to_raise_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.fail(lambda _: ZeroDivisionError("secret detail"))
    with pytest.raises(EngineError) as failed:
        await score(service, requests([5]))
    assert "secret" not in str(failed.value)
    assert "secret detail" in caplog.text


async def test_an_incomplete_answer_of_the_engine_is_an_error() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.answer(lambda _: Scores(np.zeros(1, np.float32)))
    with pytest.raises(EngineError, match=r"\(1,\) scores for 2 tokens"):
        await score(service, requests([5, 6]))


async def test_hidden_states_of_another_size_than_the_models_are_an_error() -> None:
    engine = FakeEngine(gives_head=True)
    service = await started_service(engine)
    asked = dataclasses.replace(requests([5, 6])[0], support=HiddenStates())
    shape = SequenceShape("s", 2, 2, kind="hidden_states")
    async with service.scored_batch(OPEN_TENANT, [shape], lambda: [asked], temperature=1.0) as scored:
        (answered,) = scored
    assert answered[1].hidden_states_TH is not None
    too_narrow = dataclasses.replace(answered[1], hidden_states_TH=answered[1].hidden_states_TH[:, 1:])
    engine.answer(lambda _: too_narrow)
    with pytest.raises(EngineError, match=r"hidden states of shape \(2, 7\); \(2, 8\) was asked for"):
        async with service.scored_batch(OPEN_TENANT, [shape], lambda: [asked], temperature=1.0):
            raise AssertionError("scored")
    await service.close()


async def test_the_head_is_the_engines_or_refused_by_naming_what_there_is() -> None:
    engine = FakeEngine(gives_head=True)
    service = await started_service(engine)
    assert service.head_file is engine.info.head is not None
    await service.close()
    without = FakeEngine()
    service = await started_service(without)
    words = "does not give away the model's output head, since it has no hidden_states support; it has candidates, "
    with pytest.raises(UnsupportedError, match=f"engine fake {words}sampled, teacher_top_k$"):
        _ = service.head_file
    without.info = dataclasses.replace(without.info, engine="transformers")
    with pytest.raises(UnsupportedError, match=r"teacher_top_k; whoever starts it can allow .* --allow-full-vocab$"):
        _ = service.head_file


async def test_calls_are_refused_while_starting_and_while_draining() -> None:
    engine = FakeEngine()
    service = open_service(engine, LIMITS, queue_tokens=100)
    with pytest.raises(UnavailableError, match="loading") as starting, service.call(OPEN_TENANT):
        pass
    await service.start()
    with service.call(OPEN_TENANT):
        service.drain()
        with pytest.raises(UnavailableError, match="shutting down") as draining, service.call(OPEN_TENANT):
            pass
    assert starting.value.retry_delay_s
    assert draining.value.retry_delay_s


async def test_draining_waits_for_the_last_call() -> None:
    service = await started_service(FakeEngine())
    with service.call(OPEN_TENANT):
        with service.call(OPEN_TENANT):
            service.drain()
            idle = asyncio.create_task(service.wait_until_idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await idle


async def test_the_limit_of_a_sequence_is_the_models_where_that_is_shorter() -> None:
    service = await started_service(FakeEngine(max_context_length=10))
    assert service.limits.max_context_length == 10
    longer = await started_service(FakeEngine(max_context_length=10_000))
    assert longer.limits.max_context_length == LIMITS.max_context_length


async def test_a_deadline_cancels_what_runs_and_says_so() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(DeadlineError, match=r"deadline passed after 0.01 s"):
        async with deadline(0.01):
            await work()
    assert cancelled.is_set()


async def test_a_time_out_of_the_work_itself_is_not_taken_for_the_deadline() -> None:
    with pytest.raises(TimeoutError) as failed:
        async with deadline(None):
            raise TimeoutError("the work's own")
    assert not isinstance(failed.value, DeadlineError)


async def test_a_task_group_raises_what_failed_first() -> None:
    async def fail() -> Any:
        raise KeyError("first")

    async def run_both() -> None:
        async with task_group() as group:
            group.create_task(asyncio.Event().wait())
            group.create_task(fail())

    with pytest.raises(KeyError, match="first"):
        await run_both()


# ---------------------------------------------------------------- tenants


async def test_a_tenants_own_limits_are_part_of_what_it_may_ask_for() -> None:
    service = await started_service(FakeEngine())
    assert service.limits_for(OPEN_TENANT) == service.limits
    small = Tenant("small", TenantLimits(queue_tokens=20, max_top_k=3))
    limits = service.limits_for(small)
    assert (limits.max_context_length, limits.max_tokens_per_request, limits.max_top_k) == (20, 20, 3)
    large = Tenant("large", TenantLimits(queue_tokens=10**6, max_top_k=10**6))
    assert service.limits_for(large) == service.limits, "a tenant's limits never widen the server's"


async def test_a_sequence_that_needs_more_memory_than_a_tenant_has_is_wrong_rather_than_held_for_ever() -> None:
    service = await started_service(FakeEngine())
    service.admission.scheduler.queues["open"].queue_bytes = 500
    with pytest.raises(InvalidRequestError, match=r"s: about \d+ bytes of memory .* > 500, the share of one tenant"):
        service.check(OPEN_TENANT, [SequenceShape("s", 30, 30)], 1.0)


async def test_too_many_calls_of_a_tenant_are_refused_with_a_delay_and_anothers_are_not() -> None:
    service = await started_service(FakeEngine())
    service._max_calls = 1
    with service.call(OPEN_TENANT):
        too_many = pytest.raises(OverloadedError, match=r"1 calls in flight \(calls_per_tenant\)")
        with too_many as refused, service.call(OPEN_TENANT):
            raise AssertionError("entered")
        with service.call(Tenant("other")):
            pass
    assert refused.value.retry_delay_s
    assert service.is_idle


async def test_the_status_shows_what_is_queued_and_running_and_what_was_scored() -> None:
    engine = FakeEngine()
    service = await started_service(engine)
    engine.hold()
    scoring = asyncio.create_task(score(service, requests([5, 6], [7])))
    await until(lambda: engine.num_running == 2)
    [tenant] = service.status().tenants
    assert (tenant.id, tenant.running_sequences, tenant.running_tokens, tenant.reserved_tokens) == ("open", 2, 7, 7)
    assert (tenant.share, tenant.fair_share) == (1.0, 1.0)
    engine.let_go()
    await scoring
    [tenant] = service.status().tenants
    assert (tenant.running_tokens, tenant.reserved_tokens, tenant.sequences_scored, tenant.tokens_scored) == (
        0,
        0,
        2,
        7,
    )


async def test_a_service_that_is_not_as_it_should_be_never_gets_ready() -> None:
    service = open_service(FakeEngine(), LIMITS)

    async def refuse(_engine: object) -> None:
        raise ConfigError("the probe disagrees")

    with pytest.raises(ConfigError, match="the probe disagrees"):
        await service.start(refuse)
    assert service.state == "starting"


async def test_an_engine_that_dies_while_it_is_probed_is_told_at_once() -> None:
    engine = FakeEngine()
    service = open_service(engine, LIMITS)

    async def never_ends(_engine: object) -> None:
        await asyncio.Event().wait()

    starting = asyncio.create_task(service.start(never_ends))
    await until(lambda: engine._dead is not None)
    engine.die("killed")
    with pytest.raises(EngineDeadError, match="killed"):
        await starting
