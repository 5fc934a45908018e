"""Planning is pure: any queue is drained exactly once, within the budget, oldest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_server.engines.batching import PADDING_SLACK_TOKENS, PassPlan, Shape, plan_next_pass


def shape(context: str, context_length: int, completion_length: int) -> Shape:
    return Shape(context.encode(), context_length, completion_length)


@st.composite
def queues(draw: st.DrawFn) -> list[Shape]:
    """Queues in which some contexts repeat; a context has one length, as a real one has."""
    context_lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=8))
    entries = draw(
        st.lists(st.tuples(st.integers(0, len(context_lengths) - 1), st.integers(1, 300)), min_size=1, max_size=40)
    )
    return [shape(str(context), context_lengths[context], length) for context, length in entries]


KEPT = st.sets(st.integers(0, 7)).map(lambda indices: {str(index).encode() for index in indices})
BUDGETS = st.sampled_from([1, 64, 500, 2000, 100_000])


def forwards_of(plan: PassPlan, queue: list[Shape]) -> list[tuple[int, int]]:
    """(rows, padded width with the cached contexts) of every forward of a pass, found the long way."""
    members = [queue[index] for index in plan.members]
    if not plan.shares_contexts:
        return [(len(members), max(member.context_length + member.completion_length - 1 for member in members))]
    context_width = max(member.context_length for member in members)
    forwards = [(len({member.context_key for member in members}), context_width)]
    for wave in plan.waves:
        completion_width = max(queue[index].completion_length - 1 for index in wave)
        forwards.append((len(wave), context_width + completion_width))
    return forwards


@given(queues(), BUDGETS, KEPT, st.booleans(), st.booleans())
def test_every_request_runs_exactly_once_and_each_pass_holds_the_oldest(
    queue: list[Shape], max_tokens: int, kept: set[bytes], can_share: bool, one_by_one: bool
) -> None:
    waiting = list(range(len(queue)))
    ran: list[int] = []
    while waiting:
        plan = plan_next_pass(
            [queue[index] for index in waiting],
            max_tokens=max_tokens,
            can_share=can_share,
            kept=kept,
            one_by_one=one_by_one,
        )
        assert 0 in plan.members  # so nothing waits for more passes than there were requests before it
        assert all(plan.waves)
        ran += [waiting[index] for index in plan.members]
        waiting = [index for place, index in enumerate(waiting) if place not in plan.members]
    assert sorted(ran) == list(range(len(queue)))


@given(queues(), BUDGETS, KEPT, st.booleans())
def test_a_forward_keeps_the_token_budget_unless_one_row_alone_exceeds_it(
    queue: list[Shape], max_tokens: int, kept: set[bytes], can_share: bool
) -> None:
    plan = plan_next_pass(queue, max_tokens=max_tokens, can_share=can_share, kept=kept)
    for num_rows, width in forwards_of(plan, queue):
        assert num_rows * width <= max_tokens or num_rows == 1


@given(queues(), BUDGETS)
def test_requests_with_equal_contexts_land_in_one_pass_that_shares_them(queue: list[Shape], max_tokens: int) -> None:
    plan = plan_next_pass(queue, max_tokens=max_tokens)
    contexts = {queue[index].context_key for index in plan.members}
    company = [index for index, entry in enumerate(queue) if entry.context_key in contexts]
    assert sorted(plan.members) == company
    assert plan.shares_contexts == (len(company) > len(contexts))


@given(queues(), BUDGETS, KEPT)
def test_a_completion_goes_on_from_a_kept_context_even_alone(
    queue: list[Shape], max_tokens: int, kept: set[bytes]
) -> None:
    plan = plan_next_pass(queue, max_tokens=max_tokens, kept=kept)
    if queue[0].context_key in kept:
        assert plan.shares_contexts
    if not plan.shares_contexts:
        assert not kept & {queue[index].context_key for index in plan.members}


@given(queues(), BUDGETS)
def test_no_row_of_a_plain_forward_is_more_than_half_padding_beyond_the_slack(
    queue: list[Shape], max_tokens: int
) -> None:
    plan = plan_next_pass(queue, max_tokens=max_tokens, can_share=False)
    lengths = [queue[index].tokens_fed for index in plan.members]
    assert max(lengths) - min(lengths) <= max(min(lengths), PADDING_SLACK_TOKENS)


@given(queues(), BUDGETS, st.booleans())
def test_one_by_one_forwards_have_one_row_each(queue: list[Shape], max_tokens: int, can_share: bool) -> None:
    plan = plan_next_pass(queue, max_tokens=max_tokens, can_share=can_share, one_by_one=True)
    assert {len(wave) for wave in plan.waves} == {1}
    assert len({queue[index].context_key for index in plan.members}) == 1
    assert plan.shares_contexts == can_share


def test_the_oldest_is_joined_by_those_nearest_to_it_in_length() -> None:
    queue = [shape(str(index), length, 1) for index, length in enumerate([300, 900, 308, 10, 290])]
    assert plan_next_pass(queue, max_tokens=10_000).waves == ((0, 2, 4),)
    assert plan_next_pass(queue, max_tokens=650).waves == ((0, 2),)


def test_a_group_larger_than_the_budget_keeps_its_context_and_runs_in_waves() -> None:
    queue = [shape("a", 100, 51)] * 5
    plan = plan_next_pass(queue, max_tokens=300)
    assert plan.shares_contexts
    assert plan.waves == ((0, 1), (2, 3), (4,))


def test_groups_of_like_length_share_a_pass_and_a_single_waits_for_its_own() -> None:
    queue = [shape("a", 100, 11), shape("b", 90, 11), shape("a", 100, 11), shape("b", 90, 11), shape("c", 95, 11)]
    assert plan_next_pass(queue, max_tokens=10_000) == PassPlan(True, ((0, 1, 2, 3),))


def test_completions_of_unlike_length_take_waves_of_their_own() -> None:
    queue = [shape("a", 100, 1000), shape("a", 100, 11), shape("a", 100, 900)]
    assert plan_next_pass(queue, max_tokens=100_000).waves == ((0, 2), (1,))


def test_an_empty_queue_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        plan_next_pass([], max_tokens=10)
