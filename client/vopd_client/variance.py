"""How noisy each estimator is at a position, in closed form: no sampling, the whole distributions at hand.

Axes: N positions, K support size, V vocabulary, the ids that both sides have. Natural log, nats. Every function
works on [N, V] arrays elementwise, so nothing grows beyond a few of those; give large vocabularies in float64 by
blocks of positions.

Notation: pi the student, q the teacher, r = log q - log pi, s(v) = e_v - pi the gradient of log pi(v) with respect
to the logits, w(v) = |s(v)|^2 = 1 - 2 pi(v) + sum pi^2. An estimator is a function g(y) of the sampled token y; its
variance is the trace of its covariance, E|g|^2 - |E g|^2, in nats squared.

Source: the estimators are those of losses.py; arXiv 2605.07865 for opd and vopd, docs/method.md for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vopd_client.baselines import (
    SupportLogprobs,
    bucket_reverse_kl,
    inner_optimal_baseline,
    inner_reverse_kl,
    optimal_baseline,
    renormalised_reverse_kl,
    tail_log_ratio,
)
from vopd_client.errors import NonFiniteError
from vopd_client.linear_logprobs import gather_masked


@dataclass(frozen=True)
class Distributions:
    """What every formula needs of student and teacher at N positions; r is 0 where the student gives no mass."""

    pi_NV: Tensor
    reward_NV: Tensor
    score_norm_NV: Tensor  # w

    @classmethod
    def from_logprobs(cls, student_NV: Tensor, teacher_NV: Tensor) -> Distributions:
        """Raises: NonFiniteError where the teacher lacks an id the student gives mass to: variances are infinite."""
        has_mass_NV = student_NV > -torch.inf
        reward_NV = torch.where(has_mass_NV, teacher_NV - student_NV, 0.0)
        is_finite_NV = reward_NV.isfinite()
        if not bool(is_finite_NV.all()):
            position, token_id = (int(index) for index in (~is_finite_NV).nonzero()[0])
            raise NonFiniteError(
                f"log q - log pi is {float(reward_NV[position, token_id])} at position {position}, id {token_id}"
            )
        pi_NV = student_NV.exp()
        sum_pi_squared_N1 = pi_NV.square().sum(-1, keepdim=True)
        return cls(pi_NV, reward_NV, (1 - 2 * pi_NV + sum_pi_squared_N1).clamp_min(0))


def sampled_variance(distributions: Distributions, baseline_N: Tensor | float) -> Tensor:
    """Of opd, vopd and vopd-full: g(y) = (r(y) - b) s(y), [N].

    E|g|^2 = sum pi w (r - b)^2, and E g = pi (r - E_pi r) whatever b is.
    """
    nothing_NV = torch.zeros_like(distributions.pi_NV, dtype=torch.bool)
    return rao_blackwellised_variance(distributions, nothing_NV, baseline_N)


def rao_blackwellised_variance(distributions: Distributions, inside_NV: Tensor, baseline_N: Tensor | float) -> Tensor:
    """Of vopd-rb: g(y) = (a constant, exact over S) + 1[y not in S] (r(y) - b) s(y), [N].

    inside_NV: bool, v in S. With h(v) = 1[v not in S] pi(v) (r(v) - b), the random part has E|.|^2 = sum h w (r - b)
    and the mean h - pi sum(h).
    """
    pi_NV, score_norm_NV = distributions.pi_NV, distributions.score_norm_NV
    baseline_N1 = torch.as_tensor(baseline_N, dtype=pi_NV.dtype, device=pi_NV.device).reshape(-1, 1)
    advantage_NV = distributions.reward_NV - baseline_N1
    outside_NV = torch.where(inside_NV, 0.0, pi_NV * advantage_NV)
    second_moment_N = (outside_NV * advantage_NV * score_norm_NV).sum(-1)
    mean_NV = outside_NV - pi_NV * outside_NV.sum(-1, keepdim=True)
    return (second_moment_N - mean_NV.square().sum(-1)).clamp_min(0)


def rao_blackwellised_best_baseline(distributions: Distributions, inside_NV: Tensor) -> Tensor:
    """b_rb, [N], of least variance for vopd-rb; needs r outside S, which a student does not have while training.

    b_rb = (sum_{not S} pi w r - A.C) / (sum_{not S} pi w - |C|^2), A = sum_{not S} pi r s, C = sum_{not S} pi s.
    Where nothing is outside S every b is as good, and 0 is returned.
    """
    pi_NV, reward_NV = distributions.pi_NV, distributions.reward_NV
    outside_NV = torch.where(inside_NV, 0.0, pi_NV)
    rewarded_NV = outside_NV * reward_NV
    a_NV = rewarded_NV - pi_NV * rewarded_NV.sum(-1, keepdim=True)
    c_NV = outside_NV - pi_NV * outside_NV.sum(-1, keepdim=True)
    numerator_N = (rewarded_NV * distributions.score_norm_NV).sum(-1) - (a_NV * c_NV).sum(-1)
    denominator_N = (outside_NV * distributions.score_norm_NV).sum(-1) - c_NV.square().sum(-1)
    is_known_N = denominator_N > torch.finfo(pi_NV.dtype).eps ** 2
    return torch.where(is_known_N, numerator_N / torch.where(is_known_N, denominator_N, 1.0), 0.0)


def estimator_variances(
    student_NV: Tensor, teacher_NV: Tensor, support_ids_NK: Tensor, support_mask_NK: Tensor
) -> dict[str, Tensor]:
    """The variance of every estimator of losses.py at every position, [N] each.

    Args:
        student_NV, teacher_NV: log-probabilities over the same ids, float64 for figures to be quoted.
        support_ids_NK, support_mask_NK: S, which must not depend on a sampled token.

    Returns: "opd", "vopd-full {kl, optimal}", "vopd {renormalise, bucket, optimal}" and "vopd-rb {none, renormalise,
        bucket, optimal, tail, best}". Here "tail" is b = r_tail, and "best" is b_rb, which no training run can know:
        its distance to "vopd-rb optimal" is what the default b = b* gives away.
    Raises: NonFiniteError where the teacher lacks an id the student gives mass to.
    """
    distributions = Distributions.from_logprobs(student_NV, teacher_NV)
    pi_NV = distributions.pi_NV
    sum_pi_squared_N = pi_NV.square().sum(-1)
    support = SupportLogprobs(
        gather_masked(student_NV, support_ids_NK, support_mask_NK),
        gather_masked(teacher_NV, support_ids_NK, support_mask_NK),
        support_mask_NK,
    )
    everything = SupportLogprobs(student_NV, teacher_NV, pi_NV > 0)
    baselines: dict[str, Tensor | float] = {
        "none": 0.0,
        "renormalise": -renormalised_reverse_kl(support),
        "bucket": -bucket_reverse_kl(support),
        "optimal": optimal_baseline(support, sum_pi_squared_N),
    }
    inside_NV = membership(support_ids_NK, support_mask_NK, num_ids=student_NV.shape[-1])
    sampled = {
        f"vopd {name}": sampled_variance(distributions, baseline_N)
        for name, baseline_N in baselines.items()
        if name != "none"
    }
    baselines["tail"] = tail_log_ratio(support)
    baselines["best"] = rao_blackwellised_best_baseline(distributions, inside_NV)
    rb = {
        f"vopd-rb {name}": rao_blackwellised_variance(distributions, inside_NV, baseline_N)
        for name, baseline_N in baselines.items()
    }
    return {
        "opd": sampled_variance(distributions, 0.0),
        "vopd-full kl": sampled_variance(distributions, -inner_reverse_kl(everything)),
        "vopd-full optimal": sampled_variance(distributions, inner_optimal_baseline(everything, sum_pi_squared_N)),
        **sampled,
        **rb,
    }


def membership(support_ids_NK: Tensor, support_mask_NK: Tensor, *, num_ids: int) -> Tensor:
    """v in S for every id, [N, num_ids] bool."""
    # Column num_ids takes the padding in, then goes.
    ids_NK = torch.where(support_mask_NK, support_ids_NK, num_ids)
    inside_NV = torch.zeros(len(ids_NK), num_ids + 1, dtype=torch.bool, device=ids_NK.device)
    return inside_NV.scatter(-1, ids_NK, True)[:, :num_ids]


def squared_gradient_norm(distributions: Distributions) -> Tensor:
    """|grad KL(pi || q)|^2 with respect to the logits, [N]: the signal that the variances are the noise of."""
    pi_NV, reward_NV = distributions.pi_NV, distributions.reward_NV
    return (pi_NV * (reward_NV - (pi_NV * reward_NV).sum(-1, keepdim=True))).square().sum(-1)
