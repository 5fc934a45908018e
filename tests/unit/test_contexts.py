"""What is kept of contexts that were read, for how long, and how it is put together again."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from vopd_server.engines.contexts import ContextCache, ReadContext, contexts_in_batch, joined_cache

HEADS, HEAD_DIM, WINDOW = 2, 4, 6


def context(length: int, value: float = 0.0) -> ReadContext:
    states = torch.full((HEADS, length, HEAD_DIM), value)
    return ReadContext(length, torch.full((3,), value), ((states, -states),))


def test_the_oldest_goes_first_and_what_stays_is_untouched() -> None:
    cache = ContextCache(100)
    for value in range(1, 30):  # lengths that leave a rest at the end of the room
        cache.keep({bytes([value]): context(23 + value % 3, float(value))})
        assert bytes([value]) in cache.keys
        assert cache.num_tokens <= 100
        assert len(cache) >= min(value, 3)
        for key, kept in cache.of(cache.keys).items():
            [(keys, values)] = [layer for layer in kept.layers if layer is not None]
            assert keys.shape == (HEADS, 23 + key[0] % 3, HEAD_DIM)
            assert (keys == key[0]).all()
            assert (values == -key[0]).all()
            assert (kept.last_hidden_H == key[0]).all()
        assert sorted(cache.keys) == [bytes([key]) for key in range(value - len(cache) + 1, value + 1)]


def test_what_is_longer_than_the_whole_room_pushes_nothing_out() -> None:
    cache = ContextCache(100)
    cache.keep({b"a": context(60), b"long": context(101)})
    assert (cache.keys, cache.num_tokens) == ({b"a"}, 60)


def test_the_one_that_is_there_stays_when_it_comes_again() -> None:
    cache = ContextCache(100)
    cache.keep({b"a": context(60)})
    first = cache.of([b"a"])[b"a"]
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


def test_all_that_is_kept_lies_in_memory_that_was_allocated_once() -> None:
    cache = ContextCache(100)
    cache.keep({b"a": context(60)})
    addresses = {cache.of([b"a"])[b"a"].layers[0][0].untyped_storage().data_ptr()}  # type: ignore[index]
    for number in range(20):
        cache.keep({bytes([number]): context(30 + number)})
        addresses |= {kept.layers[0][0].untyped_storage().data_ptr() for kept in cache.of(cache.keys).values()}  # type: ignore[index]
    assert len(addresses) == 1
    cache.clear()
    assert (len(cache), cache.num_tokens, cache.keys) == (0, 0, frozenset())
