"""Exact expectations over the sampled token: every token of a tiny vocabulary is sampled once, and weighed by pi.

Axes: V vocabulary (7 ids or so), Y the tokens that can be sampled (those with pi > 0), K support size.
One position only, since every token is credited with its own reward: a batch of Y sequences of one token each,
each with logits of its own, so that one backward pass gives the gradient g(y) of every sampled token y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vopd_client.batch import Batch
from vopd_client.losses import compute_loss
from vopd_client.shaping import NO_SHAPING, Shaping
from vopd_client.whole_vocabulary import RewardMoments

EVERY_SAMPLED_ESTIMATOR = [
    ("opd", "renormalise", None),
    *[("vopd", tail, "kl") for tail in ("renormalise", "bucket")],
    ("vopd", "renormalise", "optimal"),
    ("vopd", "renormalise", "none"),
    *[("vopd-rb", tail, "kl") for tail in ("renormalise", "bucket")],
    ("vopd-rb", "renormalise", "optimal"),
    ("vopd-rb", "renormalise", "none"),
    ("vopd-full", "renormalise", "kl"),
    ("vopd-full", "renormalise", "optimal"),
    ("vopd-full", "renormalise", "none"),
]


@dataclass(frozen=True)
class Outputs:
    """What the losses read of a student; the student's own NamedTuple has the same attributes."""

    sampled_logprobs_BT: Tensor
    support_logprobs_BTK: Tensor
    sum_pi_squared_BT: Tensor
    whole_BT: RewardMoments | None = None
    reverse_kl_sum: Tensor | None = None
    num_ids: int = 0


@dataclass(frozen=True)
class State:
    """A state s_t: both distributions there, float64, and the support."""

    student_logits_V: Tensor
    teacher_logprobs_V: Tensor
    support_ids: tuple[int, ...]

    @property
    def pi_V(self) -> Tensor:
        return self.student_logits_V.softmax(-1)

    @property
    def sampled_ids(self) -> list[int]:
        return [int(token_id) for token_id in (self.pi_V > 0).nonzero().flatten()]


def random_state(
    seed: int, support_size: int, *, num_ids: int = 7, owner: str = "student", sharpness: float = 1.5
) -> State:
    """Gaussian logits on both sides; S = the owner's most likely ids."""
    generator = torch.Generator().manual_seed(seed)
    logits_2V = sharpness * torch.randn(2, num_ids, generator=generator, dtype=torch.float64)
    ranked = logits_2V[0 if owner == "student" else 1].argsort(descending=True).tolist()
    return State(logits_2V[0], logits_2V[1].log_softmax(-1), tuple(ranked[:support_size]))


def plain_moments(student_V: Tensor, teacher_V: Tensor, reward_floor: float | None) -> RewardMoments:
    """The sums over the last axis as RewardMoments names them, one id after the other as they are written."""
    pi_V, reward_V = student_V.exp(), torch.where(student_V > -torch.inf, teacher_V - student_V, 0.0)
    shaped_V = reward_V if reward_floor is None else reward_V.clamp_min(reward_floor)
    return RewardMoments(
        reverse_kl=-(pi_V * reward_V).sum(-1),
        sum_pi_squared=pi_V.square().sum(-1),
        pi_r=(pi_V * shaped_V).sum(-1),
        pi_r2=(pi_V * shaped_V**2).sum(-1),
        pi2_r=(pi_V**2 * shaped_V).sum(-1),
        pi2_r2=(pi_V**2 * shaped_V**2).sum(-1),
    )


