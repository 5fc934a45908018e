"""From token ids to the hidden states that predict completion tokens: padding, positions, cached contexts.

Axes: B rows of a forward, G distinct contexts, S padded length, C context and T completion tokens, H hidden
size, N scored rows (all the requests' completion tokens, one request after the other).

The hidden state that reads token i predicts token i + 1, so completion token t of a context of length C is
predicted by row C - 1 + t, and the last completion token is never fed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vopd_proto.arrays import IntArray
from vopd_server.engines.contexts import (
    EXPANDABLE_LAYERS,
    KeepingLayer,
    ReadContext,
    ReadContexts,
    contexts_in_batch,
    joined_cache,
)
from vopd_server.types import ScoreRequest

_PAD_ID = 0  # any id that the embedding has; what is computed at pads is never read


def context_key(request: ScoreRequest) -> bytes:
    """Equal for equal contexts that may be shared, and for no others."""
    return request.cache_salt.encode() + b"\0" + np.ascontiguousarray(request.context_ids, np.int64).tobytes()


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What forwards cost, in tokens."""

    forwards: int = 0
    tokens: int = 0  # that the model read, padding included
    padding_tokens: int = 0

    def __add__(self, other: Forwarded) -> Forwarded:
        return Forwarded(
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.padding_tokens + other.padding_tokens,
        )


