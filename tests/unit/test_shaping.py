"""What is done to rewards and advantages, by enumeration: which expectation each estimator then has."""

from __future__ import annotations

import math

import pytest
import torch

from enumeration import (
    State,
    batch_of_every_token,
    exact_gradient,
    expectation,
    gradient_of_every_token,
    random_state,
)
from vopd_client.errors import ConfigError
from vopd_client.losses import compute_loss, mean_metrics
from vopd_client.shaping import NO_SHAPING, Shaping, check_shaping, reward_floor

SEEDS = (0, 1, 2)
SAMPLED = ["opd", "vopd", "vopd-rb", "vopd-full"]
sampled = pytest.mark.parametrize("objective", SAMPLED)


def policy_gradient(state: State, advantage_V: torch.Tensor, weight_V: torch.Tensor | None = None) -> torch.Tensor:
    """-sum_v pi(v) advantage(v) grad log pi(v) with respect to the logits, [V]: written out, no autograd."""
    pi_V = state.pi_V
    weight_V = pi_V if weight_V is None else weight_V
    score_VV = torch.eye(len(pi_V), dtype=pi_V.dtype) - pi_V
    return -(weight_V * advantage_V) @ score_VV


def reward(state: State) -> torch.Tensor:
    return state.teacher_logprobs_V - state.student_logits_V.log_softmax(-1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- reward clipping


@pytest.mark.parametrize(("clip_lambda", "floor"), [(0.1, -2.5584), (0.5, -1.3863), (0.999999, -1.0)])
def test_the_floor_of_a_reward_is_log_lambda_over_one_minus_lambda(clip_lambda, floor):
    assert reward_floor(clip_lambda) == pytest.approx(floor, abs=1e-4)
    assert reward_floor(None) is None


@sampled
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("baseline", [None, "none"])
def test_a_clipped_reward_gives_the_policy_gradient_of_the_clipped_reward(objective, tail, baseline):
    """Unbiased for that, whatever the baseline, and biased for the KL."""
    floor = reward_floor(0.6)
    for seed in SEEDS:
        for support_size in (0, 2, 5, 7):
            state = random_state(seed, support_size)
            gradient_YV = gradient_of_every_token(
                objective, state, tail=tail, baseline=baseline, shaping=Shaping(reward_floor=floor)
            )
            assert (reward(state) < floor).any()
            assert_close(expectation(state, gradient_YV), policy_gradient(state, reward(state).clamp_min(floor)))
            assert float((expectation(state, gradient_YV) - exact_gradient(state)).abs().max()) > 1e-3


def test_a_floor_that_no_reward_reaches_changes_nothing():
    state = random_state(0, 3)
    for objective in SAMPLED:
        assert torch.equal(
            gradient_of_every_token(objective, state, shaping=Shaping(reward_floor=-1e3)),
            gradient_of_every_token(objective, state),
        )


# ---------------------------------------------------------------- advantage clipping


@pytest.mark.parametrize("objective", ["opd", "vopd", "vopd-rb"])
def test_a_clipped_advantage_gives_the_policy_gradient_of_the_clipped_advantage(objective):
    """The exact sum over the support is clipped as the samples are: vopd-rb has the expectation of vopd."""
    for seed in SEEDS:
        for support_size in (0, 2, 5):
            state = random_state(seed, support_size)
            student, batch, _ = batch_of_every_token(state)
            baseline = "none" if objective == "opd" else "kl"
            value = float(compute_loss("vopd", student, batch).sums["baseline"]) / len(state.sampled_ids)
            advantage_V = (reward(state) - (0.0 if objective == "opd" else value)).clamp(-0.4, 0.4)
            gradient_YV = gradient_of_every_token(
                objective, state, baseline=baseline, shaping=Shaping(advantage_clip=0.4)
            )
            assert_close(expectation(state, gradient_YV), policy_gradient(state, advantage_V))


def test_a_clipped_advantage_makes_the_result_depend_on_the_baseline():
    """What it costs: without the clip any baseline gives the same expectation."""
    state = random_state(0, 3)

    def mean_gradient(baseline: str, shaping: Shaping) -> torch.Tensor:
        return expectation(state, gradient_of_every_token("vopd", state, baseline=baseline, shaping=shaping))

    assert_close(mean_gradient("kl", NO_SHAPING), mean_gradient("none", NO_SHAPING))
    clip = Shaping(advantage_clip=0.4)
    assert float((mean_gradient("kl", clip) - mean_gradient("none", clip)).abs().max()) > 1e-3


# ---------------------------------------------------------------- importance weights


def older_student(seed: int, num_ids: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(num_ids, generator=generator, dtype=torch.float64).log_softmax(-1)


@sampled
@pytest.mark.parametrize("baseline", [None, "none"])
def test_importance_weights_undo_that_an_older_student_sampled(objective, baseline):
    """y ~ pi_then; the exact sum over the support of vopd-rb is no sample and carries no weight."""
    for seed in SEEDS:
        for support_size in (0, 2, 5, 7):
            state, then_V = random_state(seed, support_size), older_student(seed)
            gradient_YV = gradient_of_every_token(
                objective,
                state,
                baseline=baseline,
                shaping=Shaping(importance_cap=1e9),
                behaviour_logprobs_V=then_V,
            )
            assert_close(then_V.exp() @ gradient_YV, exact_gradient(state))
            plain_YV = gradient_of_every_token(objective, state, baseline=baseline, behaviour_logprobs_V=then_V)
            if support_size < 7 or objective != "vopd-rb":
                assert float((then_V.exp() @ plain_YV - exact_gradient(state)).abs().max()) > 1e-3


def test_a_truncated_weight_is_the_cap_and_gives_the_any_baseline_property_up():
    """E rho_c g = sum_v min(c pi_then, pi) (r - b) grad log pi; the weights no longer add up to pi."""
    for seed in SEEDS:
        state, then_V = random_state(seed, 3), older_student(seed)
        weight_V = torch.minimum(1.1 * then_V.exp(), state.pi_V)
        assert (weight_V < state.pi_V - 1e-3).any()
        shaping = Shaping(importance_cap=1.1)
        gradient_YV = gradient_of_every_token("opd", state, shaping=shaping, behaviour_logprobs_V=then_V)
        assert_close(then_V.exp() @ gradient_YV, policy_gradient(state, reward(state), weight_V))
        with_baseline_YV = gradient_of_every_token("vopd", state, shaping=shaping, behaviour_logprobs_V=then_V)
        assert float((then_V.exp() @ (gradient_YV - with_baseline_YV)).abs().max()) > 1e-4


def test_weights_and_the_share_that_was_truncated_are_reported():
    state, then_V = random_state(0, 3), older_student(0)
    student, batch, _ = batch_of_every_token(state, behaviour_logprobs_V=then_V)
    sums = compute_loss("vopd", student, batch, shaping=Shaping(importance_cap=1.1)).sums
    ratio_V = (state.student_logits_V.log_softmax(-1) - then_V).exp()
    metrics = mean_metrics({name: float(value) for name, value in sums.items()}, 7)
    assert metrics["importance_truncated_fraction"] == pytest.approx(float((ratio_V >= 1.1).double().mean()))
    assert metrics["importance_weight_mean"] == pytest.approx(float(ratio_V.clamp_max(1.1).mean()))


def test_nothing_is_reported_of_what_is_off():
    student, batch, _ = batch_of_every_token(random_state(0, 3))
    sums = compute_loss("vopd", student, batch).sums
    assert not [name for name in sums if "clipped" in name or "importance" in name]


def test_what_was_clipped_is_counted_at_the_sampled_tokens():
    state = random_state(0, 3)
    student, batch, _ = batch_of_every_token(state)
    sums = compute_loss("opd", student, batch, shaping=Shaping(reward_floor=-0.5, advantage_clip=0.3)).sums
    assert float(sums["reward_clipped"]) == float((reward(state) < -0.5).sum())
    assert float(sums["advantage_clipped"]) == float((reward(state).clamp_min(-0.5).abs() > 0.3).sum())


# ---------------------------------------------------------------- task rewards


@pytest.mark.parametrize("objective", ["opd", "vopd", "vopd-rb", "vopd-full", "topk-kl", "full-kl"])
def test_a_task_advantage_adds_its_policy_gradient_for_tokens_inside_and_outside_the_support(objective):
    for seed in SEEDS:
        for support_size in (2, 7):
            state = random_state(seed, support_size)
            task_V = torch.linspace(-1, 2, 7, dtype=torch.float64)
            with_task_YV = gradient_of_every_token(
                objective, state, task_advantage_of=lambda token_id, task_V=task_V: float(task_V[token_id])
            )
            added_YV = with_task_YV - gradient_of_every_token(objective, state)
            torch.testing.assert_close(expectation(state, added_YV), policy_gradient(state, task_V), rtol=0, atol=1e-6)


def test_a_task_advantage_of_a_stale_rollout_carries_its_weight():
    state, then_V = random_state(0, 3), older_student(0)
    choices = {"shaping": Shaping(importance_cap=1e9), "behaviour_logprobs_V": then_V}
    with_task_YV = gradient_of_every_token("vopd-rb", state, task_advantage_of=lambda token_id: token_id, **choices)
    added_YV = with_task_YV - gradient_of_every_token("vopd-rb", state, **choices)
    expected_V = policy_gradient(state, torch.arange(7, dtype=torch.float64))
    torch.testing.assert_close(then_V.exp() @ added_YV, expected_V, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what goes together


@pytest.mark.parametrize("objective", ["topk-kl", "full-kl"])
@pytest.mark.parametrize(
    ("shaping", "message"),
    [
        (Shaping(reward_floor=-1.0), "reward clipping does not go with objective"),
        (Shaping(advantage_clip=1.0), "advantage clipping does not go with objective"),
        (Shaping(importance_cap=2.0), "importance weights do not go with objective"),
    ],
)
def test_a_differentiated_divergence_has_nothing_to_shape(objective, shaping, message):
    with pytest.raises(ConfigError, match=message):
        check_shaping(objective, shaping, has_task_reward=False)


def test_a_task_reward_gives_a_differentiated_divergence_a_sampled_term_to_weigh():
    check_shaping("full-kl", Shaping(importance_cap=2.0), has_task_reward=True)


@sampled
def test_every_sampled_objective_takes_every_shaping(objective):
    check_shaping(objective, Shaping(-1.0, 1.0, 2.0), has_task_reward=False)


def test_the_weight_of_an_impossible_ratio_is_the_cap():
    weights = Shaping(importance_cap=2.0).importance_weights(torch.tensor([0.0]), torch.tensor([-200.0]))
    assert float(weights) == pytest.approx(2.0)
    assert math.isfinite(float(weights))
