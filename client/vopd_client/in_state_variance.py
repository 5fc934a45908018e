"""How noisy a run's own gradient is at the states it visits, from the numbers that training has anyway.

Axes: B sequences, T completion tokens, K support size. Natural log; variances in nats^2.

Notation: g(y) = a(y) s(y), the gradient of a position with respect to the logits; a the advantage (r - b, clipped
where it is to be), s(v) = e_v - pi the score, w(v) = |s(v)|^2 = 1 - 2 pi(v) + sum pi^2. The in-state variance is the
trace of the covariance of g over y ~ pi, E|g|^2 - |E g|^2.

pi on the support and sum pi^2 come from the student's own softmax over its whole vocabulary, so over the support both
terms are closed forms. Outside it a is known at the sampled token only, and that is enough for

    E|g|^2 = sum_S pi w a^2 + E_y 1[y not in S] w(y) a(y)^2,

of which one sample is unbiased: the mean over a step's tokens estimates the mean variance of the states without an
approximation of the tail's spread. |E g|^2 takes the tail as one bucket; its share is sum_{not S} pi^2 a^2, next to
nothing. Without any support it is left out, and the number is the second moment: the variance and the square of the
signal. `variance.py` computes the same from two whole distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vopd_client.baselines import SupportLogprobs, tail_mass


def in_state_variance(
    support: SupportLogprobs,
    sum_pi_squared_BT: Tensor,
    sampled_logprobs_BT: Tensor,
    sampled_inside_BT: Tensor,
    *,
    advantage_BT: Tensor,
    advantage_BTK: Tensor,
    tail_advantage_BT: Tensor,
    is_exact_inside: bool,
) -> Tensor:
    """[B, T]: at each position unbiased for its variance but for the bucket; single values may be negative.

    advantage_BT: at the sampled token. advantage_BTK: on the support. tail_advantage_BT: of the tail as one token.
    is_exact_inside: vopd-rb, whose sum over the support is no source of noise.
    """
    pi_BTK = support.probabilities_BTK
    sum_pi_squared_BT1 = sum_pi_squared_BT[..., None]
    pi_y_BT = sampled_logprobs_BT.detach().exp()
    score_norm_y_BT = (1 - 2 * pi_y_BT + sum_pi_squared_BT).clamp_min(0)
    second_moment_BT = torch.where(sampled_inside_BT, 0.0, score_norm_y_BT * advantage_BT.square())
    tail_pi_squared_BT = (sum_pi_squared_BT - pi_BTK.square().sum(-1)).clamp_min(0)
    # h = pi a over what is sampled, H its sum: E g = h - pi H.
    total_BT = tail_mass(support.student_BTK, support.mask_BTK) * tail_advantage_BT
    with_pi_BT = tail_pi_squared_BT * tail_advantage_BT
    with_itself_BT = tail_pi_squared_BT * tail_advantage_BT.square()
    if not is_exact_inside:
        weight_BTK = (1 - 2 * pi_BTK + sum_pi_squared_BT1).clamp_min(0)
        expected_BTK = torch.where(support.mask_BTK, pi_BTK * advantage_BTK, 0.0)
        second_moment_BT = second_moment_BT + (expected_BTK * advantage_BTK * weight_BTK).sum(-1)
        total_BT = total_BT + expected_BTK.sum(-1)
        with_pi_BT = with_pi_BT + (expected_BTK * pi_BTK).sum(-1)
        with_itself_BT = with_itself_BT + expected_BTK.square().sum(-1)
    squared_mean_BT = with_itself_BT - 2 * total_BT * with_pi_BT + total_BT.square() * sum_pi_squared_BT
    has_support_BT = support.mask_BTK.any(-1)
    return second_moment_BT - torch.where(has_support_BT, squared_mean_BT, 0.0)