class Backbone:
    """The model below its output head. Not a place for state: every call is a function of its arguments."""

    def __init__(self, base_model: torch.nn.Module, device: torch.device) -> None:
        self._base_model = base_model
        self.device = device
        parameters = inspect.signature(base_model.forward).parameters
        # Models without rotary or learned positions derive what they need from the attention mask.
        self._takes_position_ids = "position_ids" in parameters
        self._takes_cache = "past_key_values" in parameters

    @property
    def has_expandable_cache(self) -> bool:
        """Whether a context's states can be copied to several rows: attention layers only, sliding or not."""
        if not self._takes_cache or getattr(self._base_model, "_is_stateful", False):
            return False
        return all(type(layer) in EXPANDABLE_LAYERS for layer in self._new_cache().layers)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._base_model.config)

    def read_whole(self, requests: Sequence[ScoreRequest]) -> tuple[torch.Tensor, Forwarded]:
        """One forward of whole sequences: hidden states [N, H].

        Padding is on the right, where a causal model never looks, so there is neither mask nor position and
        the attention kernels that need none can run.
        """
        sequences = _whole(requests)
        ids_BS = _padded_right(sequences)
        hidden_BSH = self._forward(ids_BS, use_cache=False)
        return self._completion_rows(hidden_BSH, requests), _cost(ids_BS, sequences)

    def read_whole_and_contexts(
        self, requests: Sequence[ScoreRequest], *, max_context_tokens: int
    ) -> tuple[torch.Tensor, dict[bytes, ReadContext], Forwarded]:
        """As `read_whole`, and on the way the states of so many tokens' contexts, those of the last requests."""
        sequences = _whole(requests)
        ids_BS = _padded_right(sequences)
        length_of_row = _last_contexts(requests, max_context_tokens)
        cache = self._new_cache()
        keeping = [KeepingLayer(layer, length_of_row) for layer in cache.layers if isinstance(layer, DynamicLayer)]
        assert len(keeping) == len(cache.layers), "has_expandable_cache says whether this can be asked"
        cache.layers = list(keeping)
        hidden_BSH = self._forward(ids_BS, use_cache=True, past_key_values=cache)
        contexts = {
            context_key(requests[row]): ReadContext(
                length, hidden_BSH[row, length - 1].clone(), tuple(layer.kept[row] for layer in keeping)
            )
            for row, length in length_of_row.items()
        }
        return self._completion_rows(hidden_BSH, requests), contexts, _cost(ids_BS, sequences)

    def read_contexts(self, requests: Sequence[ScoreRequest]) -> tuple[dict[bytes, ReadContext], Forwarded]:
        """One forward of the requests' distinct contexts.

        Padding is on the left, so that a completion follows its context without a gap: sliding windows
        count in cache slots.
        """
        contexts = {context_key(request): request.context_ids for request in requests}
        ids_GS = _padded_left(list(contexts.values()))
        lengths_G = np.array([len(ids) for ids in contexts.values()])
        padded_length = ids_GS.shape[1]
        cache = self._new_cache()
        hidden_GSH = self._forward(
            ids_GS,
            use_cache=True,
            past_key_values=cache,
            **self._after_left_padding(padded_length - lengths_G, padded_length),
        )
        last_hidden_GH = hidden_GSH[:, -1].clone()  # a view would keep [G, S, H] alive
        read = contexts_in_batch(cache, last_hidden_GH, lengths_G.tolist())
        return dict(zip(contexts, read, strict=True)), _cost(ids_GS, list(contexts.values()))

    def read_completions(
        self, contexts: ReadContexts, requests: Sequence[ScoreRequest]
    ) -> tuple[torch.Tensor, Forwarded]:
        """One forward of completions on their contexts, which are left as they were: hidden states [N, H]."""
        contexts_B = [contexts[context_key(request)] for request in requests]
        first_hidden_BH = torch.stack([context.last_hidden_H for context in contexts_B])
        fed = [request.completion_ids[:-1] for request in requests]
        ids_BS = _padded_right(fed)
        if ids_BS.shape[1] == 0:  # one-token completions: the contexts have said it all
            return first_hidden_BH, Forwarded()
        lengths_B = np.array([context.length for context in contexts_B])
        padded_length = int(lengths_B.max())
        hidden_BSH = self._forward(
            ids_BS,
            use_cache=True,
            past_key_values=joined_cache(self._new_cache(), contexts_B, padded_length),
            **self._after_left_padding(padded_length - lengths_B, padded_length + ids_BS.shape[1], ids_BS.shape[1]),
        )
        # Behind the fed rows come the B first rows: one selection puts every request's rows in order.
        hidden_RH = torch.cat((hidden_BSH.flatten(0, 1), first_hidden_BH))
        rows = [
            np.concatenate(([ids_BS.size + row], _flat_rows(row, ids_BS.shape[1], 0, len(completion))))
            for row, completion in enumerate(fed)
        ]
        return self._select(hidden_RH, rows), _cost(ids_BS, fed)

    def _forward(self, ids_BS: IntArray, **inputs: Any) -> torch.Tensor:
        input_ids = torch.as_tensor(ids_BS, device=self.device)
        hidden_BSH: torch.Tensor = self._base_model(input_ids=input_ids, **inputs).last_hidden_state
        return hidden_BSH

    def _after_left_padding(
        self, pads_B: IntArray, total_length: int, num_fed: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Attention mask and positions of the last `num_fed` of `total_length` slots; nothing without pads."""
        if not pads_B.any():
            return {}
        position_BS = np.arange(total_length)[None, :] - pads_B[:, None]
        inputs = {"attention_mask": torch.as_tensor((position_BS >= 0).astype(np.int64), device=self.device)}
        if self._takes_position_ids:
            fed_positions = position_BS[:, total_length - (num_fed or total_length) :].clip(min=0)
            inputs["position_ids"] = torch.as_tensor(fed_positions, device=self.device)
        return inputs

    def _completion_rows(self, hidden_BSH: torch.Tensor, requests: Sequence[ScoreRequest]) -> torch.Tensor:
        """The rows of whole sequences that predict completion tokens, [N, H]."""
        rows = [
            _flat_rows(row, hidden_BSH.shape[1], len(request.context_ids) - 1, len(request.completion_ids))
            for row, request in enumerate(requests)
        ]
        return self._select(hidden_BSH, rows)

    def _select(self, hidden: torch.Tensor, rows: Sequence[IntArray]) -> torch.Tensor:
        index_N = torch.as_tensor(np.concatenate(rows), device=self.device)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index_N)


def _whole(requests: Sequence[ScoreRequest]) -> list[IntArray]:
    """What the model reads of each: the last completion token predicts nothing asked for."""
    return [np.concatenate((request.context_ids, request.completion_ids[:-1])) for request in requests]


def _last_contexts(requests: Sequence[ScoreRequest], max_tokens: int) -> dict[int, int]:
    """Context lengths of the last rows that have `max_tokens` together, at most, each context once."""
    lengths: dict[int, int] = {}
    seen: set[bytes] = set()
    for row in range(len(requests) - 1, -1, -1):
        length, key = len(requests[row].context_ids), context_key(requests[row])
        if key not in seen and sum(lengths.values()) + length <= max_tokens:
            lengths[row] = length
            seen.add(key)
    return lengths


def _padded_right(sequences: Sequence[IntArray]) -> IntArray:
    ids_BS = np.full((len(sequences), max(map(len, sequences))), _PAD_ID, np.int64)
    for row, ids in enumerate(sequences):
        ids_BS[row, : len(ids)] = ids
    return ids_BS


def _padded_left(sequences: Sequence[IntArray]) -> IntArray:
    ids_BS = np.full((len(sequences), max(map(len, sequences))), _PAD_ID, np.int64)
    for row, ids in enumerate(sequences):
        ids_BS[row, ids_BS.shape[1] - len(ids) :] = ids
    return ids_BS


def _flat_rows(row: int, padded_length: int, first: int, count: int) -> IntArray:
    return row * padded_length + first + np.arange(count)


def _cost(ids_BS: IntArray, sequences: Sequence[IntArray]) -> Forwarded:
    return Forwarded(1, ids_BS.size, ids_BS.size - sum(map(len, sequences)))
