"""Contexts that have been read: what their completions continue from, and how long it is kept.

Axes: B rows of a forward, C context tokens, S cached slots, H hidden size, D head dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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

    def copied(self) -> ReadContext:
        """The same in memory of its own: views keep the whole batch that they were read in alive."""
        layers = tuple(layer and (layer[0].clone(), layer[1].clone()) for layer in self.layers)
        return replace(self, last_hidden_H=self.last_hidden_H.clone(), layers=layers)


ReadContexts = Mapping[bytes, ReadContext]  # by `forward.context_key`


class ContextCache:
    """The contexts read last, for completions that arrive later than the first of their group.

    max_tokens: of all of them together; 0: none is kept. The least recently used goes first. Nothing in it is ever
    out of date: weights do not change, and a key tells contexts and salts apart exactly.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._contexts: OrderedDict[bytes, ReadContext] = OrderedDict()

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def keys(self) -> frozenset[bytes]:
        return frozenset(self._contexts)

    def of(self, keys: Iterable[bytes]) -> dict[bytes, ReadContext]:
        """Those of `keys` that are here; they count as used."""
        found = {key: self._contexts[key] for key in keys if key in self._contexts}
        for key in found:
            self._contexts.move_to_end(key)
        return found

    def keep(self, contexts: ReadContexts) -> None:
        """Takes new ones in, which must not be views, and lets go of the oldest.

        What is too long, or not finite, is not kept.
        """
        for key, context in contexts.items():
            if key in self._contexts or context.length > self.max_tokens:
                continue
            if not context.last_hidden_H.isfinite().all():
                continue
            self._contexts[key] = context
            self.num_tokens += context.length
        while self.num_tokens > self.max_tokens:
            _, oldest = self._contexts.popitem(last=False)
            self.num_tokens -= oldest.length

    def clear(self) -> None:
        self._contexts.clear()
        self.num_tokens = 0


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
    """A layer of a forward of whole sequences that holds on to their contexts' states, and to nothing else.

    Args:
        layer: the empty layer of the model's own cache that this one stands in for.
        lengths: context tokens of each row.
    """

    def __init__(self, layer: DynamicLayer, lengths: Sequence[int]) -> None:
        super().__init__()
        self._layer = layer
        self._lengths = lengths
        self.is_sliding = layer.is_sliding
        self.kept: list[KeysAndValues] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_arguments: object, **_named: object
    ) -> KeysAndValues:
        for row, length in enumerate(self._lengths):
            first = 0
            if isinstance(self._layer, DynamicSlidingWindowLayer):
                first = max(0, length - self._layer.sliding_window + 1)
            self.kept.append((key_states[row, :, first:length].clone(), value_states[row, :, first:length].clone()))
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self._layer.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        return 0
