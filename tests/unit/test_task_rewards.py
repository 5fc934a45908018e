"""The advantage of a completion among the other completions of its prompt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vopd_client.task_rewards import leave_one_out_advantages


def test_a_reward_is_compared_with_the_mean_of_the_others_of_its_prompt():
    advantages = leave_one_out_advantages([1, 0, 0, 1, 1], ["a", "a", "a", "b", "b"])
    assert advantages.tolist() == [1.0, -0.5, -0.5, 0.0, 0.0]


def test_rollouts_of_one_prompt_need_not_stand_side_by_side():
    assert leave_one_out_advantages([1, 1, 0, 0], ["a", "b", "a", "b"]).tolist() == [1.0, 1.0, -1.0, -1.0]


def test_a_rollout_that_is_alone_keeps_its_reward():
    assert leave_one_out_advantages([1.0, 0.0], ["a", "b"]).tolist() == [1.0, 0.0]


def test_a_reward_too_few_is_an_error():
    with pytest.raises(ValueError, match="1 rewards for 2 rollouts"):
        leave_one_out_advantages([1.0], ["a", "a"])


def test_several_rollouts_with_it_have_the_policy_gradient_and_less_variance():
    """Three rollouts of one token each from three ids, all 27 groups weighed by their probability."""
    probabilities_V, reward_V = np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, 0.4])
    score_VV = np.eye(3) - probabilities_V
    expected_V = (probabilities_V * reward_V) @ score_VV
    means = {True: np.zeros(3), False: np.zeros(3)}
    second_moments = {True: 0.0, False: 0.0}
    for group in itertools.product(range(3), repeat=3):
        weight = probabilities_V[list(group)].prod()
        rewards = reward_V[list(group)]
        for is_compared in (True, False):
            advantages = leave_one_out_advantages(rewards, [0, 0, 0]) if is_compared else rewards
            gradient_V = (advantages[:, None] * score_VV[list(group)]).mean(0)
            means[is_compared] += weight * gradient_V
            second_moments[is_compared] += weight * (gradient_V**2).sum()
    np.testing.assert_allclose(means[True], expected_V, atol=1e-12)
    np.testing.assert_allclose(means[False], expected_V, atol=1e-12)
    assert second_moments[True] < second_moments[False]
