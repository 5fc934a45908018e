"""From what vLLM generated to a rollout: the support that its log-probabilities give, and what must not pass. Pure.

Axes: T completion tokens, K ids whose log-probabilities came with each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vopd_client.errors import NonFiniteError, RolloutEngineError
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_proto.arrays import Float32Array, IntArray

# vLLM's server writes it for what JSON cannot hold: -inf, and NaN.
NO_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What the engine sampled, whichever way it came. Natural log, at the run's temperature.

    top_ids_TK, top_logprobs_TK: the K most likely ids, most likely first, whether the sampled one is among them or not.
    finish_reason: vLLM's: stop, length, abort, error.
    weight_versions: labels of the weights that sampled it.
    """

    token_ids_T: IntArray
    sampled_logprobs_T: Float32Array
    top_ids_TK: IntArray
    top_logprobs_TK: Float32Array
    finish_reason: str
    weight_versions: tuple[str, ...]


def rollout_of(
    generation: Generation,
    key: RolloutKey,
    prompt_ids: IntArray,
    *,
    end_ids: Collection[int],
    num_shared_ids: int,
    max_tokens: int,
    support_mass: float,
    weight_version: str,
) -> Rollout:
    """The rollout that was generated, with its adaptive support.

    Raises:
        NonFiniteError: a log-probability that is not finite; it names the draw.
        RolloutEngineError: an aborted or empty generation, one that is longer than asked for, ids that were not to be
            sampled, and one that other weights than `weight_version` sampled.
    """
    token_ids_T = generation.token_ids_T
    if generation.finish_reason not in ("stop", "length") or not 1 <= len(token_ids_T) <= max_tokens:
        raise RolloutEngineError(
            f"the rollout engine gave {len(token_ids_T)} of at most {max_tokens} tokens for {key} and said "
            f"{generation.finish_reason!r}: something else aborts its requests or updates its weights"
        )
    if set(generation.weight_versions) != {weight_version}:
        raise RolloutEngineError(
            f"the rollout engine sampled {key} with weights {', '.join(generation.weight_versions) or 'of no version'} "
            f"and not with {weight_version}: it was started anew, or another run updates it"
        )
    for position, logprob in enumerate(generation.sampled_logprobs_T):
        if not np.isfinite(logprob) or logprob <= NO_LOGPROB:
            raise NonFiniteError(f"the student's logits are not finite at completion token {position} of {key}")
    if token_ids_T.max() >= num_shared_ids:
        raise RolloutEngineError(
            f"the rollout engine sampled id {token_ids_T.max()} in {key}; only ids below {num_shared_ids} are shared"
        )
    counts_T, mass_T = cut_support(generation.top_logprobs_TK, support_mass=support_mass)
    is_kept_TK = np.arange(generation.top_ids_TK.shape[1]) < counts_T[:, None]
    return Rollout(
        key=key,
        prompt_ids=prompt_ids,
        completion_ids=token_ids_T,
        behaviour_logprobs_T=generation.sampled_logprobs_T,
        support_ids=generation.top_ids_TK[is_kept_TK],
        support_counts_T=counts_T,
        support_mass_T=mass_T,
        ended=int(token_ids_T[-1]) in end_ids,
    )


def cut_support(top_logprobs_TK: Float32Array, *, support_mass: float) -> tuple[IntArray, Float32Array]:
    """How many of the most likely ids of each position are its support, and their probability, both [T].

    The same rule as `adaptive_support`, from log-probabilities instead of logits: the id that reaches the mass is
    included, ids of probability zero are not, and there is always one.
    """
    probabilities_TK = np.exp(top_logprobs_TK, dtype=np.float32)
    reached_TK = probabilities_TK.cumsum(axis=1, dtype=np.float32)
    is_kept_TK = probabilities_TK > 0
    if support_mass < 1:  # at 1, rounding could reach the mass early
        is_kept_TK[:, 1:] &= reached_TK[:, :-1] < support_mass
    counts_T = np.maximum(is_kept_TK.sum(axis=1), 1)
    mass_T = np.take_along_axis(reached_TK, counts_T[:, None] - 1, axis=1)[:, 0]
    return counts_T.astype(np.int64), np.minimum(mass_T, np.float32(1.0))
