"""The token budget as a state machine, and the shell that waits on it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_server.admission import (
    MAX_RETRY_DELAY_S,
    MIN_RETRY_DELAY_S,
    Admission,
    RecentRate,
    Ticket,
    TokenBudget,
    retry_delay_s,
)
from vopd_server.errors import OverloadedError

CAPACITY = 10
STEPS = st.lists(
    st.tuples(st.sampled_from(["try_enter", "enter_or_wait", "leave"]), st.integers(0, CAPACITY)), max_size=60
)


@given(STEPS)
def test_whatever_happens_the_bound_holds_nobody_overtakes_and_all_is_given_back(steps: list[tuple[str, int]]) -> None:
    budget = TokenBudget(CAPACITY)
    inside: list[Ticket] = []
    waiting: list[Ticket] = []
    for action, number in steps:
        if action == "try_enter":
            fits = not waiting and sum(ticket.tokens for ticket in inside) + number <= CAPACITY
            ticket = budget.try_enter(number)
            assert (ticket is not None) == fits
            inside += [ticket] if ticket else []
        elif action == "enter_or_wait":
            ticket = budget.enter_or_wait(number)
            (inside if budget.is_admitted(ticket) else waiting).append(ticket)
        elif inside or waiting:
            everyone = inside + waiting
            gone = everyone[number % len(everyone)]
            (inside if gone in inside else waiting).remove(gone)
            entered = budget.leave(gone)
            assert entered == waiting[: len(entered)]
            inside += entered
            waiting = waiting[len(entered) :]
        assert budget.reserved_tokens == sum(ticket.tokens for ticket in inside) <= CAPACITY
        assert budget.waiting_tokens == sum(ticket.tokens for ticket in waiting)
        assert not waiting or budget.reserved_tokens + waiting[0].tokens > CAPACITY, "the first could have come in"
    for ticket in inside + waiting:
        budget.leave(ticket)
    assert (budget.reserved_tokens, budget.num_waiting) == (0, 0)


def test_a_ticket_that_leaves_twice_is_an_error() -> None:
    budget = TokenBudget(CAPACITY)
    ticket = budget.enter_or_wait(3)
    budget.leave(ticket)
    with pytest.raises(KeyError, match="left twice"):
        budget.leave(ticket)


def test_more_than_the_capacity_is_an_error_rather_than_a_wait_without_end() -> None:
    budget = TokenBudget(CAPACITY)
    budget.enter_or_wait(CAPACITY)
    with pytest.raises(ValueError, match="11 tokens > capacity 10"):
        budget.enter_or_wait(CAPACITY + 1)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = RecentRate(window_s=10)
    assert rate.tokens_per_s(0.0) == 0
    rate.record(1000, 0.0)
    rate.record(1000, 4.0)
    assert rate.tokens_per_s(4.0) == 500
    assert rate.tokens_per_s(12.0) == 1000 / 8
    assert rate.tokens_per_s(20.0) == 0


@pytest.mark.parametrize(
    ("missing", "rate", "expected"),
    [(100, 50.0, 2.0), (100, 0.0, 1.0), (1, 1e9, MIN_RETRY_DELAY_S), (10**9, 1.0, MAX_RETRY_DELAY_S)],
)
def test_the_retry_delay_is_the_time_the_missing_tokens_take_within_bounds(
    missing: int, rate: float, expected: float
) -> None:
    assert retry_delay_s(missing, rate) == expected


def test_a_call_that_cannot_wait_hears_when_to_come_back() -> None:
    now_s = 0.0
    admission = Admission(TokenBudget(100), clock=lambda: now_s)
    first = admission.enter_now(80)
    admission.leave(first, answered=True)
    now_s = 4.0
    admission.enter_now(80)
    with pytest.raises(OverloadedError, match=r"60 tokens do not fit beside 80 .*queue_tokens 100") as refused:
        admission.enter_now(60)
    assert refused.value.retry_delay_s == 40 / (80 / 4.0)  # 40 tokens too many at 20 a second


async def test_those_who_wait_come_in_in_their_order() -> None:
    admission = Admission(TokenBudget(10))
    first = admission.enter_now(10)
    came_in: list[int] = []

    async def wait(tokens: int) -> Ticket:
        ticket = await admission.enter(tokens)
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
    assert admission.budget.reserved_tokens == 0


@pytest.mark.parametrize("let_in_first", [False, True], ids=["while it waits", "just as it is let in"])
async def test_a_wait_that_is_cancelled_gives_its_place_back(let_in_first: bool) -> None:
    admission = Admission(TokenBudget(10))
    first = admission.enter_now(10)
    waiting = asyncio.create_task(admission.enter(8))
    behind = asyncio.create_task(admission.enter(2))
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
    assert (admission.budget.reserved_tokens, admission.budget.num_waiting) == (0, 0)
