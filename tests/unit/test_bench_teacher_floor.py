"""The floor of shared contexts, against the operations counted one sequence at a time."""

from __future__ import annotations

import pytest

from floors import MachineRates, MatrixRate, ModelShape, forward_flops, head_flops
from teacher_floor import alone_floor_s, shared_floor_s

SHAPE = ModelShape(
    num_layers=2, hidden_size=32, intermediate_size=64, num_heads=4, num_key_value_heads=2, head_size=8, vocab_size=500
)
ONE_GFLOP_A_SECOND = (MatrixRate(1, 1.0),)
RATES = MachineRates({"bfloat16": ONE_GFLOP_A_SECOND}, {"bfloat16": ONE_GFLOP_A_SECOND}, 1.0)


def test_at_one_rate_a_floor_is_its_operations() -> None:
    found = alone_floor_s(RATES, SHAPE, num_rollouts=3, context=10, completion=5)
    assert found == pytest.approx(forward_flops(SHAPE, [14] * 3, scored_tokens=15) / 1e9)


def test_a_group_of_one_costs_what_it_costs_alone_and_each_further_member_its_completion() -> None:
    sizes = {"context": 10, "completion": 5}
    alone = alone_floor_s(RATES, SHAPE, num_rollouts=1, **sizes)
    assert shared_floor_s(RATES, SHAPE, num_contexts=1, group_size=1, **sizes) == pytest.approx(alone)
    context_s = forward_flops(SHAPE, [10], scored_tokens=0) / 1e9
    group = shared_floor_s(RATES, SHAPE, num_contexts=2, group_size=4, **sizes)
    assert group == pytest.approx(8 * alone - 6 * context_s)
    assert group > 8 * head_flops(SHAPE, 5) / 1e9
