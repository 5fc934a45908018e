"""The operations, bytes and least times that `bench/floors.py` counts, against products written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from floors import (
    MachineRates,
    MatrixRate,
    ModelShape,
    attention_flops,
    causal_pairs,
    decoding_step_bytes,
    decoding_step_floor_s,
    decoding_step_flops,
    forward_floor_s,
    forward_flops,
    head_flops,
    interpolated,
    layer_flops,
    measure_rates,
    rollouts_floor_s,
    update_floor_s,
    update_flops,
)

SHAPE = ModelShape(
    num_layers=3, hidden_size=16, intermediate_size=40, num_heads=4, num_key_value_heads=2, head_size=8, vocab_size=100
)
RATES = MachineRates(
    layers={"bfloat16": (MatrixRate(1, 1.0), MatrixRate(100, 3.0)), "float32": (MatrixRate(1, 0.5),)},
    head={"bfloat16": (MatrixRate(1, 2.0),), "float32": (MatrixRate(1, 0.5),)},
    bandwidth_gb_s=1.0,
)


def small_config() -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=3,
        hidden_size=16,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
    )


def test_a_shape_is_read_off_a_configuration_and_its_head_size_worked_out_where_it_is_missing() -> None:
    config = small_config()
    assert ModelShape.of(config) == SHAPE
    without = SimpleNamespace(**{name: value for name, value in config.to_dict().items() if name != "head_dim"})
    assert ModelShape.of(without).head_size == 4


def test_weights_are_those_of_the_real_modules() -> None:
    config = small_config()
    model = LlamaForCausalLM(config)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.ndim == 2)
    assert SHAPE.layer_weights == layers
    assert SHAPE.head_weights == model.lm_head.weight.numel()
    ids = torch.zeros(2, 7, dtype=torch.long)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert SHAPE.cache_numbers_per_token * 14 == sum(
        layer.keys.numel() + layer.values.numel() for layer in cache.layers
    )


def test_products_of_a_forward_are_those_that_torch_counts() -> None:
    """Of an eager forward, whose attention takes all pairs; the causal half is a formula of its own."""
    config = small_config()
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 7, dtype=torch.long), use_cache=False)
    ours = layer_flops(SHAPE, 14) + attention_flops(SHAPE, 2 * 7 * 7) + head_flops(SHAPE, 14)
    assert counter.get_total_flops() == ours


def test_a_token_sees_itself_and_all_before_it() -> None:
    assert causal_pairs(1) == 1
    assert causal_pairs(4) == 1 + 2 + 3 + 4
    assert causal_pairs(2, cached=10) == 11 + 12


def test_a_forward_counts_each_sequence_alone_and_the_head_at_scored_rows() -> None:
    expected = layer_flops(SHAPE, 8) + attention_flops(SHAPE, causal_pairs(3) + causal_pairs(5)) + head_flops(SHAPE, 2)
    assert forward_flops(SHAPE, [3, 5], scored_tokens=2) == expected
    assert update_flops(SHAPE, [3, 5], scored_tokens=2) == 3 * expected


def test_decoding_a_completion_token_by_token_costs_the_operations_of_one_forward() -> None:
    steps = sum(decoding_step_flops(SHAPE, [cached]) for cached in range(6))
    assert steps == forward_flops(SHAPE, [6], scored_tokens=6)


def test_a_step_reads_every_weight_once_and_each_rows_cache() -> None:
    weights = SHAPE.layer_weights + SHAPE.head_weights
    assert decoding_step_bytes(SHAPE, [], "float32") == 4 * weights
    assert decoding_step_bytes(SHAPE, [5, 7], "bfloat16") == 2 * (weights + 12 * SHAPE.cache_numbers_per_token)


@pytest.mark.parametrize(("rows", "gflops"), [(1, 1.0), (10, 2.0), (100, 3.0), (5000, 3.0)])
def test_a_rate_between_measured_ones_is_linear_in_the_logarithm_of_the_rows(rows: int, gflops: float) -> None:
    assert interpolated(RATES.layers["bfloat16"], rows) == pytest.approx(gflops)
    assert RATES.flops_per_s("bfloat16", rows) == pytest.approx(gflops * 1e9)


def test_a_rate_below_the_fewest_measured_rows_is_theirs() -> None:
    assert interpolated((MatrixRate(8, 1.0), MatrixRate(16, 2.0)), 3) == 1.0


def test_the_floor_of_a_forward_takes_each_product_at_the_rate_of_its_own_rows() -> None:
    below = layer_flops(SHAPE, 100) + attention_flops(SHAPE, 10 * causal_pairs(10))
    expected = below / 3e9 + head_flops(SHAPE, 20) / 2e9
    assert forward_floor_s(RATES, SHAPE, [10] * 10, scored_tokens=20, dtype="bfloat16") == pytest.approx(expected)
    update = update_floor_s(RATES, SHAPE, [10] * 10, scored_tokens=20, dtype="bfloat16")
    assert update == pytest.approx(3 * expected)


def test_a_step_takes_the_time_of_its_bytes_or_of_its_operations() -> None:
    few = decoding_step_floor_s(RATES, SHAPE, [4], "bfloat16")
    assert few == pytest.approx(decoding_step_bytes(SHAPE, [4], "bfloat16") / 1e9)
    many = decoding_step_floor_s(RATES, SHAPE, [4] * 500, "bfloat16")
    assert many == pytest.approx(decoding_step_flops(SHAPE, [4] * 500) / 3e9)


def test_rollouts_read_distinct_prompts_once_and_pay_for_a_step_while_a_row_grows() -> None:
    prefill = forward_floor_s(RATES, SHAPE, [6], scored_tokens=1, dtype="bfloat16")
    both = decoding_step_floor_s(RATES, SHAPE, [7, 7], "bfloat16")
    alone = decoding_step_floor_s(RATES, SHAPE, [8], "bfloat16")
    # Two rollouts of 2 and 3 tokens: the first token comes from the prompt, the last is never fed.
    assert rollouts_floor_s(RATES, SHAPE, [6], [(6, 2), (6, 3)], "bfloat16") == pytest.approx(prefill + both + alone)


def test_rates_of_this_machine_are_positive_and_by_rising_rows() -> None:
    rates = measure_rates(SHAPE, layer_rows=(4, 1), head_rows=(2,), bandwidth_bytes=2**20, repetitions=1)
    assert [rate.rows for rate in rates.layers["float32"]] == [1, 4]
    assert all(rate.gflops > 0 for curve in (*rates.layers.values(), *rates.head.values()) for rate in curve)
    assert rates.bandwidth_gb_s > 0
