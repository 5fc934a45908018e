"""What a support says of KL(pi || q) at a position: values and baselines, none of which sees the sampled token.

Axes: B sequences, T completion tokens, K support size. Every function reduces the last axis and keeps the
others, so [N, K] and [K] do as well as [B, T, K]. Natural log, nats.

Notation: pi the student, q the teacher, S the support, r(v) = log q(v) - log pi(v),
w(v) = 1 - 2 pi(v) + sum_V pi^2 the squared norm of the logit-space score e_v - pi.

Source: Oh et al., "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865.
Departures: the tail as one bucket and the variance-optimal baseline b* are ours (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vopd_client.config import Objective
from vopd_client.errors import ConfigError

Tail = Literal["bucket", "renormalise"]
Baseline = Literal["kl", "optimal", "none"]

# What each objective can be combined with; the first one is its default.
_BASELINES: dict[Objective, tuple[Baseline, ...]] = {
    "opd": ("none",),
    "vopd": ("kl", "optimal", "none"),
    "vopd-rb": ("optimal", "kl", "none"),
    "vopd-full": ("kl", "optimal", "none"),
    "topk-kl": ("none",),
    "full-kl": ("none",),
}


def choose_baseline(objective: Objective, baseline: Baseline | None) -> Baseline:
    """The baseline that `objective` runs with; None asks for its default.

    Raises: ConfigError for an objective that there is not, and a combination that makes no sense; it says which do.
    """
    if objective not in _BASELINES:  # of code that no type checker has seen
        raise ConfigError(f"objective {objective!r}: there are {', '.join(_BASELINES)}")
    allowed = _BASELINES[objective]
    if baseline is None:
        return allowed[0]
    if baseline in allowed:
        return baseline
    if objective == "opd":
        reason = "opd asks the teacher for nothing a baseline could be made of; with one it is called vopd"
    else:
        reason = f"{objective} differentiates a divergence and has no sampled term to subtract a baseline from"
    takers = [name for name, choices in _BASELINES.items() if baseline in choices]
    raise ConfigError(
        f"baseline {baseline} does not go with objective {objective}: {reason}. "
        f"Objective {objective} takes baseline {', '.join(allowed)}; baseline {baseline} goes with {', '.join(takers)}"
    )


@dataclass(frozen=True)
class SupportLogprobs:
    """Both sides' log-probabilities on the support, over their full vocabularies. False in the mask: not in S.

    What lies outside the mask is never looked at, not even by a gradient; inside it everything is finite.
    reward_floor: every log-ratio, the tail's included, is cut from below here, in nats; None: it is not.
    """

    student_BTK: Tensor
    teacher_BTK: Tensor
    mask_BTK: Tensor  # bool
    reward_floor: float | None = None

    def detached(self) -> SupportLogprobs:
        return replace(self, student_BTK=self.student_BTK.detach(), teacher_BTK=self.teacher_BTK.detach())

    def cut(self, reward: Tensor) -> Tensor:
        """A reward as the objective is given it."""
        return reward if self.reward_floor is None else reward.clamp_min(self.reward_floor)

    @property
    def probabilities_BTK(self) -> Tensor:
        """pi on S, 0 elsewhere."""
        return _where(self.mask_BTK, _where(self.mask_BTK, self.student_BTK).exp())

    @property
    def reward_BTK(self) -> Tensor:
        """r on S, 0 elsewhere."""
        return _where(self.mask_BTK, self.cut(self.teacher_BTK - self.student_BTK))


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """`values` where `mask`, else 0, with a gradient of exactly 0 there whatever the values are."""
    return torch.where(mask, values, 0.0)


def log_mass(logprobs_BTK: Tensor, mask_BTK: Tensor) -> Tensor:
    """log of the probability inside the support, [B, T]; -inf, with gradient 0, where the support is empty."""
    is_empty_BT = ~mask_BTK.any(-1)
    # log-sum-exp of a row of -inf has the gradient NaN, so an empty row is summed over zeros and then replaced.
    filled_BTK = torch.where(mask_BTK, logprobs_BTK, -torch.inf)
    filled_BTK = torch.where(is_empty_BT[..., None], torch.zeros_like(filled_BTK), filled_BTK)
    return torch.where(is_empty_BT, -torch.inf, torch.logsumexp(filled_BTK, -1))


def tail_mass(logprobs_BTK: Tensor, mask_BTK: Tensor) -> Tensor:
    """The probability outside the support, [B, T], at least the dtype's epsilon.

    1 - p(S) is -expm1(log p(S)), which keeps its digits while p(S) is small. Near p(S) = 1 the sum of K rounded
    probabilities is itself uncertain by about one epsilon and may even exceed 1, so what is smaller than epsilon
    is noise, and its logarithm would be noise of any size or not a number. Clamping moves a baseline by at most
    epsilon * log(1/epsilon); and whatever it moves depends on the state alone, so no estimator becomes biased.
    """
    epsilon = torch.finfo(logprobs_BTK.dtype).eps
    return (-torch.expm1(log_mass(logprobs_BTK, mask_BTK))).clamp_min(epsilon)


def tail_log_ratio(support: SupportLogprobs) -> Tensor:
    """r_tail = log((1 - q(S)) / (1 - pi(S))), [B, T]: the log-ratio of everything outside S seen as one token."""
    teacher_tail_BT = tail_mass(support.teacher_BTK, support.mask_BTK)
    student_tail_BT = tail_mass(support.student_BTK, support.mask_BTK)
    return support.cut(teacher_tail_BT.log() - student_tail_BT.log())


def renormalised_reverse_kl(support: SupportLogprobs) -> Tensor:
    """KL(pi~ || q~) with both sides renormalised over S, [B, T]; 0 where S is empty. Minus this is the paper's Vk."""
    mask_BTK = support.mask_BTK
    log_pi_BTK = support.student_BTK - log_mass(support.student_BTK, mask_BTK)[..., None]
    log_q_BTK = support.teacher_BTK - log_mass(support.teacher_BTK, mask_BTK)[..., None]
    return inner_reverse_kl(replace(support, student_BTK=log_pi_BTK, teacher_BTK=log_q_BTK))


