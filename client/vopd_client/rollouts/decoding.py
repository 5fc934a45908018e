"""Decoding with a key-value cache: sequences that grow side by side by one token a step.

Axes: B sequences still growing, D distinct prompts, S tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vopd_client.model_files import without_peft_wrapper
from vopd_proto.arrays import IntArray

MixedPrecision = Literal["bf16", "no"]

# (logits_BV, the rows of the batch they belong to, index of the completion token) -> token ids [B]
ChooseTokens = Callable[[Tensor, Sequence[int], int], IntArray]


class InferenceForward:
    """A model's forward for sampling: no gradients, no dropout, the training forward's autocast.

    All of it holds inside a call only, so that a generator that yields between calls leaves the consumer's
    model, gradient mode and autocast as they were. The weights must not change while this is in use.
    """

    def __init__(self, model: nn.Module, mixed_precision: MixedPrecision) -> None:
        self._model = without_peft_wrapper(model)
        self._autocast = mixed_precision == "bf16"
        self._weights = _linear_weights_in_bf16(self._model) if self._autocast else {}
        parameters = inspect.signature(self._model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self.device = next(self._model.parameters()).device

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Any:
        """Logits of the last position, [B, 1, V] or more positions in `.logits`, and `.past_key_values`."""
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._takes_positions:
            inputs["position_ids"] = position_ids
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        # Not inference_mode: some models keep buffers that a forward writes and a training forward then reads.
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast)
        with torch.no_grad(), autocast, _evaluating(self._model):
            return torch.func.functional_call(self._model, self._weights, args=(), kwargs=inputs, tie_weights=False)


def _linear_weights_in_bf16(model: nn.Module) -> dict[str, Tensor]:
    """bf16 copies of what autocast would convert again at every step, by parameter name.

    Autocast's own cache ends with its context, that is with every call. `tie_weights=False` above keeps an
    embedding that shares its weight with the head in fp32, as it is under autocast.
    """
    return {
        f"{name}.{parameter_name}": parameter.detach().to(torch.bfloat16)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then exactly the modes that the modules had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class GrowingBatch:
    """Prompts, left-padded, and their cache. Equal prompts are computed once and their cache repeated."""

    def __init__(
        self, forward: InferenceForward, prompts: Sequence[IntArray], *, pad_id: int, max_new_tokens: int
    ) -> None:
        assert all(len(prompt) > 0 for prompt in prompts), "a prompt is never empty"
        self._forward = forward
        self._pad_id = pad_id
        self._prompts = prompts
        self.num_rows = len(prompts)
        self._width = max(len(prompt) for prompt in prompts)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=forward.device)
        column_S = torch.arange(self._width + max_new_tokens, device=forward.device)
        self._mask_BS = (column_S >= self._width - lengths_B[:, None]).long()  # True for tokens to come, too
        self._next_position_B = lengths_B
        self._cache: Any = None

    def prefill(self) -> Tensor:
        """Runs the prompts; logits of each one's next token, [B, V]."""
        first_row_of: dict[bytes, int] = {}
        for row, prompt in enumerate(self._prompts):
            first_row_of.setdefault(prompt.tobytes(), row)
        distinct_rows = list(first_row_of.values())
        padded_DS = np.full((len(distinct_rows), self._width), self._pad_id, np.int64)
        for index, row in enumerate(distinct_rows):
            padded_DS[index, self._width - len(self._prompts[row]) :] = self._prompts[row]
        mask_DS = self._mask_BS[distinct_rows, : self._width]
        output = self._forward(
            input_ids=torch.from_numpy(padded_DS).to(self._forward.device),
            attention_mask=mask_DS,
            position_ids=(mask_DS.cumsum(dim=-1) - 1).clamp(min=0),
            cache=None,
        )
        self._cache = output.past_key_values
        logits_DV: Tensor = output.logits[:, -1]
        if len(distinct_rows) == len(self._prompts):
            return logits_DV
        repeat_B = torch.tensor(
            [distinct_rows.index(first_row_of[prompt.tobytes()]) for prompt in self._prompts],
            device=self._forward.device,
        )
        self._cache.reorder_cache(repeat_B)
        return logits_DV[repeat_B]

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

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all sequences but `rows`, which close up in this order."""
        index_B = torch.tensor(rows, device=self._forward.device)
        self._cache.reorder_cache(index_B)  # every kind of cache layer has it, unlike batch_select_indices
        self.num_rows = len(rows)
        self._mask_BS = self._mask_BS[index_B]
        self._next_position_B = self._next_position_B[index_B]


def decode(
    batch: GrowingBatch,
    choose: ChooseTokens,
    *,
    end_ids: frozenset[int],
    max_new_tokens: int,
) -> Iterator[tuple[int, bool]]:
    """Grows a batch to its end and yields (row, ended) as soon as a row is complete, before the next forward.

    A row is complete with an end token (ended) or at `max_new_tokens` (not ended). It leaves the batch at
    once: that copies the cache one time more, as every step does anyway, and spares the row's later steps.
    """
    rows = list(range(batch.num_rows))
    logits_BV = batch.prefill()
    for position in range(max_new_tokens):
        token_ids_B = choose(logits_BV, rows, position)
        is_last = position + 1 == max_new_tokens
        ended_B = [int(token_id) in end_ids for token_id in token_ids_B]
        for row, ended in zip(rows, ended_B, strict=True):
            if ended or is_last:
                yield row, ended
        growing = [slot for slot, ended in enumerate(ended_B) if not ended]
        if is_last or not growing:
            return
        if len(growing) < len(rows):
            batch.keep(growing)
            rows = [rows[slot] for slot in growing]
        logits_BV = batch.step(token_ids_B[growing])


def in_batches_of_like_length(prompts: Sequence[IntArray], batch_size: int) -> list[list[int]]:
    """Indices of all prompts in batches, short prompts first and equal ones side by side, whatever their order.

    Like lengths need little padding, and equal prompts in one batch are computed once.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index].tobytes(), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
