"""How noisy each estimator is at a position, in closed form: no sampling, the whole distributions at hand.

Axes: N positions, K support size, V vocabulary, the ids that both sides have. Natural log, nats. Nothing grows beyond
a few [N, V] arrays; give large vocabularies in float64 by blocks of positions.

Notation: pi the student, q the teacher, r = log q - log pi, s(v) = e_v - pi the gradient of log pi(v) with respect
to the logits, w(v) = |s(v)|^2 = 1 - 2 pi(v) + sum pi^2, S the support. An estimator is a function g(y) of the sampled
token y; its variance is the trace of its covariance, E|g|^2 - |E g|^2, in nats squared.

Every estimator's random part is 1[y not in S] (r(y) - b) s(y): vopd-rb's with its support, that of opd, vopd and
vopd-full with an empty S, whatever support their b comes from. Six sums over the ids outside S tell its variance for
every b.

Source: the estimators are those of losses.py; arXiv 2605.07865 for opd and vopd, docs/method.md for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vopd_client.baselines import (
    SupportLogprobs,
    bucket_reverse_kl,
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
    sum_pi_squared_N: Tensor

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
        return cls(pi_NV, reward_NV, _inner(pi_NV, pi_NV))


class Moments(NamedTuple):
    """Sums over the ids outside a support, [N] each, and what they tell about 1[y not in S] (r(y) - b) s(y)."""

    pi: Tensor  # sum pi
    pi_r: Tensor  # sum pi r
    pi_r2: Tensor  # sum pi r^2
    pi2: Tensor  # sum pi^2
    pi2_r: Tensor  # sum pi^2 r
    pi2_r2: Tensor  # sum pi^2 r^2
    sum_pi_squared: Tensor  # over the whole vocabulary

    def variance(self, baseline_N: Tensor | float) -> Tensor:
        """E|.|^2 - |E .|^2, [N], with E|.|^2 = sum pi w (r - b)^2."""
        b = baseline_N
        of_pi_N = self.pi_r2 - 2 * b * self.pi_r + b * b * self.pi
        of_pi2_N = self.pi2_r2 - 2 * b * self.pi2_r + b * b * self.pi2
        second_moment_N = (1 + self.sum_pi_squared) * of_pi_N - 2 * of_pi2_N
        return (second_moment_N - self.squared_mean(b)).clamp_min(0)

    def squared_mean(self, baseline_N: Tensor | float) -> Tensor:
        """|E .|^2, [N]. With h(v) = pi(v) (r(v) - b) outside S, else 0, and H its sum, E . = h - pi H."""
        b = baseline_N
        h_h_N = self.pi2_r2 - 2 * b * self.pi2_r + b * b * self.pi2
        h_pi_N = self.pi2_r - b * self.pi2
        sum_h_N = self.pi_r - b * self.pi
        return (h_h_N - 2 * sum_h_N * h_pi_N + sum_h_N * sum_h_N * self.sum_pi_squared).clamp_min(0)

    def best_baseline(self) -> Tensor:
        """The b of least variance, [N]; needs r outside S, which a student does not have while training.

        b = (sum pi w r - A.C) / (sum pi w - |C|^2), the sums over ids outside S, A = sum pi r s, C = sum pi s. With an
        empty S it is E[w r] / E[w]. Where what remains of the denominator is rounding noise (nothing outside S, a
        student that is certain) every b is as good, and 0 is returned.
        """
        norm = self.sum_pi_squared
        a_c_N = self.pi2_r * (1 - self.pi) - self.pi_r * self.pi2 + self.pi * self.pi_r * norm
        c_c_N = self.pi2 * (1 - 2 * self.pi) + self.pi.square() * norm
        numerator_N = (1 + norm) * self.pi_r - 2 * self.pi2_r - a_c_N
        denominator_N = (1 + norm) * self.pi - 2 * self.pi2 - c_c_N
        is_known_N = denominator_N > 16 * torch.finfo(self.pi.dtype).eps * self.pi
        return torch.where(is_known_N, numerator_N / torch.where(is_known_N, denominator_N, 1.0), 0.0)


def moments_outside(distributions: Distributions, support_ids_NK: Tensor, support_mask_NK: Tensor) -> Moments:
    """Columns outside support_mask_NK may hold any id; no id comes twice in a row."""
    inside_NK = gather_masked(distributions.pi_NV, support_ids_NK, support_mask_NK)
    safe_ids_NK = torch.where(support_mask_NK, support_ids_NK, 0)
    # x - x is exactly 0, and padding takes 0 from id 0.
    return _moments(distributions.pi_NV.scatter_add(-1, safe_ids_NK, -inside_NK), distributions)


def moments_of_everything(distributions: Distributions) -> Moments:
    """Outside an empty support."""
    return _moments(distributions.pi_NV, distributions)


def _moments(pi_outside_NV: Tensor, distributions: Distributions) -> Moments:
    pi_r_NV = pi_outside_NV * distributions.reward_NV
    return Moments(
        pi=pi_outside_NV.sum(-1),
        pi_r=pi_r_NV.sum(-1),
        pi_r2=_inner(pi_r_NV, distributions.reward_NV),
        pi2=_inner(pi_outside_NV, pi_outside_NV),
        pi2_r=_inner(pi_outside_NV, pi_r_NV),
        pi2_r2=_inner(pi_r_NV, pi_r_NV),
        sum_pi_squared=distributions.sum_pi_squared_N,
    )


def sampled_variance(distributions: Distributions, baseline_N: Tensor | float) -> Tensor:
    """Of opd, vopd and vopd-full: g(y) = (r(y) - b) s(y), [N]."""
    return moments_of_everything(distributions).variance(baseline_N)


def estimator_variances(
    student_NV: Tensor, teacher_NV: Tensor, support_ids_NK: Tensor, support_mask_NK: Tensor
) -> dict[str, Tensor]:
    """The variance of every estimator of losses.py at every position, [N] each.

    Args:
        student_NV, teacher_NV: log-probabilities over the same ids, float64 for figures to be quoted.
        support_ids_NK, support_mask_NK: S, which must not depend on a sampled token.

    Returns: what `variances_without_support` and `variances_of_support` return.
    Raises: NonFiniteError where the teacher lacks an id the student gives mass to.
    """
    distributions = Distributions.from_logprobs(student_NV, teacher_NV)
    everything = moments_of_everything(distributions)
    support = SupportLogprobs(
        gather_masked(student_NV, support_ids_NK, support_mask_NK),
        gather_masked(teacher_NV, support_ids_NK, support_mask_NK),
        support_mask_NK,
    )
    outside = moments_outside(distributions, support_ids_NK, support_mask_NK)
    return {**variances_without_support(everything), **variances_of_support(everything, outside, support)}


def variances_without_support(everything: Moments) -> dict[str, Tensor]:
    """Of "opd" and "vopd-full {kl, optimal}". everything: outside an empty support."""
    return {
        "opd": everything.variance(0.0),
        "vopd-full kl": everything.variance(everything.pi_r),
        "vopd-full optimal": everything.variance(everything.best_baseline()),
    }


def variances_of_support(everything: Moments, outside: Moments, support: SupportLogprobs) -> dict[str, Tensor]:
    """Of "vopd {renormalise, bucket, optimal}" and "vopd-rb {none, renormalise, bucket, optimal, tail, best}".

    Here "tail" is b = r_tail, and "best" is b_rb, which no training run can know: its distance to "vopd-rb optimal"
    is what the default b = b* gives away.

    Args: everything, outside: outside an empty support and outside this one.
    """
    baselines: dict[str, Tensor | float] = {
        "none": 0.0,
        "renormalise": -renormalised_reverse_kl(support),
        "bucket": -bucket_reverse_kl(support),
        "optimal": optimal_baseline(support, everything.sum_pi_squared),
    }
    sampled = {
        f"vopd {name}": everything.variance(baseline_N) for name, baseline_N in baselines.items() if name != "none"
    }
    baselines["tail"] = tail_log_ratio(support)
    baselines["best"] = outside.best_baseline()
    return sampled | {f"vopd-rb {name}": outside.variance(baseline_N) for name, baseline_N in baselines.items()}


def squared_gradient_norm(distributions: Distributions) -> Tensor:
    """|grad KL(pi || q)|^2 with respect to the logits, [N]: the signal that the variances are the noise of."""
    return moments_of_everything(distributions).squared_mean(0.0)


def _inner(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    """[N] inner products of rows, without an array of their products."""
    return torch.bmm(left_NV[:, None, :], right_NV[:, :, None])[:, 0, 0]
