"""The key-value cache of rows that grow side by side: allocated ahead of the tokens, written in place.

transformers' own dynamic cache is copied whole at every token, and its static one makes every step attend to columns
that are still empty. This one has room for tokens to come, a token is written into its column, and attention sees the
columns that are there. A row that leaves moves one other row, not all.

Axes: B rows, D distinct prompts, H heads, S columns (tokens so far, left-padded), F features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

# Columns allocated at once: long completions do not take the memory of their limit from the start, and the copy into
# larger arrays is a small part of what attention reads meanwhile.
COLUMNS_AHEAD = 256

# Layers that hold what they have read as [B, H, S, F]; recurrent states and compressed caches are not here.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, slots=True)
class PrefilledGroup:
    """What one forward over distinct prompts left behind.

    cache: the model's own, D rows; emptied while it is taken over.
    source_rows: which of the D rows each of `rows` gets.
    rows: of the batch.
    """

    cache: Any
    source_rows: Tensor
    rows: Tensor


def plain_cache(model: Any) -> DynamicCache | None:
    """An empty cache for a forward over prompts; None where the model's is more than keys and values.

    It may have sliding windows.
    """
    if getattr(model, "_is_stateful", False):
        return None
    cache = DynamicCache(config=model.config)
    return cache if all(type(layer) in _PLAIN_LAYERS for layer in cache.layers) else None


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, allocated columns, F] of one layer, of which the first `length` are there.

    window: how many columns a token sees, itself included; None: all.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, length: int, window: int | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.is_sliding = window is not None
        self._length = length
        self._window = window

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends columns; returns those that the new tokens may see."""
        first, end = self._first_seen, self._length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self.keys, self.values = (self._with_room(states, end) for states in (self.keys, self.values))
        self.keys[:, :, self._length : end] = key_states
        self.values[:, :, self._length : end] = value_states
        self._length = end
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns the next `query_length` tokens see, and the first of them."""
        return self._length + query_length - self._first_seen, self._first_seen

    def close_up(self, slots: Sequence[int]) -> None:
        """Keeps the rows `slots`, in this order. Those that change places come from behind the new end."""
        moves = [(target, source) for target, source in enumerate(slots) if target != source]
        assert all(source >= len(slots) for _, source in moves), "a row would be overwritten before it is read"
        for target, source in moves:
            for states in (self.keys, self.values):
                states[target, :, self._first_seen : self._length] = states[source, :, self._first_seen : self._length]
        self.keys, self.values = self.keys[: len(slots)], self.values[: len(slots)]

    def _with_room(self, states: Tensor, end: int) -> Tensor:
        larger = states.new_empty((*states.shape[:2], end + COLUMNS_AHEAD, states.shape[-1]))
        larger[:, :, : self._length] = states[:, :, : self._length]
        return larger

    @property
    def _first_seen(self) -> int:
        """The first column that a token to come may see."""
        return 0 if self._window is None else max(0, self._length - self._window + 1)


def preallocated_cache(
    groups: Sequence[PrefilledGroup], *, num_rows: int, width: int, max_new_columns: int, dtype: torch.dtype | None
) -> Cache:
    """One cache for all rows, from the caches of forwards over prompts of different padded lengths.

    A prompt ends in column width - 1, whatever it was padded to; columns before its own are 0, and to be masked.

    Args:
        width: columns that are there.
        max_new_columns: that will ever be added.
        dtype: that attention computes in, where it is narrower than what the model hands over (rotary positions
            make float32 of bf16 keys); None: as they come. Casting once is casting at every later step.
    """
    num_columns = width + min(max_new_columns, COLUMNS_AHEAD)
    layers = []
    for index, first in enumerate(groups[0].cache.layers):
        window = first.sliding_window if isinstance(first, DynamicSlidingWindowLayer) else None
        states = []
        for name in ("keys", "values"):
            like = getattr(first, name)
            whole = like.new_zeros((num_rows, like.shape[1], num_columns, like.shape[3]), dtype=dtype or like.dtype)
            for group in groups:
                layer = group.cache.layers[index]
                piece = getattr(layer, name)
                whole[group.rows, :, width - piece.shape[2] : width] = piece[group.source_rows].to(whole.dtype)
                setattr(layer, name, None)  # never two whole caches at once
            states.append(whole)
        layers.append(PreallocatedLayer(states[0], states[1], length=width, window=window))
    return Cache(layers=layers)


def keep_rows(cache: Any, slots: Sequence[int], device: torch.device) -> None:
    """Drops all rows but `slots`, which close up in this order."""
    if all(isinstance(layer, PreallocatedLayer) for layer in cache.layers):
        for layer in cache.layers:
            layer.close_up(slots)
    else:
        # Every kind of cache layer has it, unlike batch_select_indices.
        cache.reorder_cache(torch.tensor(slots, device=device))
