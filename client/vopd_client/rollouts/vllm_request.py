"""What vLLM is asked for one rollout: a draw from the whole distribution, token ids in and token ids out. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vopd_client.rollouts.base import RolloutKey
from vopd_proto.arrays import IntArray

# Added to the logit of an id that must not be sampled. In float32 its probability is exactly 0, and the normaliser is
# that of the others. Finite, since JSON has no infinity.
NEVER = -1e30

_ROLLOUT_STREAM = 4  # of random numbers, beside those of `schedule`


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """What all rollouts of a run have in common.

    num_shared_ids: ids from here on are never sampled and have no probability.
    vocab_size: ids that the engine's output layer scores.
    top_k: ids whose log-probabilities are wanted at each position.
    """

    num_shared_ids: int
    vocab_size: int
    end_ids: frozenset[int]
    max_new_tokens: int
    temperature: float
    top_k: int
    seed: int

    @property
    def num_logprobs(self) -> int:
        return min(self.top_k, self.num_shared_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Generate:
    """One completion to be sampled; parameters are the fields of vLLM's SamplingParams."""

    index: int  # of the request that it answers
    prompt_ids: IntArray
    parameters: dict[str, Any]


def request_seed(seed: int, key: RolloutKey) -> int:
    """Below 2**63, and a function of the run's seed and the draw alone: no rank, no order, no batch."""
    words = (seed, _ROLLOUT_STREAM, key.step, key.prompt_index, key.rollout_index, key.turn)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sampling_parameters(settings: DrawSettings, key: RolloutKey, *, max_tokens: int) -> dict[str, Any]:
    """Every parameter that changes a draw, so that no default of a model's generation config takes its place.

    Nothing is cut off: a sampled estimator whose tokens come from another distribution than the loss's is biased.
    """
    never = range(settings.num_shared_ids, settings.vocab_size)
    return {
        "n": 1,
        "temperature": settings.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": request_seed(settings.seed, key),
        # The end tokens are ours, all of them; each belongs to the completion that it ends.
        "stop_token_ids": sorted(token_id for token_id in settings.end_ids if token_id < settings.num_shared_ids),
        "ignore_eos": True,
        "max_tokens": max_tokens,
        "min_tokens": 0,
        "logprobs": settings.num_logprobs,
        "flat_logprobs": True,
        "detokenize": False,
        "skip_special_tokens": False,
        "logit_bias": dict.fromkeys(never, NEVER) or None,
    }