def bucket_reverse_kl(support: SupportLogprobs) -> Tensor:
    """KL of pi and q after everything outside S is put into one bucket, [B, T]; 0 where S is empty.

    -V_bucket = -sum_S pi r - (1 - pi(S)) r_tail. Never above the KL over the whole vocabulary.
    """
    student_tail_BT = tail_mass(support.student_BTK, support.mask_BTK)
    return inner_reverse_kl(support) - student_tail_BT * tail_log_ratio(support)


def inner_reverse_kl(support: SupportLogprobs) -> Tensor:
    """-sum_S pi r, [B, T]: KL(pi || q) itself where S is the whole vocabulary."""
    return -(support.probabilities_BTK * support.reward_BTK).sum(-1)


def support_reverse_kl(support: SupportLogprobs, tail: Tail) -> Tensor:
    """The divergence that K numbers a side can tell, [B, T]; differentiable in the student."""
    match tail:
        case "renormalise":
            return renormalised_reverse_kl(support)
        case "bucket":
            return bucket_reverse_kl(support)


def optimal_baseline(support: SupportLogprobs, sum_pi_squared_BT: Tensor) -> Tensor:
    """b* = (sum_S pi w r + (sum_{not S} pi w) r_tail) / sum_V pi w, [B, T]: least variance of a sampled estimator.

    sum_V pi w = 1 - 2 sum pi^2 + sum pi^2 = 1 - sum_V pi^2, so the weight outside S needs no logprob from there.
    The denominator is taken as the sum of the two weights used above it, so that b* stays a weighted mean of
    log-ratios, between their smallest and largest, even where the student is certain and every weight is noise.

    Args: sum_pi_squared_BT: sum over the student's whole vocabulary of pi^2.
    """
    weight_BTK = _score_weights(support, sum_pi_squared_BT)
    weight_inside_BT = weight_BTK.sum(-1)
    weight_tail_BT = (1 - sum_pi_squared_BT - weight_inside_BT).clamp_min(0)
    weighted_reward_BT = (weight_BTK * support.reward_BTK).sum(-1) + weight_tail_BT * tail_log_ratio(support)
    return _ratio(weighted_reward_BT, weight_inside_BT + weight_tail_BT)


def inner_optimal_baseline(support: SupportLogprobs, sum_pi_squared_BT: Tensor) -> Tensor:
    """sum_S pi w r / sum_S pi w, [B, T]: b* itself where S is the whole vocabulary, and good for nothing elsewhere."""
    weight_BTK = _score_weights(support, sum_pi_squared_BT)
    return _ratio((weight_BTK * support.reward_BTK).sum(-1), weight_BTK.sum(-1))


def _score_weights(support: SupportLogprobs, sum_pi_squared_BT: Tensor) -> Tensor:
    """pi w on S, 0 elsewhere; w is a squared norm, which rounding alone can make negative."""
    pi_BTK = support.probabilities_BTK
    return pi_BTK * (1 - 2 * pi_BTK + sum_pi_squared_BT[..., None]).clamp_min(0)


def _ratio(numerator_BT: Tensor, denominator_BT: Tensor) -> Tensor:
    """0 / 0 is 0: a student that is certain has no score to weigh, and any baseline does."""
    return numerator_BT / denominator_BT.clamp_min(torch.finfo(denominator_BT.dtype).tiny)