def batch_of_every_token(
    state: State,
    support_of: Callable[[int], tuple[int, ...]] | None = None,
    *,
    objective: str = "vopd",
    reward_floor: float | None = None,
    behaviour_logprobs_V: Tensor | None = None,
    task_advantage_of: Callable[[int], float] = lambda token_id: 0.0,
) -> tuple[Outputs, Batch, Tensor]:
    """One batch in which every token is sampled once, and the leaf of its gradients, the logits [Y, V].

    support_of: the support when y is sampled; anything but a constant is the trap that a test wants to show.
    objective: the two over the whole vocabulary get its moments, the others a support.
    behaviour_logprobs_V: of the student that sampled; None: the one that learns.
    """
    sampled_ids = state.sampled_ids
    supports = [state.support_ids if support_of is None else support_of(token_id) for token_id in sampled_ids]
    width = max(len(support) for support in supports)
    ids_YK = torch.tensor([[*support, *[0] * (width - len(support))] for support in supports]).long()
    ids_YK = ids_YK.reshape(len(supports), width)
    mask_YK = torch.tensor([[column < len(support) for column in range(width)] for support in supports])
    mask_YK = mask_YK.bool().reshape(len(supports), width)
    completion_ids_Y1 = torch.tensor(sampled_ids)[:, None]

    leaf_YV = state.student_logits_V.repeat(len(sampled_ids), 1).requires_grad_()
    student_YV = leaf_YV.log_softmax(-1)
    teacher_YV = state.teacher_logprobs_V.repeat(len(sampled_ids), 1)
    student = Outputs(
        sampled_logprobs_BT=student_YV.gather(-1, completion_ids_Y1),
        support_logprobs_BTK=student_YV.gather(-1, ids_YK)[:, None],
        sum_pi_squared_BT=student_YV.detach().exp().square().sum(-1, keepdim=True),
    )
    if objective in ("vopd-full", "full-kl"):
        moments = plain_moments(student_YV.detach(), teacher_YV, reward_floor)
        has_mass_YV = student_YV.detach() > -torch.inf
        pi_log_ratio_YV = student_YV.exp() * torch.where(has_mass_YV, student_YV - teacher_YV, 0.0)
        student = replace(
            student,
            whole_BT=RewardMoments(*(values_Y[:, None] for values_Y in moments)),
            reverse_kl_sum=pi_log_ratio_YV[has_mass_YV].sum(),
            num_ids=int((state.pi_V > 0).sum()),
        )
    behaviour_YV = student_YV.detach()
    if behaviour_logprobs_V is not None:
        behaviour_YV = behaviour_logprobs_V.expand_as(student_YV)
    zeros_Y1 = torch.zeros_like(completion_ids_Y1)
    batch = Batch(
        input_ids_BS=zeros_Y1,
        attention_mask_BS=torch.ones_like(zeros_Y1),
        row_index_BT=zeros_Y1,
        completion_ids_BT=completion_ids_Y1,
        loss_mask_BT=torch.ones_like(zeros_Y1, dtype=torch.bool),
        support_ids_BTK=ids_YK[:, None],
        support_mask_BTK=mask_YK[:, None],
        behaviour_logprobs_BT=behaviour_YV.gather(-1, completion_ids_Y1),
        teacher_logprobs_BT=teacher_YV.gather(-1, completion_ids_Y1),
        teacher_support_logprobs_BTK=teacher_YV.gather(-1, ids_YK)[:, None],
        task_advantages_BT=torch.tensor([[task_advantage_of(token_id)] for token_id in sampled_ids]),
        teacher_hidden_BTH=None,
        prompt_names=tuple(f"state:{token_id}" for token_id in sampled_ids),
    )
    return student, batch, leaf_YV


def gradient_of_every_token(
    objective: str,
    state: State,
    *,
    tail: str = "renormalise",
    baseline: str | None = None,
    support_of: Callable[[int], tuple[int, ...]] | None = None,
    shaping: Shaping = NO_SHAPING,
    behaviour_logprobs_V: Tensor | None = None,
    task_advantage_of: Callable[[int], float] = lambda token_id: 0.0,
) -> Tensor:
    """g(y), [Y, V]: what autograd makes of the loss when y was sampled, with respect to the logits."""
    student, batch, leaf_YV = batch_of_every_token(
        state,
        support_of,
        objective=objective,
        reward_floor=shaping.reward_floor,
        behaviour_logprobs_V=behaviour_logprobs_V,
        task_advantage_of=task_advantage_of,
    )
    loss = compute_loss(objective, student, batch, tail=tail, baseline=baseline, shaping=shaping)
    (gradient_YV,) = torch.autograd.grad(loss.loss_sum, leaf_YV)
    return gradient_YV


def expectation(state: State, values_YV: Tensor) -> Tensor:
    """E over y ~ pi."""
    return (state.pi_V[state.sampled_ids, None] * values_YV).sum(0)


def variance(state: State, gradient_YV: Tensor) -> Tensor:
    """Trace of the covariance of g(y) under y ~ pi."""
    centred_YV = gradient_YV - expectation(state, gradient_YV)
    return expectation(state, centred_YV.square()).sum()


def exact_gradient(state: State) -> Tensor:
    """grad KL(pi || q) with respect to the logits, [V], by autograd over the whole vocabulary."""
    leaf_V = state.student_logits_V.clone().requires_grad_()
    logprobs_V = leaf_V.log_softmax(-1)
    has_mass_V = logprobs_V.detach() > -torch.inf
    terms_V = logprobs_V.exp() * torch.where(has_mass_V, logprobs_V - state.teacher_logprobs_V, 0.0)
    (gradient_V,) = torch.autograd.grad(terms_V[has_mass_V].sum(), leaf_V)
    return gradient_V
