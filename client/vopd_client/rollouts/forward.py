"""A model's forward for sampling.

Axes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vopd_client.cpu_attention import attending_on_cpu, configs_to_switch
from vopd_client.model_files import without_peft_wrapper
from vopd_client.rollouts.bf16_layers import bf16_linear_forwards, forwards_replaced
from vopd_client.rollouts.cache import plain_cache

MixedPrecision = Literal["bf16", "no"]


class InferenceForward:
    """No gradients, no dropout, the training forward's autocast.

    All of it holds inside a call only, so that a generator that yields between calls leaves the consumer's
    model, gradient mode and autocast as they were. The weights must not change while this is in use.

    cache_dtype: what attention computes in, where it is not the dtype of what it is given; None: it is.
    """

    def __init__(self, model: nn.Module, mixed_precision: MixedPrecision) -> None:
        self._model = without_peft_wrapper(model)
        self._modules = list(self._model.modules())
        self._autocast = mixed_precision == "bf16"
        self._linear_forwards = bf16_linear_forwards(self._model) if self._autocast else {}
        self._configs = configs_to_switch(self._model)
        parameters = inspect.signature(self._model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self.device = next(self._model.parameters()).device
        self.cache_dtype = torch.bfloat16 if self._autocast else None
        self.has_plain_cache = self.new_cache() is not None

    def new_cache(self) -> Any:
        """What a forward over prompts is to fill; None: the model makes its own."""
        return plain_cache(self._model)

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
        replaced = forwards_replaced(self._linear_forwards)
        with torch.no_grad(), autocast, _evaluating(self._modules), attending_on_cpu(self._configs), replaced:
            return self._model(**inputs)


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode, then exactly the modes that the modules had."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
