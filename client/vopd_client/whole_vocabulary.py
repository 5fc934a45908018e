"""What the objectives over the whole vocabulary need of a position, without ever holding all rows' distributions.

Axes: N rows (completion positions, flattened), n rows of one chunk, V vocabulary (the ids that both sides have),
H hidden sizes of student and teacher. Natural log, nats.

Notation: pi the student, q the teacher, r = log q - log pi, w(v) = 1 - 2 pi(v) + sum pi^2 the squared norm of the
logit-space score e_v - pi. A handful of sums over V a row tells the KL, both baselines, and the variance of the
sampled estimator for any baseline.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vopd_client.linear_logprobs import (
    CHUNK_ELEMENTS,
    HeadGradients,
    HeadInDtype,
    Logits,
    add_gradients_of_logprobs,
    chunk_buffer,
    chunks,
    inner,
)
from vopd_client.teacher_head import TeacherHead


class RewardMoments(NamedTuple):
    """Sums over the vocabulary at each position, [N] or [B, T] all of them, without gradients.

    reverse_kl is that of the models as they are; the others are of the reward that the objective is given, which a
    floor may have cut.
    """

    reverse_kl: Tensor  # -sum pi (log q - log pi)
    sum_pi_squared: Tensor
    pi_r: Tensor  # sum pi r
    pi_r2: Tensor  # sum pi r^2
    pi2_r: Tensor  # sum pi^2 r
    pi2_r2: Tensor  # sum pi^2 r^2

    @property
    def optimal_baseline(self) -> Tensor:
        """b* = sum pi w r / sum pi w, of least variance.

        Where the student is certain the weights are rounding noise, and any baseline does: the mean reward then.
        """
        weight = 1 - self.sum_pi_squared
        is_certain = weight < torch.finfo(weight.dtype).eps ** 0.5
        weighted_reward = self._weighted(self.pi_r, self.pi2_r)
        return torch.where(is_certain, self.pi_r, weighted_reward / torch.where(is_certain, 1.0, weight))

    def sampled_variance(self, baseline: Tensor | float) -> Tensor:
        """Trace of the covariance of (r(y) - b) (e_y - pi) over y ~ pi, in nats^2; exact.

        E|g|^2 = sum pi w (r - b)^2, and |E g|^2 = sum pi^2 (r - sum pi r)^2 whatever b is.
        """
        second_moment = (
            self._weighted(self.pi_r2, self.pi2_r2)
            - 2 * baseline * self._weighted(self.pi_r, self.pi2_r)
            + baseline * baseline * (1 - self.sum_pi_squared)
        )
        squared_mean = self.pi2_r2 - 2 * self.pi_r * self.pi2_r + self.pi_r.square() * self.sum_pi_squared
        return (second_moment - squared_mean).clamp_min(0)

    def _weighted(self, over_pi: Tensor, over_pi2: Tensor) -> Tensor:
        """sum pi w f, from sum pi f and sum pi^2 f."""
        return over_pi - 2 * over_pi2 + self.sum_pi_squared * over_pi


class WholeVocabulary(NamedTuple):
    """sampled_N carries a gradient, and so does reverse_kl_sum, the KL added up over all rows, where it was wanted."""

    sampled_N: Tensor
    reverse_kl_sum: Tensor
    moments: RewardMoments


def whole_vocabulary(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    sampled_ids_N: Tensor,
    logits: Logits,
    teacher_hidden_NH: Tensor,
    teacher: TeacherHead,
    *,
    want_kl_gradient: bool,
    reward_floor: float | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> WholeVocabulary:
    """Student and teacher compared over every shared id, for every row.

    Equal to log_softmax of both, in full, and sums over it. `logits.num_ids` are the ids that both sides have.

    Args:
        hidden_NH, weight_VH, bias_V: of the student; gradients reach them. sampled_ids_N: int64 in [0, num_ids).
        teacher_hidden_NH: the teacher's, row for row; never a gradient.
        want_kl_gradient: the gradient of reverse_kl_sum is computed at once, while the distributions are there,
            instead of computing them again in the backward pass, which can run once.
        reward_floor: the reward is cut from below, in nats; None: it is not.
        chunk_elements: logits that one chunk of one side holds, at most, but for a single row.
    """
    sampled_N, reverse_kl_sum, *moments = _WholeVocabulary.apply(  # type: ignore[no-untyped-call]
        hidden_NH,
        weight_VH,
        bias_V,
        sampled_ids_N,
        logits,
        teacher_hidden_NH,
        teacher,
        want_kl_gradient and torch.is_grad_enabled(),
        reward_floor,
        chunk_elements,
    )
    return WholeVocabulary(sampled_N, reverse_kl_sum, RewardMoments(*moments))


class _WholeVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        sampled_ids_N: Tensor,
        logits: Logits,
        teacher_hidden_NH: Tensor,
        teacher: TeacherHead,
        want_kl_gradient: bool,
        reward_floor: float | None,
        chunk_elements: int,
    ) -> tuple[Tensor, ...]:
        head = HeadInDtype.of(weight_VH, bias_V, hidden_NH)
        gradients = None
        if want_kl_gradient:
            gradients = HeadGradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad[:3])
        log_z_N = torch.zeros(len(hidden_NH), dtype=head.softmax_dtype, device=hidden_NH.device)
        sampled_N = torch.zeros_like(log_z_N)
        moments = RewardMoments(*(torch.zeros_like(log_z_N) for _ in RewardMoments._fields))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            largest_vocabulary = max(logits.num_ids, teacher.logits.num_ids)
            exp_buffer_nV = chunk_buffer(len(hidden_NH), largest_vocabulary, chunk_elements, log_z_N)
            student_buffer_nV = exp_buffer_nV.new_empty(len(exp_buffer_nV), logits.num_ids)
            teacher_buffer_nV = exp_buffer_nV.new_empty(len(exp_buffer_nV), teacher.logits.num_ids)
            for rows in chunks(len(hidden_NH), largest_vocabulary, chunk_elements):
                teacher_nV = teacher.logits_of(teacher_hidden_NH[rows], out=teacher_buffer_nV)
                _, teacher_log_z_n = shift_(teacher_nV, exp_buffer_nV)
                logits_nV = logits.of(head.cast(hidden_NH[rows]), head.weight_VH, head.bias_V, out=student_buffer_nV)
                kept_nV = logits_nV.clone() if gradients is not None and logits.softcap is not None else logits_nV
                largest_n, student_log_z_n = shift_(logits_nV, exp_buffer_nV)
                sampled_N[rows] = logits_nV.gather(-1, sampled_ids_N[rows, None])[:, 0] - student_log_z_n
                log_z_N[rows] = largest_n + student_log_z_n
                pi_nV = exp_buffer_nV[: len(logits_nV), : logits.num_ids].div_(student_log_z_n.exp()[:, None])
                reward_nV = teacher_nV[:, : logits.num_ids].sub_(logits_nV)
                reward_nV.add_((student_log_z_n - teacher_log_z_n)[:, None])
                if logits.dropped_ids:  # pi is 0 there by construction, and their reward nobody's
                    reward_nV.index_fill_(-1, torch.tensor(logits.dropped_ids, device=reward_nV.device), 0.0)
                chunk_moments = moments_of_rewards(pi_nV, reward_nV, reward_floor, pi_r_nV=logits_nV)
                for whole_N, chunk_n in zip(moments, chunk_moments, strict=True):
                    whole_N[rows] = chunk_n
                if gradients is not None:
                    # -d KL / d logits = pi (r + KL); the sign is the backward pass's
                    grad_nV = logits_nV.addcmul_(pi_nV, chunk_moments.reverse_kl[:, None])
                    gradients.add_rows(rows, logits.backward_(grad_nV, kept_nV), head)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, sampled_ids_N, log_z_N)
        ctx.kl_gradients = gradients
        ctx.logits, ctx.chunk_elements, ctx.product_dtype = logits, chunk_elements, head.weight_VH.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        reverse_kl_sum = moments.reverse_kl.sum()
        if not want_kl_gradient:
            ctx.mark_non_differentiable(reverse_kl_sum)
        return sampled_N, reverse_kl_sum, *moments

    @staticmethod
    def backward(
        ctx: Any, grad_sampled_N: Tensor | None, grad_kl_sum: Tensor | None, *_moments: None
    ) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, sampled_ids_N, log_z_N = ctx.saved_tensors
        if grad_kl_sum is None:
            gradients = HeadGradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad[:3])
        else:
            gradients, ctx.kl_gradients = ctx.kl_gradients, None
            if gradients is None:
                raise RuntimeError(
                    "the gradient of reverse_kl_sum was made in the forward pass and is gone with its use"
                )
            gradients.scale_(-grad_kl_sum)
        if grad_sampled_N is not None:
            add_gradients_of_logprobs(
                gradients,
                grad_sampled_N[:, None],
                sampled_ids_N[:, None],
                torch.ones_like(sampled_ids_N[:, None], dtype=torch.bool),
                log_z_N,
                HeadInDtype.of(weight_VH, bias_V, hidden_NH, dtype=ctx.product_dtype),
                ctx.logits,
                chunk_elements=ctx.chunk_elements,
            )
        return (gradients.hidden_NH, gradients.weight_VH, gradients.bias_V, *([None] * 7))


def shift_(logits_nV: Tensor, exp_buffer_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Takes each row's largest logit off, in place, and writes the exponentials into the buffer.

    Returns: the largest, and the log of the sum of the exponentials, [n] each.
    """
    largest_n1 = logits_nV.amax(-1, keepdim=True)
    exp_nV = exp_buffer_nV[: len(logits_nV), : logits_nV.shape[1]]
    torch.exp(logits_nV.sub_(largest_n1), out=exp_nV)
    return largest_n1[:, 0], exp_nV.sum(-1).log()


def moments_of_rewards(
    pi_nV: Tensor, reward_nV: Tensor, reward_floor: float | None, *, pi_r_nV: Tensor
) -> RewardMoments:
    """The sums of RewardMoments; writes pi r into `pi_r_nV`, and cuts `reward_nV` in place where there is a floor.

    Only inner products of whole rows, which make no further array of the chunk's size.
    """
    torch.mul(pi_nV, reward_nV, out=pi_r_nV)
    reverse_kl_n = -pi_r_nV.sum(-1)
    if reward_floor is not None:
        torch.mul(pi_nV, reward_nV.clamp_(min=reward_floor), out=pi_r_nV)
    return RewardMoments(
        reverse_kl=reverse_kl_n,
        sum_pi_squared=inner(pi_nV, pi_nV),
        pi_r=-reverse_kl_n if reward_floor is None else pi_r_nV.sum(-1),
        pi_r2=inner(pi_r_nV, reward_nV),
        pi2_r=inner(pi_nV, pi_r_nV),
        pi2_r2=inner(pi_r_nV, pi_r_nV),
    )
