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
step, and what `shaping.py` adds, which is off by default. A temperature is applied to both sides' log-probabilities
before they come here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

from vopd_client.baselines import (
    Baseline,
    SupportLogprobs,
    Tail,
    choose_baseline,
    inner_reverse_kl,
    optimal_baseline,
    support_reverse_kl,
    tail_log_ratio,
    tail_mass,
)
from vopd_client.config import FULL_VOCABULARY_OBJECTIVES, Objective
from vopd_client.errors import ConfigError
from vopd_client.in_state_variance import in_state_variance
from vopd_client.loss_inputs import LossInputs, read_inputs
from vopd_client.shaping import DIFFERENTIATED_OBJECTIVES, NO_SHAPING, Shaping

if TYPE_CHECKING:
    from vopd_client.batch import Batch
    from vopd_client.student import StudentOutputs
    from vopd_client.types import BoolArray, SequenceScores, SequenceToScore


@dataclass(frozen=True)
class LossOutput:
    """A loss and what it was made of, all of them sums over the valid tokens.

    loss_sum: scalar with a gradient.
    sums: detached scalars, by name:
        reverse_kl         -sum_S pi r - 1[y not in S] r(y): unbiased for KL(pi || q) whatever S is, -r(y) without a
                           support, exact over the whole vocabulary; so it means the same for every objective, and no
                           floor cuts it
        reward             r(y), after the floor where there is one
        baseline           b; 0 for an objective that has none
        advantage          r(y) - b, clipped where it is to be
        advantage_squared  its square
        left_out_mass      1 - pi(S); 0 with the whole vocabulary
        support_size       ids in S; all of them with the whole vocabulary
        variance           in-state variance of the objective's gradient, see `in_state_variance`
        opd_variance       that of opd at the same positions: what no baseline would have cost
        and, where the shaping is on,
        reward_clipped, advantage_clipped, importance_truncated   1 for every sampled token that it changed
        importance_weight  rho
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
    shaping: Shaping = NO_SHAPING,
) -> LossOutput:
    """The objective's surrogate loss over one microbatch, whose gradient is the estimator of the table above.

    Computes in float32, or in float64 when the student's log-probabilities are. Positions outside the loss mask and
    columns outside the support mask are never looked at: their gradient is exactly zero whatever they hold.

    Args:
        student: sampled_logprobs_BT, support_logprobs_BTK, sum_pi_squared_BT; whole_BT for the objectives over the
            whole vocabulary, with the floor of `shaping` in its moments, and for full-kl a differentiable
            reverse_kl_sum over the loss mask. Its float arrays may be of any float dtype.
        tail: what is outside S, for the value Vk and for topk-kl: left out and S renormalised (the paper), or put
            into one bucket. The optimal baseline always uses the bucket (without it, it can be worse than none),
            and where there is no support, or nothing outside it, there is no tail.
        baseline: None means the objective's default: none for opd, kl for vopd and vopd-full, optimal for vopd-rb.
        shaping: `check_shaping` says what goes with which objective.

    Raises:
        ConfigError: a baseline the objective cannot have, or no moments over the vocabulary where they are needed.
        NonFiniteError: a NaN or an infinity at a valid position; names the prompt and the position.
    """
    baseline = choose_baseline(objective, baseline)
    seen = read_inputs(student, batch, shaping.reward_floor)
    if objective in FULL_VOCABULARY_OBJECTIVES and seen.whole_BT is None:
        raise ConfigError(f"objective {objective} needs the teacher's whole distribution")
    baseline_BT = _baseline(seen, baseline, tail)
    reward_BT = seen.support.cut(seen.reward_BT)
    advantage_BT = shaping.clipped(reward_BT - baseline_BT)
    importance_BT = shaping.importance_weights(seen.sampled_logprobs_BT, seen.behaviour_logprobs_BT)

    match objective:
        case "opd" | "vopd" | "vopd-full":
            loss_BT = sampled_surrogate(seen.sampled_logprobs_BT, importance_BT * advantage_BT)
        case "vopd-rb":
            fixed = seen.support.detached()
            loss_BT = rao_blackwellised_surrogate(
                seen.sampled_logprobs_BT,
                torch.where(seen.sampled_inside_BT, 0.0, importance_BT * advantage_BT),
                seen.support,
                shaping.clipped(fixed.reward_BTK - baseline_BT[..., None]),
            )
        case "topk-kl":
            loss_BT = support_reverse_kl(seen.support, tail)
        case "full-kl":
            loss_BT = torch.zeros_like(seen.sampled_logprobs_BT)  # its sum comes from the student, see below
        case _:
            assert_never(objective)

    loss_BT = loss_BT + sampled_surrogate(seen.sampled_logprobs_BT, importance_BT * seen.task_advantages_BT)
    loss_sum = torch.where(batch.loss_mask_BT, loss_BT, 0.0).sum()
    if objective == "full-kl":
        if student.reverse_kl_sum is None:
            raise ConfigError("objective full-kl needs a differentiable KL over the whole vocabulary")
        loss_sum = loss_sum + student.reverse_kl_sum

    sums_BT = {
        "reward": reward_BT,
        "baseline": baseline_BT,
        "advantage": advantage_BT,
        "advantage_squared": advantage_BT.square(),
        **_of_the_distributions(seen, num_ids=student.num_ids),
        **_variances(objective, seen, baseline_BT, advantage_BT, shaping),
        **_changed_by(shaping, seen, reward_BT - baseline_BT, importance_BT),
    }
    return LossOutput(
        loss_sum,
        {name: torch.where(batch.loss_mask_BT, value_BT, 0.0).sum().detach() for name, value_BT in sums_BT.items()},
    )


def loss_from_logits(
    objective: Objective,
    logits_BTV: Tensor,
    sequences: Sequence[SequenceToScore],
    scores: Sequence[SequenceScores],
    *,
    temperature: float = 1.0,
    num_shared_ids: int | None = None,
    tail: Tail = "renormalise",
    baseline: Baseline | None = None,
    loss_masks: Sequence[BoolArray] | None = None,
) -> LossOutput:
    """`compute_loss` for a student of any kind, from its logits and what the teacher was asked and answered.

    It holds [N, V] log-probabilities for the N completion tokens of the batch; `StudentForTraining` does not.

    Args:
        logits_BTV: any float dtype; [b, t] predicts completion token t of sequence b, and what lies beyond a shorter
            completion is never looked at. Of one unpadded sequence: `model(ids).logits[:, len(context_ids) - 1 : -1]`.
            The student's context need not be the teacher's.
        sequences, scores: as `score` took and gave them, all with the same kind of support.
        temperature: the one that the teacher scored at.
        num_shared_ids: only ids below it take part in the softmax; None: all V. Less where one side pads its head.
        tail, baseline: as in `compute_loss`.
        loss_masks: [T] bool of each sequence, False at tokens that the student did not sample, such as a tool's
            output; None: all are in the loss.

    Raises:
        AlignmentError: rows, scores and completions that do not fit each other.
        ConfigError: an objective that needs more than the teacher was asked for.
        NonFiniteError: as `compute_loss`.
    """
    from vopd_client.logits_inputs import batch_of, outputs_of  # brings transformers

    num_ids = logits_BTV.shape[-1] if num_shared_ids is None else num_shared_ids
    batch = batch_of(sequences, scores, num_shared_ids=num_ids, loss_masks=loss_masks).to(logits_BTV.device)
    if objective != "opd" and not batch.support_ids_BTK.shape[-1]:
        raise ConfigError(f"objective {objective} needs a support: score with TeacherTopK(k) or Candidates(...)")
    student = outputs_of(logits_BTV, batch, num_shared_ids=num_ids, temperature=temperature)
    return compute_loss(objective, student, batch, tail=tail, baseline=baseline)


def sampled_surrogate(sampled_logprobs_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    """-sg(advantage) log pi(y), [B, T]."""
    return -advantage_BT.detach() * sampled_logprobs_BT


def rao_blackwellised_surrogate(
    sampled_logprobs_BT: Tensor, tail_advantage_BT: Tensor, support: SupportLogprobs, advantage_BTK: Tensor
) -> Tensor:
    """-sum_S sg(pi (r - b)) log pi - 1[y not in S] sg(r(y) - b) log pi(y), [B, T]: exact over S, sampled outside.

    Unbiased for any b that does not depend on y, since sum_V pi grad log pi = 0; with S empty it is the sampled
    surrogate, with S the whole vocabulary the gradient of KL(pi || q).

    Args: advantage_BTK: r - b on S. tail_advantage_BT: r(y) - b, and 0 where y is in S.
    """
    weight_BTK = support.detached().probabilities_BTK * advantage_BTK.detach()
    logprobs_BTK = torch.where(support.mask_BTK, support.student_BTK, 0.0)
    return sampled_surrogate(sampled_logprobs_BT, tail_advantage_BT) - (weight_BTK * logprobs_BTK).sum(-1)


def mean_metrics(sums: Mapping[str, float], num_valid_tokens: int) -> dict[str, float | None]:
    """Per-token metrics from sums over the microbatches and ranks of a step; `advantage_std` needs both moments.

    variance: in nats^2. variance_over_opd: the share of opd's variance that is left; None where opd has none.
    """
    mean = {name: value / max(num_valid_tokens, 1) for name, value in sums.items()}
    metrics: dict[str, float | None] = {
        "kl_nats": mean["reverse_kl"],
        "reward_nats": mean["reward"],
        "baseline_nats": mean["baseline"],
        "advantage_std": math.sqrt(max(mean["advantage_squared"] - mean["advantage"] ** 2, 0.0)),
        "left_out_mass_mean": mean["left_out_mass"],
        "support_size_mean": mean["support_size"],
        "variance": mean["variance"],
        "variance_over_opd": mean["variance"] / mean["opd_variance"] if mean["opd_variance"] > 0 else None,
    }
    shaped = {
        "reward_clipped": "reward_clipped_fraction",
        "advantage_clipped": "advantage_clipped_fraction",
        "importance_truncated": "importance_truncated_fraction",
        "importance_weight": "importance_weight_mean",
    }
    return metrics | {name: mean[key] for key, name in shaped.items() if key in mean}


def _baseline(seen: LossInputs, baseline: Baseline, tail: Tail) -> Tensor:
    """b, [B, T], without a gradient."""
    support = seen.support.detached()
    match baseline:
        case "none":
            return torch.zeros_like(seen.reward_BT)
        case "kl":
            return -support_reverse_kl(support, tail) if seen.whole_BT is None else seen.whole_BT.pi_r
        case "optimal":
            if seen.whole_BT is not None:
                return seen.whole_BT.optimal_baseline
            return optimal_baseline(support, seen.sum_pi_squared_BT)


def _of_the_distributions(seen: LossInputs, *, num_ids: int) -> dict[str, Tensor]:
    """What student and teacher say of each other at each position, whatever the objective makes of it, [B, T]."""
    if seen.whole_BT is not None:
        zeros_BT = torch.zeros_like(seen.reward_BT)
        return {"reverse_kl": seen.whole_BT.reverse_kl, "left_out_mass": zeros_BT, "support_size": zeros_BT + num_ids}
    support = replace(seen.support.detached(), reward_floor=None)
    return {
        "reverse_kl": inner_reverse_kl(support) - torch.where(seen.sampled_inside_BT, 0.0, seen.reward_BT),
        "left_out_mass": tail_mass(support.student_BTK, support.mask_BTK),
        "support_size": support.mask_BTK.sum(-1).to(seen.reward_BT.dtype),
    }


def _variances(
    objective: Objective, seen: LossInputs, baseline_BT: Tensor, advantage_BT: Tensor, shaping: Shaping
) -> dict[str, Tensor]:
    """The in-state variance of the objective and of opd at each position, [B, T].

    Over the whole vocabulary it is exact, and that of the advantage before it is clipped.
    """
    differentiated = objective in DIFFERENTIATED_OBJECTIVES
    if seen.whole_BT is not None:
        opd_BT = seen.whole_BT.sampled_variance(0.0)
        own_BT = torch.zeros_like(opd_BT) if differentiated else seen.whole_BT.sampled_variance(baseline_BT)
        return {"variance": own_BT, "opd_variance": opd_BT}
    support = seen.support.detached()
    reward_tail_BT = tail_log_ratio(support)

    def variance(advantage_BT: Tensor, advantage_BTK: Tensor, tail_advantage_BT: Tensor, *, exact: bool) -> Tensor:
        return in_state_variance(
            support,
            seen.sum_pi_squared_BT,
            seen.sampled_logprobs_BT,
            seen.sampled_inside_BT,
            advantage_BT=advantage_BT,
            advantage_BTK=advantage_BTK,
            tail_advantage_BT=tail_advantage_BT,
            is_exact_inside=exact,
        )

    opd_BT = variance(support.cut(seen.reward_BT), support.reward_BTK, reward_tail_BT, exact=False)
    if differentiated:
        return {"variance": torch.zeros_like(opd_BT), "opd_variance": opd_BT}
    own_BT = variance(
        advantage_BT,
        shaping.clipped(support.reward_BTK - baseline_BT[..., None]),
        shaping.clipped(reward_tail_BT - baseline_BT),
        exact=objective == "vopd-rb",
    )
    return {"variance": own_BT, "opd_variance": opd_BT}


def _changed_by(shaping: Shaping, seen: LossInputs, advantage_BT: Tensor, importance_BT: Tensor) -> dict[str, Tensor]:
    """Which sampled tokens the shaping changed, [B, T]; nothing for what is off. advantage_BT: before the clip."""
    dtype = advantage_BT.dtype
    changed_BT = {}
    if shaping.reward_floor is not None:
        changed_BT["reward_clipped"] = (seen.reward_BT < shaping.reward_floor).to(dtype)
    if shaping.advantage_clip is not None:
        changed_BT["advantage_clipped"] = (advantage_BT.abs() > shaping.advantage_clip).to(dtype)
    if shaping.importance_cap is not None:
        changed_BT["importance_weight"] = importance_BT
        changed_BT["importance_truncated"] = (importance_BT >= shaping.importance_cap).to(dtype)
    return changed_BT
