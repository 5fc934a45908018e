"""Decoding with a key-value cache: sequences that grow side by side by one token a step.

Axes: B sequences still growing, D distinct prompts, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vopd_client.like_lengths import FORWARD_COST_TOKENS, plan_like_lengths
from vopd_client.rollouts.cache import PrefilledGroup, keep_rows, preallocated_cache
from vopd_client.rollouts.forward import InferenceForward
from vopd_client.rollouts.forward import MixedPrecision as MixedPrecision
from vopd_proto.arrays import IntArray

# (logits_BV, the rows of the batch they belong to, index of the completion token) -> token ids [B]
ChooseTokens = Callable[[Tensor, Sequence[int], int], IntArray]


class GrowingBatch:
    """Prompts, left-padded, and their cache.

    Equal prompts are computed once and their cache repeated. Prompts of unlike length are computed one group of like
    length after the other, and decoded together; a model whose cache is more than keys and values reads them at once.
    """

    def __init__(
        self, forward: InferenceForward, prompts: Sequence[IntArray], *, pad_id: int, max_new_tokens: int
    ) -> None:
        assert all(len(prompt) > 0 for prompt in prompts), "a prompt is never empty"
        self._forward = forward
        self._pad_id = pad_id
        self._prompts = prompts
        self.num_rows = len(prompts)
        self._width = max(len(prompt) for prompt in prompts)
        self._max_fed_tokens = max_new_tokens - 1  # the last one is never fed
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=forward.device)
        column_S = torch.arange(self._width + self._max_fed_tokens, device=forward.device)
        self._mask_BS = (column_S >= self._width - lengths_B[:, None]).long()  # True for tokens to come, too
        self._next_position_B = lengths_B
        self._cache: Any = None

    def prefill(self) -> Tensor:
        """Runs the prompts; logits of each one's next token, [B, V]."""
        rows_of: dict[bytes, list[int]] = {}
        for row, prompt in enumerate(self._prompts):
            rows_of.setdefault(prompt.tobytes(), []).append(row)
        distinct = list(rows_of.values())
        plan = [list(range(len(distinct)))]
        if self._forward.has_plain_cache:
            lengths = [len(self._prompts[rows[0]]) for rows in distinct]
            plan = plan_like_lengths(lengths, pass_cost_tokens=FORWARD_COST_TOKENS)
        groups, logits_by_group = [], []
        for indices in plan:
            group, logits_DV = self._read([distinct[index] for index in indices])
            groups.append(group)
            logits_by_group.append(logits_DV[group.source_rows])
        # The order of the groups' rows, undone.
        row_order_B = torch.cat([group.rows for group in groups]).argsort()
        if self._forward.has_plain_cache:
            self._cache = preallocated_cache(
                groups,
                num_rows=self.num_rows,
                width=self._width,
                max_new_columns=self._max_fed_tokens,
                dtype=self._forward.cache_dtype,
            )
        else:
            self._cache = groups[0].cache
            self._cache.reorder_cache(groups[0].source_rows[row_order_B])
        return torch.cat(logits_by_group)[row_order_B]

    def _read(self, distinct: Sequence[Sequence[int]]) -> tuple[PrefilledGroup, Tensor]:
        """One forward over distinct prompts, given as the rows that each belongs to; logits [D, V]."""
        prompts = [self._prompts[rows[0]] for rows in distinct]
        width = max(len(prompt) for prompt in prompts)
        padded_DS = np.full((len(prompts), width), self._pad_id, np.int64)
        for target_S, prompt in zip(padded_DS, prompts, strict=True):
            target_S[width - len(prompt) :] = prompt
        device = self._forward.device
        mask_DS = self._mask_BS[[rows[0] for rows in distinct], self._width - width : self._width]
        output = self._forward(
            input_ids=torch.from_numpy(padded_DS).to(device),
            attention_mask=mask_DS,
            position_ids=(mask_DS.cumsum(dim=-1) - 1).clamp(min=0),
            cache=self._forward.new_cache(),
        )
        source_rows = [index for index, rows in enumerate(distinct) for _ in rows]
        group = PrefilledGroup(
            output.past_key_values,
            torch.tensor(source_rows, device=device),
            torch.tensor([row for rows in distinct for row in rows], device=device),
        )
        return group, output.logits[:, -1]

    def step(self, token_ids_B: IntArray) -> Tensor:
        """Appends one token to every sequence; logits of the next ones, [B, V]."""
        self._width += 1
        output = self._forward(
            input_ids=torch.from_numpy(token_ids_B[:, None]).to(self._forward.device),
            attention_mask=self._mask_BS[:, : self._width],
            position_ids=self._next_position_B[:, None],
            cache=self._cache,
        )
        self._cache = output.past_key_values
        self._next_position_B = self._next_position_B + 1
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def keep(self, slots: Sequence[int]) -> None:
        """Drops all sequences but `slots`, which close up in this order, one that `closed_up` made."""
        keep_rows(self._cache, slots, self._forward.device)
        index_B = torch.tensor(slots, device=self._forward.device)
        self.num_rows = len(slots)
        self._mask_BS = self._mask_BS[index_B]
        self._next_position_B = self._next_position_B[index_B]


def decode(
    batch: GrowingBatch,
    choose: ChooseTokens,
    *,
    end_ids: frozenset[int],
    max_new_tokens: int,
    limits: Sequence[int] | None = None,
) -> Iterator[tuple[int, bool]]:
    """Grows a batch to its end and yields (row, ended) as soon as a row is complete, before the next forward.

    A row is complete with an end token (ended) or at its limit (not ended), which is `max_new_tokens` unless `limits`
    gives it a lower one. It leaves the batch at once, and one from the end of the batch takes its place.
    """
    rows = list(range(batch.num_rows))
    limits = [max_new_tokens] * batch.num_rows if limits is None else limits
    logits_BV = batch.prefill()
    for position in range(max_new_tokens):
        token_ids_B = choose(logits_BV, rows, position)
        ended_B = [int(token_id) in end_ids for token_id in token_ids_B]
        complete_B = [ended or position + 1 >= limits[row] for row, ended in zip(rows, ended_B, strict=True)]
        for row, ended, complete in zip(rows, ended_B, complete_B, strict=True):
            if complete:
                yield row, ended
        growing = closed_up(complete_B)
        if not growing:
            return
        if len(growing) < len(rows):
            batch.keep(growing)
            rows = [rows[slot] for slot in growing]
        logits_BV = batch.step(token_ids_B[growing])


def closed_up(complete_B: Sequence[bool]) -> list[int]:
    """The slots that go on, in an order that leaves as many as possible where they are.

    Those behind the new end move into the gaps, in their order; the others stay.
    """
    num_growing = len(complete_B) - sum(complete_B)
    behind = [slot for slot in range(num_growing, len(complete_B)) if not complete_B[slot]]
    fill = iter(behind)
    return [next(fill) if complete_B[slot] else slot for slot in range(num_growing)]


def in_batches_of_like_length(prompts: Sequence[IntArray], batch_size: int) -> list[list[int]]:
    """Indices of all prompts in batches, short prompts first and equal ones side by side, whatever their order.

    Like lengths need little padding, and equal prompts in one batch are computed once.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index].tobytes(), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
