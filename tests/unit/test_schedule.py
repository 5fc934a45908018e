"""What happens at which step is a function of the seed and the step alone."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from vopd_client.schedule import (
    dropout_seed,
    evaluation_seed,
    is_due,
    learning_rate_factor,
    prompts_of_step,
    rollouts_of_step,
    share_of_process,
)


def test_every_prompt_comes_once_an_epoch_and_epochs_have_orders_of_their_own() -> None:
    first, second = (
        [position for step in steps for position in prompts_of_step(7, step, 12, 4)] for steps in ((1, 2, 3), (4, 5, 6))
    )
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second  # equal with probability 1 / 12!


def test_the_prompts_of_a_step_do_not_depend_on_the_steps_before_it() -> None:
    assert prompts_of_step(7, 5, 10, 4) == [prompts_of_step(7, step, 10, 4) for step in range(1, 6)][-1]
    assert prompts_of_step(7, 5, 10, 4) != prompts_of_step(8, 5, 10, 4)  # equal with probability below 1 / 5040


def test_a_step_that_needs_a_prompt_twice_never_makes_the_same_draw_twice() -> None:
    keys = rollouts_of_step(1, 1, num_prompts=2, prompts_per_step=5, rollouts_per_prompt=3)
    assert len(keys) == len(set(keys)) == 15
    draws_of = Counter(key.prompt_index for key in keys)
    assert sorted(draws_of.values()) == [6, 9]
    assert {key.rollout_index for key in keys if key.prompt_index == draws_of.most_common(1)[0][0]} == set(range(9))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_the_steps_rollouts_without_splitting_a_prompt(num_processes: int) -> None:
    keys = rollouts_of_step(1, 3, num_prompts=20, prompts_per_step=7, rollouts_per_prompt=2)
    shares = [share_of_process(keys, 2, index, num_processes) for index in range(num_processes)]
    assert sorted((k.prompt_index, k.rollout_index) for share in shares for k in share) == sorted(
        (k.prompt_index, k.rollout_index) for k in keys
    )
    for share in shares:
        assert all(count == 2 for count in Counter(key.prompt_index for key in share).values())


def test_the_warm_up_rises_in_equal_parts_and_takes_no_step_at_zero() -> None:
    factors = [learning_rate_factor(step, schedule="constant", warmup_steps=3, total_steps=6) for step in range(1, 7)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_the_cosine_falls_from_one_to_zero_just_after_the_last_step() -> None:
    factors = [learning_rate_factor(step, schedule="cosine", warmup_steps=1, total_steps=5) for step in range(1, 7)]
    assert factors == pytest.approx([0.5, *(0.5 * (1 + math.cos(math.pi * part / 4)) for part in range(5))])
    assert factors[-1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("every", "due"), [(0, [10]), (3, [3, 6, 9, 10]), (5, [5, 10]), (20, [10])], ids=lambda value: str(value)
)
def test_periodic_work_is_due_every_so_many_steps_and_always_after_the_last(every: int, due: list[int]) -> None:
    assert [step for step in range(11) if is_due(step, every=every, total_steps=10)] == due


def test_seeds_of_steps_processes_and_evaluations_differ() -> None:
    seeds = [dropout_seed(1, step, process) for step in range(50) for process in range(4)]
    assert len({*seeds, evaluation_seed(1)}) == 201  # a collision has probability below 1e-14
    assert all(0 <= seed < 2**63 for seed in seeds)
