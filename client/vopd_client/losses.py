"""The objectives, as functions on tensors: sums over the valid tokens of one microbatch, in nats.

Axes: B sequences, T completion tokens, K support size, V vocabulary (the ids that both sides have).
Row t belongs to completion token t. A loss is a SUM, never a mean: the trainer divides the gradients once, by the
number of valid tokens of the whole optimizer step, so that microbatches and ranks of unequal length weigh right.

Notation: pi the student, q the teacher, S the support, sg = stop-gradient; r(v) = log q(v) - log pi(v), the reward;
b a baseline that does not depend on the sampled token y. The gradient reaches the student only.

    opd        -sg(r(y)) log pi(y)
    vopd       -sg(r(y) - b) log pi(y)                      b from S, by default Vk = -KL(pi~ || q~)
    vopd-full  -sg(r(y) - b) log pi(y)                      b from the whole vocabulary, by default -KL(pi || q)
    vopd-rb    -sum_S sg(pi (r - b)) log pi - 1[y not in S] sg(r(y) - b) log pi(y)          by default b = b*
    topk-kl    KL(pi~ || q~) on S, differentiated           biased
    full-kl    KL(pi || q), differentiated                  no variance given the state

Source: Oh et al., "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865: opd, vopd,
vopd-full, topk-kl, full-kl. The sampled r(y) keeps full-vocabulary normalisation on both sides, as in the authors'
code. Departures, all ours: vopd-rb, tail = bucket, baseline = optimal, and dividing by the valid tokens of the whole
step. A temperature is applied to both sides' log-probabilities before they come here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

from vopd_client.baselines import (
    Baseline,
    SupportLogprobs,
    Tail,
    choose_baseline,
    inner_optimal_baseline,
    inner_reverse_kl,
    optimal_baseline,
    support_reverse_kl,
    tail_mass,
)
from vopd_client.config import FULL_VOCABULARY_OBJECTIVES, Objective
from vopd_client.errors import AlignmentError, ConfigError
from vopd_client.loss_inputs import LossInputs, read_inputs

if TYPE_CHECKING:
    from vopd_client.batch import Batch
    from vopd_client.student import StudentOutputs


@dataclass(frozen=True)
class LossOutput:
    """A loss and what it was made of, all of them sums over the valid tokens.

    loss_sum: scalar with a gradient.
    sums: detached scalars, by name:
        reverse_kl         -sum_S pi r - 1[y not in S] r(y): unbiased for KL(pi || q) whatever S is, -r(y) without a
                           support, exact over the whole vocabulary; so it means the same for every objective
        reward             r(y)
        baseline           b; 0 for an objective that has none
        advantage          r(y) - b
        advantage_squared  its square
        left_out_mass      1 - pi(S)
        support_size       ids in S
    """

    loss_sum: Tensor
    sums: dict[str, Tensor]


def compute_loss(
    objective: Objective,
    student: StudentOutputs,
    batch: Batch,
    *,
    tail: Tail = "renormalise",
    baseline: Baseline | None = None,
) -> LossOutput:
    """The objective's surrogate loss over one microbatch, whose gradient is the estimator of the table above.

    Computes in float32, or in float64 when the student's log-probabilities are. Positions outside the loss mask and
    columns outside the support mask are never looked at: their gradient is exactly zero whatever they hold.

    Args:
        student: sampled_logprobs_BT, support_logprobs_BTK, sum_pi_squared_BT; full_logprobs_BTV for the objectives
            over the whole vocabulary. Its float arrays may be of any float dtype.
        tail: what is outside S, for the value Vk and for topk-kl: left out and S renormalised (the paper), or put
            into one bucket. The optimal baseline always uses the bucket (without it, it can be worse than none),
            and where there is no support, or nothing outside it, there is no tail.
        baseline: None means the objective's default: none for opd, kl for vopd and vopd-full, optimal for vopd-rb.

    Raises:
        ConfigError: a baseline the objective cannot have, or no full log-probabilities where they are needed.
        NonFiniteError: a NaN or an infinity at a valid position; names the prompt and the position.
        AlignmentError: full log-probabilities of student and teacher over different numbers of ids.
    """
    baseline = choose_baseline(objective, baseline)
    if objective in FULL_VOCABULARY_OBJECTIVES:
        seen = read_inputs(student, batch, _whole_vocabulary(objective, student, batch), support_ids_BTK=None)
        sampled_inside_BT = torch.ones_like(batch.loss_mask_BT)
    else:
        seen = read_inputs(student, batch, _recorded_support(student, batch), batch.support_ids_BTK)
        sampled_inside_BT = sampled_token_in_support(
            batch.completion_ids_BT, batch.support_ids_BTK, seen.support.mask_BTK
        )
    tail_in_use = None if objective in FULL_VOCABULARY_OBJECTIVES else tail
    baseline_BT = _baseline(seen, baseline, tail_in_use)

    match objective:
        case "opd" | "vopd" | "vopd-full":
            loss_BT = sampled_surrogate(seen.sampled_logprobs_BT, seen.reward_BT - baseline_BT)
        case "vopd-rb":
            loss_BT = rao_blackwellised_surrogate(
                seen.sampled_logprobs_BT, seen.reward_BT, sampled_inside_BT, seen.support, baseline_BT
            )
        case "topk-kl":
            loss_BT = support_reverse_kl(seen.support, tail)
        case "full-kl":
            loss_BT = inner_reverse_kl(seen.support)
        case _:
            assert_never(objective)

    loss_sum = torch.where(batch.loss_mask_BT, loss_BT, 0.0).sum()
    return LossOutput(loss_sum, _sums(seen, sampled_inside_BT, baseline_BT, batch.loss_mask_BT))


def sampled_surrogate(sampled_logprobs_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    """-sg(advantage) log pi(y), [B, T]."""
    return -advantage_BT.detach() * sampled_logprobs_BT


def rao_blackwellised_surrogate(
    sampled_logprobs_BT: Tensor,
    reward_BT: Tensor,
    sampled_inside_BT: Tensor,
    support: SupportLogprobs,
    baseline_BT: Tensor,
) -> Tensor:
    """-sum_S sg(pi (r - b)) log pi - 1[y not in S] sg(r(y) - b) log pi(y), [B, T]: exact over S, sampled outside.

    Unbiased for any b that does not depend on y, since sum_V pi grad log pi = 0; with S empty it is the sampled
    surrogate, with S the whole vocabulary the gradient of KL(pi || q).
    """
    fixed = support.detached()
    weight_BTK = fixed.probabilities_BTK * (fixed.reward_BTK - baseline_BT.detach()[..., None])
    logprobs_BTK = torch.where(support.mask_BTK, support.student_BTK, 0.0)
    tail_advantage_BT = torch.where(sampled_inside_BT, 0.0, reward_BT - baseline_BT)
    return sampled_surrogate(sampled_logprobs_BT, tail_advantage_BT) - (weight_BTK * logprobs_BTK).sum(-1)


def sampled_token_in_support(completion_ids_BT: Tensor, support_ids_BTK: Tensor, support_mask_BTK: Tensor) -> Tensor:
    """1[y in S] by id, [B, T] bool. S itself never depends on y."""
    return ((support_ids_BTK == completion_ids_BT[..., None]) & support_mask_BTK).any(-1)


def mean_metrics(sums: Mapping[str, float], num_valid_tokens: int) -> dict[str, float]:
    """Per-token metrics from sums over the microbatches and ranks of a step; `advantage_std` needs both moments."""
    mean = {name: value / max(num_valid_tokens, 1) for name, value in sums.items()}
    return {
        "kl_nats": mean["reverse_kl"],
        "reward_nats": mean["reward"],
        "baseline_nats": mean["baseline"],
        "advantage_std": math.sqrt(max(mean["advantage_squared"] - mean["advantage"] ** 2, 0.0)),
        "left_out_mass_mean": mean["left_out_mass"],
        "support_size_mean": mean["support_size"],
    }


def _recorded_support(student: StudentOutputs, batch: Batch) -> SupportLogprobs:
    return SupportLogprobs(student.support_logprobs_BTK, batch.teacher_support_logprobs_BTK, batch.support_mask_BTK)


def _whole_vocabulary(objective: Objective, student: StudentOutputs, batch: Batch) -> SupportLogprobs:
    """S = every id that the student gives mass to; one that the teacher lacks makes the divergence infinite."""
    full_BTV, teacher_BTV = student.full_logprobs_BTV, batch.teacher_full_logprobs_BTV
    if full_BTV is None or teacher_BTV is None:
        lacking = "student's" if full_BTV is None else "teacher's"
        raise ConfigError(f"objective {objective} needs the {lacking} full log-probabilities")
    if full_BTV.shape != teacher_BTV.shape:
        raise AlignmentError(
            f"the student's full log-probabilities are {list(full_BTV.shape)}, the teacher's {list(teacher_BTV.shape)}"
        )
    return SupportLogprobs(full_BTV, teacher_BTV, full_BTV.detach() != -torch.inf)


def _baseline(seen: LossInputs, baseline: Baseline, tail: Tail | None) -> Tensor:
    """b, [B, T], without a gradient. `tail` None: the support is the whole vocabulary."""
    support = seen.support.detached()
    match baseline:
        case "none":
            return torch.zeros_like(seen.reward_BT)
        case "kl":
            return -(inner_reverse_kl(support) if tail is None else support_reverse_kl(support, tail))
        case "optimal":
            optimal = inner_optimal_baseline if tail is None else optimal_baseline
            return optimal(support, seen.sum_pi_squared_BT)


def _sums(seen: LossInputs, sampled_inside_BT: Tensor, baseline_BT: Tensor, loss_mask_BT: Tensor) -> dict[str, Tensor]:
    """The detached sums of LossOutput."""
    support = seen.support.detached()
    advantage_BT = seen.reward_BT - baseline_BT
    per_token_BT = {
        "reverse_kl": inner_reverse_kl(support) - torch.where(sampled_inside_BT, 0.0, seen.reward_BT),
        "reward": seen.reward_BT,
        "baseline": baseline_BT,
        "advantage": advantage_BT,
        "advantage_squared": advantage_BT.square(),
        "left_out_mass": tail_mass(support.student_BTK, support.mask_BTK),
        "support_size": support.mask_BTK.sum(-1).to(advantage_BT.dtype),
    }
    return {name: torch.where(loss_mask_BT, values, 0.0).sum() for name, values in per_token_BT.items()}
