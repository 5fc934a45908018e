"""Plans that weigh padding against one forward more."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_client.like_lengths import padding_fraction, plan_like_lengths

PASS_COST_TOKENS = 100


def cost(lengths: Sequence[int], plan: Sequence[Sequence[int]]) -> int:
    return sum(len(group) * max(lengths[index] for index in group) + PASS_COST_TOKENS for group in plan)


def cheapest_by_trying_all(lengths: Sequence[int], max_tokens: int | None) -> int:
    """Over every partition into groups of any members."""
    best = None
    for labels in itertools.product(range(len(lengths)), repeat=len(lengths)):
        groups = [[index for index, label in enumerate(labels) if label == name] for name in sorted(set(labels))]
        sizes = [len(group) * max(lengths[index] for index in group) for group in groups]
        if max_tokens is None or all(
            size <= max_tokens or len(group) == 1 for size, group in zip(sizes, groups, strict=True)
        ):
            best = min(cost(lengths, groups), best if best is not None else cost(lengths, groups))
    assert best is not None
    return best


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    max_tokens=st.one_of(st.none(), st.integers(1, 1500)),
)
def test_no_grouping_at_all_costs_less(lengths: list[int], max_tokens: int | None) -> None:
    plan = plan_like_lengths(lengths, pass_cost_tokens=PASS_COST_TOKENS, max_tokens=max_tokens)
    assert cost(lengths, plan) == cheapest_by_trying_all(lengths, max_tokens)


@given(lengths=st.lists(st.integers(1, 2000), max_size=60), max_tokens=st.one_of(st.none(), st.integers(1, 5000)))
def test_every_sequence_is_there_once_the_longest_first(lengths: list[int], max_tokens: int | None) -> None:
    plan = plan_like_lengths(lengths, pass_cost_tokens=PASS_COST_TOKENS, max_tokens=max_tokens)
    planned = [index for group in plan for index in group]
    assert sorted(planned) == list(range(len(lengths)))
    assert [lengths[index] for index in planned] == sorted(lengths, reverse=True)


def test_like_lengths_are_one_group_and_unlike_ones_are_not() -> None:
    assert plan_like_lengths([60, 61, 60, 58], pass_cost_tokens=64) == [[1, 0, 2, 3]]
    assert plan_like_lengths([1000, 10, 990, 12], pass_cost_tokens=64) == [[0, 2], [3, 1]]


def test_a_dearer_pass_makes_fewer_of_them() -> None:
    lengths = [400, 390, 300, 290, 200, 190]
    plans = [plan_like_lengths(lengths, pass_cost_tokens=cost_tokens) for cost_tokens in (0, 100, 10_000)]
    assert [len(plan) for plan in plans] == [6, 3, 1]


def test_nothing_needs_no_pass() -> None:
    assert plan_like_lengths([], pass_cost_tokens=64) == []
    assert padding_fraction([], []) == 0.0


def test_the_fraction_of_padding_is_of_what_the_passes_read() -> None:
    assert padding_fraction([10, 5, 1], [[0, 1], [2]]) == pytest.approx(5 / 21)
