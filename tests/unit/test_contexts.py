"""What is kept of contexts that were read, for how long, and how it is put together again."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from vopd_server.engines.contexts import ContextCache, ReadContext, contexts_in_batch, joined_cache

HEADS, HEAD_DIM, WINDOW = 2, 4, 6


def context(length: int, value: float = 0.0) -> ReadContext:
    return ReadContext(length, torch.full((3,), value), ())


def test_the_least_recently_used_goes_first() -> None:
    cache = ContextCache(100)
    cache.keep({b"a": context(40), b"b": context(40)})
    assert set(cache.of([b"a", b"missing"])) == {b"a"}
    cache.keep({b"c": context(40)})
    assert (cache.keys, cache.num_tokens) == ({b"a", b"c"}, 80)


def test_what_is_longer_than_the_whole_room_pushes_nothing_out() -> None:
    cache = ContextCache(100)
    cache.keep({b"a": context(60), b"long": context(101)})
    assert (cache.keys, cache.num_tokens) == ({b"a"}, 60)


def test_the_one_that_is_there_stays_when_it_comes_again() -> None:
    cache, first = ContextCache(100), context(60)
    cache.keep({b"a": first})
    cache.keep({b"a": context(60)})
    assert cache.of([b"a"])[b"a"] is first
    assert cache.num_tokens == 60


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_not_kept(value: float) -> None:
    cache = ContextCache(100)
    cache.keep({b"a": context(10, value)})
    assert len(cache) == cache.num_tokens == 0


@pytest.mark.parametrize("sliding_window", [None, WINDOW])
def test_rows_of_a_batch_come_back_left_padded_and_in_any_order(sliding_window: int | None) -> None:
    config = MistralConfig(
        num_hidden_layers=2, num_key_value_heads=HEADS, head_dim=HEAD_DIM, sliding_window=sliding_window
    )
    lengths, padded_length = [9, 3], 9
    keys = torch.randn(2, HEADS, padded_length, HEAD_DIM)
    read = DynamicCache(config=config)
    for layer in range(2):
        read.update(keys + layer, -keys - layer, layer)
    contexts = contexts_in_batch(read, torch.randn(2, 5), lengths)

    joined = joined_cache(DynamicCache(config=config), [contexts[1], contexts[0], contexts[1]], padded_length)

    width = WINDOW - 1 if sliding_window else padded_length
    for index, layer in enumerate(joined.layers):
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.get_seq_length() == padded_length
        assert layer.keys.shape == (3, HEADS, width, HEAD_DIM)
        torch.testing.assert_close(layer.keys[1], keys[0, :, -width:] + index, rtol=0, atol=0)
        for row in (0, 2):
            torch.testing.assert_close(layer.keys[row, :, -3:], keys[1, :, -3:] + index, rtol=0, atol=0)
            assert not layer.keys[row, :, :-3].any()
            torch.testing.assert_close(layer.values[row], -layer.keys[row], rtol=0, atol=0)


def test_a_copy_does_not_keep_the_batch_alive() -> None:
    read = DynamicCache()
    read.update(torch.randn(8, HEADS, 9, HEAD_DIM), torch.randn(8, HEADS, 9, HEAD_DIM), 0)
    [first, *_] = contexts_in_batch(read, torch.randn(8, 5), [9] * 8)
    keys_and_values = first.copied().layers[0]
    assert keys_and_values is not None
    for tensor in keys_and_values:
        assert tensor.untyped_storage().nbytes() == HEADS * 9 * HEAD_DIM * 4
