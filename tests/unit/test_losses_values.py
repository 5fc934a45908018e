"""What the losses compute, against transcriptions of the formulas that share no code with them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from enumeration import EVERY_SAMPLED_ESTIMATOR, State, batch_of_every_token, gradient_of_every_token, random_state
from vopd_client.baselines import (
    SupportLogprobs,
    bucket_reverse_kl,
    choose_baseline,
    inner_optimal_baseline,
    optimal_baseline,
    renormalised_reverse_kl,
    tail_log_ratio,
    tail_mass,
)
from vopd_client.errors import ConfigError
from vopd_client.losses import compute_loss, mean_metrics, sampled_surrogate


def support_of(state: State) -> SupportLogprobs:
    ids = list(state.support_ids)
    student_V = state.student_logits_V.log_softmax(-1)
    return SupportLogprobs(student_V[ids], state.teacher_logprobs_V[ids], torch.ones(len(ids), dtype=torch.bool))


def sum_pi_squared(state: State) -> torch.Tensor:
    return state.pi_V.square().sum()


def papers_value(pi: dict[int, float], q: dict[int, float], support: list[int]) -> float:
    """Vk of arXiv 2605.07865 as it is written: both sides renormalised over S, then minus the reverse KL."""
    student_sum = sum(pi[v] for v in support)
    teacher_sum = sum(q[v] for v in support)
    value = 0.0
    for v in support:
        student = pi[v] / student_sum
        teacher = q[v] / teacher_sum
        value -= student * (np.log(student) - np.log(teacher))
    return value


@pytest.mark.parametrize("support_size", range(1, 8))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_baseline_of_vopd_is_the_papers_value(seed, support_size):
    state = random_state(seed, support_size)
    pi = dict(enumerate(state.pi_V.numpy()))
    q = dict(enumerate(state.teacher_logprobs_V.exp().numpy()))
    expected = papers_value(pi, q, list(state.support_ids))
    assert sums_when_sampled("vopd", state, 0, "renormalise", None)["baseline"] == pytest.approx(expected, abs=1e-12)


def test_the_bucket_is_the_divergence_of_distributions_whose_tail_is_one_token():
    for seed in (0, 1, 2):
        for support_size in range(7):
            state = random_state(seed, support_size)
            ids, tail = list(state.support_ids), [v for v in range(7) if v not in state.support_ids]
            q_V = state.teacher_logprobs_V.exp()
            pi = torch.cat([state.pi_V[ids], state.pi_V[tail].sum()[None]])
            q = torch.cat([q_V[ids], q_V[tail].sum()[None]])
            expected = float((pi * (pi.log() - q.log())).sum())
            assert float(bucket_reverse_kl(support_of(state))) == pytest.approx(expected, abs=1e-12)


def test_the_optimal_baseline_is_the_weighted_mean_with_the_tail_as_one_log_ratio():
    for seed in (0, 1, 2):
        for support_size in range(7):
            state = random_state(seed, support_size)
            pi, q = state.pi_V.numpy(), state.teacher_logprobs_V.exp().numpy()
            weight = 1 - 2 * pi + (pi**2).sum()
            tail = [v for v in range(7) if v not in state.support_ids]
            reward = np.log(q) - np.log(pi)
            reward[tail] = np.log(q[tail].sum()) - np.log(pi[tail].sum())
            expected = (pi * weight * reward).sum() / (pi * weight).sum()
            actual = optimal_baseline(support_of(state), sum_pi_squared(state))
            assert float(actual) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_certainty", [-1e-3, -1e-6, -1e-9, -1e-12, -1e-20, 0.0])
def test_the_optimal_baseline_stays_between_the_log_ratios_of_a_certain_student(dtype, log_certainty):
    """All weights are then as small as their rounding."""
    student = torch.tensor([log_certainty, -40.0], dtype=dtype)
    teacher = torch.tensor([-0.7, -3.0], dtype=dtype)
    support = SupportLogprobs(student, teacher, torch.ones(2, dtype=torch.bool))
    baseline = float(optimal_baseline(support, student.exp().square().sum()))
    largest = max(37.0, -math.log(torch.finfo(dtype).eps))
    assert -largest <= baseline <= largest


def test_a_weight_that_rounding_made_negative_does_not_throw_the_optimal_baseline_out_of_range():
    """pi = 1 and sum pi^2 one bit less: w = -6e-8, where a squared norm is meant."""
    support = SupportLogprobs(torch.zeros(1), torch.tensor([-0.7]), torch.ones(1, dtype=torch.bool))
    baseline = float(optimal_baseline(support, torch.tensor(1 - 2**-24)))
    assert -0.7 <= baseline <= float(tail_log_ratio(support))


@pytest.mark.parametrize("baseline_of", [optimal_baseline, inner_optimal_baseline])
def test_the_optimal_baseline_of_a_student_without_any_doubt_is_zero(baseline_of):
    """Every weight is 0, and 0 / 0 must not be NaN."""
    support = SupportLogprobs(torch.zeros(1), torch.tensor([-0.7]), torch.ones(1, dtype=torch.bool))
    assert float(baseline_of(support, torch.tensor(1.0))) == 0.0


def test_an_advantage_is_a_constant_to_the_surrogate():
    logprobs, advantage = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)
    sampled_surrogate(logprobs, advantage).sum().backward()
    assert logprobs.grad.tolist() == [-3.0, -5.0]
    assert advantage.grad is None


def test_a_tail_mass_keeps_its_digits_when_it_is_large_and_its_sign_when_it_is_small():
    logprobs = torch.tensor([[-20.0], [0.0], [1e-6]])
    mass = tail_mass(logprobs, torch.ones_like(logprobs, dtype=torch.bool))
    epsilon = torch.finfo(torch.float32).eps
    assert mass.tolist() == [pytest.approx(1 - math.exp(-20), rel=1e-7), epsilon, epsilon]


def test_a_teacher_that_gives_the_support_next_to_nothing_has_a_finite_value():
    """q(S) underflows in float32; the renormalised divergence does not depend on it."""
    student = torch.tensor([-0.2, -2.0])
    support = SupportLogprobs(student, torch.tensor([-500.0, -501.0]), torch.ones(2, dtype=torch.bool))
    shifted = SupportLogprobs(student, torch.tensor([-1.0, -2.0]), torch.ones(2, dtype=torch.bool))
    assert float(renormalised_reverse_kl(support)) == pytest.approx(float(renormalised_reverse_kl(shifted)), abs=1e-4)
    assert math.isfinite(float(bucket_reverse_kl(support)))


@pytest.mark.parametrize(("objective", "tail", "baseline"), EVERY_SAMPLED_ESTIMATOR)
def test_reported_sums_agree_with_the_distributions(objective, tail, baseline):
    """reverse_kl is exact in expectation over y, for every objective and support."""
    for support_size in (0, 3, 7):
        state = random_state(0, support_size)
        student_V = state.student_logits_V.log_softmax(-1)
        exact_kl = float((student_V.exp() * (student_V - state.teacher_logprobs_V)).sum())
        expected_kl = 0.0
        for token_id in range(7):
            sums = sums_when_sampled(objective, state, token_id, tail, baseline)
            reward = float(state.teacher_logprobs_V[token_id] - student_V[token_id])
            assert sums["reward"] == pytest.approx(reward)
            assert sums["advantage"] == pytest.approx(reward - sums["baseline"])
            assert sums["advantage_squared"] == pytest.approx((reward - sums["baseline"]) ** 2)
            expected_kl += float(state.pi_V[token_id]) * sums["reverse_kl"]
        assert expected_kl == pytest.approx(exact_kl, abs=1e-9)
        ids = list(range(7)) if objective == "vopd-full" else list(state.support_ids)
        assert sums["support_size"] == len(ids)
        assert sums["left_out_mass"] == pytest.approx(1 - float(state.pi_V[ids].sum()), abs=1e-9)


def sums_when_sampled(objective, state, token_id, tail, baseline) -> dict[str, float]:
    """The sums of a batch whose only valid position is the one where `token_id` was sampled."""
    student, batch, _ = batch_of_every_token(state, objective=objective)
    only_BT = torch.zeros_like(batch.loss_mask_BT)
    only_BT[token_id] = True
    output = compute_loss(objective, student, replace(batch, loss_mask_BT=only_BT), tail=tail, baseline=baseline)
    return {name: float(value) for name, value in output.sums.items()}


def test_metrics_are_means_over_tokens_and_the_deviation_of_the_advantage():
    advantages = [1.0, 2.0, 6.0]
    sums = {
        "reverse_kl": 1.5,
        "reward": -3.0,
        "baseline": -12.0,
        "advantage": sum(advantages),
        "advantage_squared": sum(value**2 for value in advantages),
        "left_out_mass": 0.3,
        "support_size": 12.0,
        "variance": 0.75,
        "opd_variance": 3.0,
    }
    assert mean_metrics(sums, 3) == pytest.approx(
        {
            "kl_nats": 0.5,
            "reward_nats": -1.0,
            "baseline_nats": -4.0,
            "advantage_std": float(np.std(advantages)),
            "left_out_mass_mean": 0.1,
            "support_size_mean": 4.0,
            "variance": 0.25,
            "variance_over_opd": 0.25,
        }
    )


def test_defaults_are_those_of_the_objectives():
    assert [choose_baseline(name, None) for name in ("opd", "vopd", "vopd-rb", "vopd-full", "topk-kl", "full-kl")] == [
        "none",
        "kl",
        "optimal",
        "kl",
        "none",
        "none",
    ]


@pytest.mark.parametrize(
    ("objective", "baseline", "message"),
    [
        ("opd", "kl", "with one it is called vopd"),
        ("opd", "optimal", "baseline optimal goes with vopd, vopd-rb, vopd-full"),
        ("topk-kl", "kl", "no sampled term"),
        ("full-kl", "optimal", "full-kl takes baseline none"),
    ],
)
def test_a_baseline_that_makes_no_sense_is_refused_with_those_that_do(objective, baseline, message):
    with pytest.raises(ConfigError, match=message):
        gradient_of_every_token(objective, random_state(0, 2), baseline=baseline)
