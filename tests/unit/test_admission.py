"""The shell that waits on the scheduler: who is called in, who hears when to come back, and what is counted."""

from __future__ import annotations

import asyncio

import pytest

from vopd_server.admission import MAX_RETRY_DELAY_S, MIN_RETRY_DELAY_S, Admission, retry_delay_s
from vopd_server.errors import OverloadedError
from vopd_server.scheduler import Demand, FairScheduler, Ticket, Work
from vopd_server.tenancy import Tenant, TenantLimits
from vopd_server.usage import RecentRate

A = Tenant("a")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def admission_of(
    *tenants: Tenant, queue_tokens: int = 100, window_tokens: int = 100, clock: Clock | None = None
) -> Admission:
    scheduler = FairScheduler(window_tokens=window_tokens, queue_tokens=queue_tokens, queue_bytes=10**9)
    admission = Admission(scheduler, clock=clock) if clock else Admission(scheduler)
    admission.set_tenants(tenants or [A])
    return admission


def work(tokens: int) -> Work:
    return Work(repr(object()).encode(), 0, tokens)


def admit(admission: Admission, tokens: int, tenant: Tenant = A) -> Ticket:
    [ticket] = admission.admit_now(tenant, [Demand(tokens, 0)])
    return ticket


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = RecentRate(window_s=10)
    assert rate.per_s(0.0) == 0
    rate.record(1000, 0.0)
    rate.record(1000, 4.0)
    assert rate.per_s(4.0) == 500
    assert rate.per_s(12.0) == 1000 / 8
    assert (rate.per_s(20.0), rate.total(20.0)) == (0, 0)


@pytest.mark.parametrize(
    ("missing", "rate", "expected"),
    [(100, 50.0, 2.0), (100, 0.0, 1.0), (1, 1e9, MIN_RETRY_DELAY_S), (10**9, 1.0, MAX_RETRY_DELAY_S)],
)
def test_the_retry_delay_is_the_time_the_missing_tokens_take_within_bounds(
    missing: int, rate: float, expected: float
) -> None:
    assert retry_delay_s(missing, rate) == expected


async def test_a_call_that_cannot_wait_hears_when_to_come_back_by_its_own_tenants_pace() -> None:
    clock = Clock()
    admission = admission_of(A, Tenant("b"), clock=clock)
    admission.leave(admit(admission, 80), answered=True)
    admission.leave(admit(admission, 100, Tenant("b")), answered=True)
    clock.now_s = 4.0
    admit(admission, 80)
    with pytest.raises(
        OverloadedError, match=r"60 tokens .* beside 80 tokens .* tenant a has queued .*queue_tokens 100"
    ) as refused:
        admit(admission, 60)
    assert refused.value.retry_delay_s == 40 / (80 / 4.0)  # 40 tokens too many at 20 a second


async def test_held_sequences_come_in_in_their_order() -> None:
    admission = admission_of(queue_tokens=10)
    first = admit(admission, 10)
    came_in: list[int] = []

    async def wait(tokens: int) -> Ticket:
        ticket = await admission.admit(A, Demand(tokens, 0))
        came_in.append(tokens)
        return ticket

    tasks = [asyncio.create_task(wait(tokens)) for tokens in (7, 4, 3)]
    await asyncio.sleep(0)
    assert came_in == []
    admission.leave(first, answered=False)
    seven = await tasks[0]
    assert came_in == [7], "4 does not fit beside 7, and 3 does not overtake it"
    admission.leave(seven, answered=True)
    for task in tasks[1:]:
        admission.leave(await task, answered=True)
    assert came_in == [7, 4, 3]
    assert admission.scheduler.queues["a"].reserved_tokens == 0


@pytest.mark.parametrize("let_in_first", [False, True], ids=["while it waits", "just as it is let in"])
async def test_a_wait_that_is_cancelled_gives_its_place_back(let_in_first: bool) -> None:
    admission = admission_of(queue_tokens=10)
    first = admit(admission, 10)
    waiting = asyncio.create_task(admission.admit(A, Demand(8, 0)))
    behind = asyncio.create_task(admission.admit(A, Demand(2, 0)))
    await asyncio.sleep(0)
    if let_in_first:
        admission.leave(first, answered=False)
        waiting.cancel()
    else:
        waiting.cancel()
        await asyncio.sleep(0)
        admission.leave(first, answered=False)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    admission.leave(await behind, answered=False)
    queue = admission.scheduler.queues["a"]
    assert (queue.reserved_tokens, len(queue.held)) == (0, 0)


async def test_what_is_queued_together_enters_the_engine_together_and_the_rest_when_there_is_room() -> None:
    admission = admission_of(window_tokens=25)
    entered: list[Ticket] = []

    async def run(ticket: Ticket) -> None:
        await admission.enter_engine(ticket, work(10))
        with admission.running(ticket):
            entered.append(ticket)
            await going.wait()

    going = asyncio.Event()
    tickets = [admit(admission, 10) for _ in range(3)]
    tasks = [asyncio.create_task(run(ticket)) for ticket in tickets]
    for _ in range(5):
        await asyncio.sleep(0)
    assert entered == tickets[:2]
    going.set()
    await asyncio.gather(*tasks)
    assert entered == tickets
    assert admission.scheduler.window_used == 0


async def test_a_turn_that_is_cancelled_while_it_is_waited_for_goes_to_the_next() -> None:
    admission = admission_of(window_tokens=10)
    running, cancelled, behind = (admit(admission, 10) for _ in range(3))
    await admission.enter_engine(running, work(10))
    waiting = asyncio.create_task(admission.enter_engine(cancelled, work(10)))
    next_one = asyncio.create_task(admission.enter_engine(behind, work(10)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    admission.leave(cancelled, answered=False)
    admission.leave(running, answered=True)
    await asyncio.wait_for(next_one, 5)
    assert behind.stage == "running"


async def test_a_rate_lets_its_tenant_go_on_by_itself_when_the_time_has_come() -> None:
    tenant = Tenant("a", TenantLimits(tokens_per_minute=600))  # ten a second
    admission = admission_of(tenant, queue_tokens=10**4, window_tokens=10**4)
    admission.set_tenants([tenant])
    first, second = admit(admission, 602), admit(admission, 1)
    await admission.enter_engine(first, work(602))
    waited_s = await asyncio.wait_for(admission.enter_engine(second, work(1)), 5)
    assert 0.1 < waited_s < 2, "two tokens are owed, which are a fifth of a second"
