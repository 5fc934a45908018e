"""Contexts that have been read: what their completions continue from, and how long it is kept.

Axes: B rows of a forward, C context tokens, S cached slots, H hidden size, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Cache layers that hold what they have read as [B, heads, S, D] and replace it when they grow, so that rows can be
# taken out and put together anew. Recurrent states and quantised caches are not here.
EXPANDABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)

KeysAndValues = tuple[torch.Tensor, torch.Tensor]  # [heads, slots, D] each


@dataclass(frozen=True, slots=True, eq=False)
class ReadContext:
    """One context's states.

    layers: the last slots of each layer: all C, or what its sliding window can still see; None: a layer without
        states of its own.
    last_hidden_H: predicts a completion's first token.
    """

    length: int
    last_hidden_H: torch.Tensor
    layers: tuple[KeysAndValues | None, ...]


ReadContexts = Mapping[bytes, ReadContext]  # by `forward.context_key`


class ContextCache:
    """The contexts read last, for completions that arrive later than the first of their group.

    max_tokens: of all of them together; 0: none is kept. The oldest goes first. Nothing in it is ever out of date:
    weights do not change, and a key tells contexts and salts apart exactly.

    Their memory is allocated once and written round and round: contexts of all lengths that come and go would leave
    the heap full of holes.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._pools: list[KeysAndValues | None] = []  # [heads, max_tokens, D] of each layer
        self._contexts: dict[bytes, ReadContext] = {}
        self._first_slot: dict[bytes, int] = {}
        self._next_slot = 0

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def num_tokens(self) -> int:
        return sum(context.length for context in self._contexts.values())

    @property
    def keys(self) -> frozenset[bytes]:
        return frozenset(self._contexts)

    def of(self, keys: Iterable[bytes]) -> dict[bytes, ReadContext]:
        """Those of `keys` that are here, as views that are good until the next `keep`."""
        return {key: self._contexts[key] for key in keys if key in self._contexts}

    def keep(self, contexts: ReadContexts) -> None:
        """Copies new ones in, over the oldest. What is too long, or not finite, is not kept."""
        for key, context in contexts.items():
            if key in self._contexts or context.length > self.max_tokens:
                continue
            if not context.last_hidden_H.isfinite().all():
                continue
            slot = self._room_for(context.length)
            self._contexts[key] = self._written(context, slot)
            self._first_slot[key] = slot

    def clear(self) -> None:
        self._pools.clear()
        self._contexts.clear()
        self._first_slot.clear()
        self._next_slot = 0

    def _room_for(self, length: int) -> int:
        """The first of so many slots, whose contexts have gone."""
        first = self._next_slot if self._next_slot + length <= self.max_tokens else 0
        end = self._next_slot = first + length
        for key, slot in list(self._first_slot.items()):
            if slot < end and first < slot + self._contexts[key].length:
                del self._contexts[key], self._first_slot[key]
        return first

    def _written(self, context: ReadContext, slot: int) -> ReadContext:
        if not self._pools:
            self._pools = [layer and self._pool(layer) for layer in context.layers]
        layers: list[KeysAndValues | None] = []
        for pool, layer in zip(self._pools, context.layers, strict=True):
            if pool is None or layer is None:
                layers.append(None)
                continue
            (pool_keys, pool_values), (keys, values) = pool, layer
            slots = slice(slot, slot + keys.shape[-2])
            kept = pool_keys[:, slots], pool_values[:, slots]
            kept[0].copy_(keys)
            kept[1].copy_(values)
            layers.append(kept)
        return ReadContext(context.length, context.last_hidden_H.clone(), tuple(layers))

    def _pool(self, layer: KeysAndValues) -> KeysAndValues:
        keys, values = layer
        return (
            keys.new_empty(keys.shape[0], self.max_tokens, keys.shape[-1]),
            values.new_empty(values.shape[0], self.max_tokens, values.shape[-1]),
        )


def contexts_in_batch(cache: DynamicCache, last_hidden_BH: torch.Tensor, lengths: Sequence[int]) -> list[ReadContext]:
    """Every row of a forward of left-padded contexts, as views."""
    contexts = []
    for row, length in enumerate(lengths):
        layers: list[KeysAndValues | None] = []
        for layer in cache.layers:
            if layer.keys is None or layer.values is None or not layer.keys.numel():
                layers.append(None)
                continue
            first = layer.keys.shape[-2] - min(length, layer.keys.shape[-2])
            layers.append((layer.keys[row, :, first:], layer.values[row, :, first:]))
        contexts.append(ReadContext(length, last_hidden_BH[row], tuple(layers)))
    return contexts


def joined_cache(empty: DynamicCache, contexts: Sequence[ReadContext], padded_length: int) -> DynamicCache:
    """Fills an empty cache of the same model with one row a context, left-padded with zeros to `padded_length` slots.

    Args: contexts: [B]; the same one may come in several rows.
    """
    rows_of: dict[int, list[int]] = {}
    for row, context in enumerate(contexts):
        rows_of.setdefault(id(context), []).append(row)
    for index, layer in enumerate(empty.layers):
        first = contexts[0].layers[index]
        if first is None:
            continue
        assert isinstance(layer, DynamicLayer)
        width = padded_length
        if isinstance(layer, DynamicSlidingWindowLayer):
            width = min(width, layer.sliding_window - 1)
            layer.cumulative_length = padded_length
        layer.lazy_initialization(*first)
        layer.keys, layer.values = (
            _joined([c.layers[index] for c in contexts], part, width, rows_of) for part in (0, 1)
        )
    return empty


def _joined(
    layers: Sequence[KeysAndValues | None], part: int, width: int, rows_of: Mapping[int, Sequence[int]]
) -> torch.Tensor:
    """[B, heads, width, D], one write for each distinct context."""
    tensors = [layer[part] for layer in layers if layer is not None]
    assert len(tensors) == len(layers), "the contexts are of one model"
    heads, _, head_dim = tensors[0].shape
    joined = tensors[0].new_empty(len(tensors), heads, width, head_dim)
    for rows in rows_of.values():
        tensor = tensors[rows[0]]
        first = width - tensor.shape[-2]
        joined[rows, :, :first] = 0
        joined[rows, :, first:] = tensor
    return joined


class KeepingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer of a forward of whole sequences that holds on to some contexts' states, and to nothing else.

    Args:
        layer: the empty layer of the model's own cache that this one stands in for.
        length_of_row: context tokens of the rows whose contexts are kept.
    """

    def __init__(self, layer: DynamicLayer, length_of_row: Mapping[int, int]) -> None:
        super().__init__()
        self._layer = layer
        self._length_of_row = length_of_row
        self.is_sliding = layer.is_sliding
        self.kept: dict[int, KeysAndValues] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_arguments: object, **_named: object
    ) -> KeysAndValues:
        if not self._length_of_row:
            return key_states, value_states
        # One copy for all rows: a copy for each would leave holes in the heap.
        rows, longest = list(self._length_of_row), max(self._length_of_row.values())
        keys_RS, values_RS = (states[rows, :, :longest] for states in (key_states, value_states))
        for place, (row, length) in enumerate(self._length_of_row.items()):
            first = 0
            if isinstance(self._layer, DynamicSlidingWindowLayer):
                first = max(0, length - self._layer.sliding_window + 1)
            self.kept[row] = keys_RS[place, :, first:length], values_RS[place, :, first:length]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self._layer.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        return 0
