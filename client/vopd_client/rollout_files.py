"""Rollouts that a checkpoint carries: those in flight between two steps, one file a step and process.

Axes: N rollouts, T completion tokens of all of them one after the other, K support ids of all tokens.

The prompts are not in the file: the checkpoint's fingerprint of the prompts says that the run has the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vopd_client.errors import CheckpointError
from vopd_client.pipeline import InFlight
from vopd_client.prompt_source import PromptsByPosition
from vopd_client.rollouts.base import Rollout, RolloutKey, is_sampled

PATTERN = "rollouts-*.safetensors"
_BYTES_PER_TOKEN = 4 + 4 + 4 + 4 + 1  # id, log-probability, size and mass of the support, whether it was sampled
_BYTES_PER_SUPPORT_ID = 4


def write_rollouts(directory: Path, in_flight: Sequence[InFlight[Sequence[Rollout]]], *, process_index: int) -> None:
    """Writes this process's rollouts in flight into a checkpoint that is not sealed yet. Raises: OSError."""
    for sampled in in_flight:
        path = directory / f"rollouts-{sampled.step:06d}-{process_index:05d}.safetensors"
        metadata = {"step": str(sampled.step), "num_updates": str(sampled.num_updates)}
        save_file(_to_arrays(sampled.rollouts), path, metadata=metadata)


def read_rollouts(directory: Path, prompts: PromptsByPosition) -> list[InFlight[dict[RolloutKey, Rollout]]]:
    """The rollouts in flight of all processes that wrote the checkpoint, by step; none: there are none in it.

    Raises: CheckpointError for a file that cannot be read.
    """
    of_step: dict[tuple[int, int], dict[RolloutKey, Rollout]] = {}
    for path in sorted(directory.glob(PATTERN)):
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                step, num_updates = int(metadata["step"]), int(metadata["num_updates"])
                rollouts = _from_arrays({name: file.get_tensor(name) for name in file.keys()}, prompts)  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error
        of_step.setdefault((step, num_updates), {}).update({rollout.key: rollout for rollout in rollouts})
    return [InFlight(step, num_updates, rollouts) for (step, num_updates), rollouts in sorted(of_step.items())]


def share_of(
    sampled: InFlight[dict[RolloutKey, Rollout]], draws: Sequence[RolloutKey], directory: Path
) -> InFlight[list[Rollout]]:
    """The rollouts of `draws` in their order. Raises: CheckpointError when one is missing."""
    missing = [key for key in draws if key not in sampled.rollouts]
    if missing:
        raise CheckpointError(
            f"{directory} holds {len(sampled.rollouts)} rollouts of step {sampled.step}, and not {missing[0]}"
        )
    return sampled.map(lambda rollouts: [rollouts[key] for key in draws])


def rollout_bytes(*, num_rollouts: int, max_new_tokens: int, max_support: int) -> int:
    """Size of the rollouts of one step on disk, at most."""
    return num_rollouts * max_new_tokens * (_BYTES_PER_TOKEN + max_support * _BYTES_PER_SUPPORT_ID)


def _to_arrays(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray[Any, Any]]:
    keys = [(rollout.key.step, rollout.key.prompt_index, rollout.key.rollout_index) for rollout in rollouts]
    rewards = [np.nan if rollout.task_reward is None else rollout.task_reward for rollout in rollouts]
    return {
        "has_mask_N": np.array([rollout.is_sampled_T is not None for rollout in rollouts], np.uint8),
        "is_sampled_T": np.concatenate([is_sampled(rollout) for rollout in rollouts]).astype(np.uint8),
        "task_reward_N": np.array(rewards, np.float64),  # NaN: none
        "keys_N3": np.array(keys, np.int64).reshape(len(rollouts), 3),
        "ended_N": np.array([rollout.ended for rollout in rollouts], np.uint8),
        "num_tokens_N": np.array([len(rollout.completion_ids) for rollout in rollouts], np.int64),
        "completion_ids_T": np.concatenate([rollout.completion_ids for rollout in rollouts]).astype(np.int32),
        "behaviour_logprobs_T": np.concatenate([rollout.behaviour_logprobs_T for rollout in rollouts]),
        "support_mass_T": np.concatenate([rollout.support_mass_T for rollout in rollouts]),
        "support_counts_T": np.concatenate([rollout.support_counts_T for rollout in rollouts]).astype(np.int32),
        "support_ids_K": np.concatenate([rollout.support_ids for rollout in rollouts]).astype(np.int32),
    }


def _from_arrays(arrays: dict[str, np.ndarray[Any, Any]], prompts: PromptsByPosition) -> list[Rollout]:
    counts_T = arrays["support_counts_T"].astype(np.int64)
    token_ends_N = arrays["num_tokens_N"].cumsum()[:-1]
    support_ends_N = np.concatenate([[0], counts_T.cumsum()])[token_ends_N]
    keys = [RolloutKey(*(int(number) for number in key_3)) for key_3 in arrays["keys_N3"]]
    # Files of versions that knew one turn only hold none of the three.
    has_mask_N = arrays.get("has_mask_N", np.zeros(len(keys), np.uint8))
    is_sampled_T = arrays.get("is_sampled_T", np.ones(len(counts_T), np.uint8)).astype(np.bool_)
    rewards_N = arrays.get("task_reward_N", np.full(len(keys), np.nan))

    completion_ids = np.split(arrays["completion_ids_T"].astype(np.int64), token_ends_N)
    behaviour_logprobs = np.split(arrays["behaviour_logprobs_T"], token_ends_N)
    support_ids = np.split(arrays["support_ids_K"].astype(np.int64), support_ends_N)
    support_counts = np.split(counts_T, token_ends_N)
    support_mass = np.split(arrays["support_mass_T"], token_ends_N)
    masks = np.split(is_sampled_T, token_ends_N)
    return [
        Rollout(
            key=key,
            prompt_ids=prompts[key.prompt_index].student_ids,
            completion_ids=completion_ids[index],
            behaviour_logprobs_T=behaviour_logprobs[index],
            support_ids=support_ids[index],
            support_counts_T=support_counts[index],
            support_mass_T=support_mass[index],
            ended=bool(arrays["ended_N"][index]),
            is_sampled_T=masks[index] if has_mask_N[index] else None,
            task_reward=None if np.isnan(rewards_N[index]) else float(rewards_N[index]),
        )
        for index, key in enumerate(keys)
    ]
