"""Rollouts from a transformers model: samples, records what the losses need, and yields each when it ends.

Axes: B rows still growing, T completion tokens, K support size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vopd_client.errors import NonFiniteError
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.base import RolloutRequest as RolloutRequest
from vopd_client.rollouts.decoding import (
    GrowingBatch,
    decode,
    in_batches_of_like_length,
)
from vopd_client.rollouts.forward import InferenceForward, MixedPrecision
from vopd_client.rollouts.sampling import Float64Array, draw_by_inverse_cdf, row_uniforms, sampling_logits
from vopd_client.rollouts.support import adaptive_support
from vopd_proto.arrays import Float32Array, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class _SampledStep:
    """One token of every growing row, on the host; the fields of `Rollout`, one row each."""

    token_ids_B: IntArray
    logprobs_B: Float32Array
    support_ids_BK: IntArray
    support_counts_B: IntArray
    support_mass_B: Float32Array


@dataclass(slots=True)
class _Recording:
    """One row so far. Supports are kept ragged: most positions need a handful of the K ids."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    support_ids: list[IntArray] = field(default_factory=list)
    support_mass: list[float] = field(default_factory=list)

    def append(self, step: _SampledStep, slot: int) -> None:
        self.token_ids.append(int(step.token_ids_B[slot]))
        self.logprobs.append(float(step.logprobs_B[slot]))
        self.support_ids.append(step.support_ids_BK[slot, : step.support_counts_B[slot]].copy())
        self.support_mass.append(float(step.support_mass_B[slot]))

    def rollout(self, key: RolloutKey, prompt_ids: IntArray, *, ended: bool) -> Rollout:
        return Rollout(
            key=key,
            prompt_ids=prompt_ids,
            completion_ids=np.array(self.token_ids, np.int64),
            behaviour_logprobs_T=np.array(self.logprobs, np.float32),
            support_ids=np.concatenate(self.support_ids),
            support_counts_T=np.array([len(ids) for ids in self.support_ids], np.int64),
            support_mass_T=np.array(self.support_mass, np.float32),
            ended=ended,
        )


class RolloutSampler:
    """Samples completions from `model` as it is when iteration starts.

    Args:
        model: a causal LM, plain or with PEFT adapters. Its modes, and the caller's gradient and autocast
            modes, are untouched between rollouts; its weights must not change until the iterator ends.
        num_shared_ids: ids from here on are never sampled and have no probability.
        end_ids: a completion ends with the first of them, which belongs to it.
        pad_id: any valid id; it is masked.
        max_new_tokens: length limit of a completion, in tokens.
        temperature: of the draws, of the recorded log-probabilities and of the support.
        top_k, support_mass: the adaptive support, see `adaptive_support`.
        seed: the run's; every draw is a function of (seed, rollout key, token index) and the model.
        batch_size: completions side by side, at most.
        mixed_precision: "bf16" samples under the autocast of a bf16 training forward.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_shared_ids: int,
        end_ids: frozenset[int],
        pad_id: int,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        support_mass: float,
        seed: int,
        batch_size: int,
        mixed_precision: MixedPrecision = "no",
    ) -> None:
        self._model = model
        self._num_shared_ids = num_shared_ids
        self._end_ids = end_ids
        self._pad_id = pad_id
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._top_k = top_k
        self._support_mass = support_mass
        self._seed = seed
        self._batch_size = batch_size
        self._mixed_precision = mixed_precision

    def sample(self, requests: Sequence[RolloutRequest], *, limits: Sequence[int] | None = None) -> Iterator[Rollout]:
        """Yields one rollout a request, each as soon as it ends, so in no particular order.

        Args: limits: tokens of each request's completion, at most; None: max_new_tokens for all.

        Raises: NonFiniteError when the model's logits are NaN or infinite; it names the draw.
        """
        limits = [self._max_new_tokens] * len(requests) if limits is None else limits
        forward = InferenceForward(self._model, self._mixed_precision)
        batches = in_batches_of_like_length([prompt_ids for _, prompt_ids in requests], self._batch_size)
        for indices in batches:
            yield from self._sample_batch(
                forward, [requests[index] for index in indices], [limits[index] for index in indices]
            )

    def _sample_batch(
        self, forward: InferenceForward, requests: Sequence[RolloutRequest], limits: Sequence[int]
    ) -> Iterator[Rollout]:
        keys = [key for key, _ in requests]
        prompts = [prompt_ids for _, prompt_ids in requests]
        max_new_tokens = max(limits)
        uniforms_BT = np.stack([row_uniforms(self._seed, key, max_new_tokens) for key in keys])
        recordings = [_Recording() for _ in keys]

        def choose(logits_BV: Tensor, rows: Sequence[int], position: int) -> IntArray:
            step = self._sample_step(logits_BV, uniforms_BT[rows, position])
            for slot, row in enumerate(rows):
                if not np.isfinite(step.logprobs_B[slot]):
                    raise NonFiniteError(
                        f"the student's logits are not finite at completion token {position} of {keys[row]}"
                    )
                recordings[row].append(step, slot)
            return step.token_ids_B

        batch = GrowingBatch(forward, prompts, pad_id=self._pad_id, max_new_tokens=max_new_tokens)
        for row, ended in decode(
            batch,
            choose,
            end_ids=self._end_ids,
            max_new_tokens=max_new_tokens,
            limits=limits,
        ):
            yield recordings[row].rollout(keys[row], prompts[row], ended=ended)

    def _sample_step(self, logits_BV: Tensor, uniforms_B: Float64Array) -> _SampledStep:
        """Draws one token a row and brings what is to be recorded to the host, which waits for it anyway."""
        logits_BV = sampling_logits(logits_BV, num_shared_ids=self._num_shared_ids, temperature=self._temperature)
        draw = draw_by_inverse_cdf(logits_BV, torch.from_numpy(uniforms_B))
        support = adaptive_support(logits_BV, draw.log_normaliser_B, top_k=self._top_k, support_mass=self._support_mass)
        return _SampledStep(
            token_ids_B=draw.ids_B.cpu().numpy(),
            logprobs_B=draw.logprobs_B.cpu().numpy(),
            support_ids_BK=support.ids_BK.cpu().numpy(),
            support_counts_B=support.counts_B.cpu().numpy(),
            support_mass_B=support.mass_B.cpu().numpy(),
        )


def greedy(
    model: nn.Module,
    prompts: Sequence[IntArray],
    *,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    num_shared_ids: int,
    batch_size: int,
    mixed_precision: MixedPrecision = "no",
) -> list[IntArray]:
    """The most likely token at every step: one completion a prompt, in the prompts' order, end token included."""
    forward = InferenceForward(model, mixed_precision)
    completions: list[list[int]] = [[] for _ in prompts]
    for indices in in_batches_of_like_length(prompts, batch_size):

        def choose(logits_BV: Tensor, rows: Sequence[int], position: int, indices: Sequence[int] = indices) -> IntArray:
            token_ids_B: IntArray = logits_BV[:, :num_shared_ids].argmax(dim=-1).cpu().numpy()
            for row, token_id in zip(rows, token_ids_B, strict=True):
                completions[indices[row]].append(int(token_id))
            return token_ids_B

        batch = GrowingBatch(
            forward, [prompts[index] for index in indices], pad_id=pad_id, max_new_tokens=max_new_tokens
        )
        for _ in decode(batch, choose, end_ids=end_ids, max_new_tokens=max_new_tokens):
            pass
    return [np.array(completion, np.int64) for completion in completions]
