"""What happens at which step: prompts, rollouts, seeds, learning rate. Pure functions of the seed and the step.

Steps count from 1, as in the logs. Nothing here depends on ranks, on what happened before, or on a generator's
state, which is why an interrupted run needs none of it saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from vopd_client.rollouts.base import RolloutKey
from vopd_client.train_config import TrainConfig

_PROMPT_ORDER, _DROPOUT, _EVALUATION, _BLOCK_ORDER = 1, 2, 3, 4  # streams of random numbers that must not meet
_EVALUATION_SAMPLES = 5  # another such stream


def block_order(seed: int, epoch: int, first_row: int, num_rows: int) -> list[int]:
    """The order in which the rows of one block of a stream come, as positions in the block."""
    order: list[int] = np.random.default_rng([seed, _BLOCK_ORDER, epoch, first_row]).permutation(num_rows).tolist()
    return order


def prompts_of_step(seed: int, step: int, num_prompts: int, prompts_per_step: int) -> list[int]:
    """Positions of the prompts of one step: the next ones in an endless row of shuffled epochs.

    Every prompt comes once an epoch. A step that reaches over the end of an epoch may hold a prompt twice.
    """
    assert step >= 1
    assert num_prompts >= 1
    first = (step - 1) * prompts_per_step
    orders: dict[int, list[int]] = {}
    positions = []
    for place in range(first, first + prompts_per_step):
        epoch, within = divmod(place, num_prompts)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, _PROMPT_ORDER, epoch]).permutation(num_prompts).tolist()
        positions.append(orders[epoch][within])
    return positions


def rollouts_of_step(
    seed: int, step: int, num_prompts: int, prompts_per_step: int, rollouts_per_prompt: int
) -> list[RolloutKey]:
    """The draws of one step, prompt by prompt; `prompt_index` is the position in the list of prompts."""
    return draws_of_prompts(step, prompts_of_step(seed, step, num_prompts, prompts_per_step), rollouts_per_prompt)


def draws_of_prompts(step: int, positions: Sequence[int], rollouts_per_prompt: int) -> list[RolloutKey]:
    """The draws of the prompts of one step, wherever these come from.

    A prompt that comes twice goes on counting its rollouts, so that no draw is made twice.
    """
    keys: list[RolloutKey] = []
    drawn: dict[int, int] = {}
    for position in positions:
        start = drawn.get(position, 0)
        drawn[position] = start + rollouts_per_prompt
        keys.extend(RolloutKey(step, position, start + index) for index in range(rollouts_per_prompt))
    return keys


def share_of_process(
    keys: list[RolloutKey], rollouts_per_prompt: int, process_index: int, num_processes: int
) -> list[RolloutKey]:
    """The rollouts of every `num_processes`-th prompt: all rollouts of a prompt stay together."""
    return [key for place, key in enumerate(keys) if (place // rollouts_per_prompt) % num_processes == process_index]


def draws_of_process(
    config: TrainConfig, step: int, *, positions: Sequence[int], process_index: int, num_processes: int
) -> list[RolloutKey]:
    """The draws of one step that this process makes; positions: of all prompts of the step."""
    keys = draws_of_prompts(step, positions, config.rollouts_per_prompt)
    return share_of_process(keys, config.rollouts_per_prompt, process_index, num_processes)


def dropout_seed(seed: int, step: int, process_index: int) -> int:
    """Seed of the dropout masks of one step, another one on every process."""
    return _derived(seed, _DROPOUT, step, process_index)


def evaluation_seed(seed: int) -> int:
    """Seed of the completions that evaluations sample: the same at each of them, and none of the training's."""
    return _derived(seed, _EVALUATION)


def evaluation_samples_seed(seed: int) -> int:
    """Seed of the samples that evaluations judge: the same at each of them, and none of the KL's."""
    return _derived(seed, _EVALUATION_SAMPLES)


def _derived(*numbers: int) -> int:
    """A seed below 2**63 that is a function of the numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate_factor(
    step: int, *, schedule: Literal["cosine", "constant"], warmup_steps: int, total_steps: int
) -> float:
    """Share of the peak learning rate that `step` (1 .. total_steps) is taken with.

    The warm-up rises in equal parts and never takes a step at 0; the cosine falls from 1 at the first step
    after the warm-up towards 0 at the step after the last.
    """
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps - 1) / (total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def is_due(step: int, *, every: int, total_steps: int) -> bool:
    """Whether something done every `every` steps (0: at the end only) is done after `step`; always after the last."""
    return step == total_steps or (every > 0 and step > 0 and step % every == 0)
