"""Every objective in two versions, from last hidden states to gradients: this project's, and the plain one.

Axes: N rows, K support size, V vocabulary, H hidden size; [B, T] are the rows as a batch, B x T = N. Natural log.

The plain version is what one writes first: log_softmax of the [N, V] logits, kept by autograd, with one gather; for
the whole vocabulary the teacher's log_softmax beside it. Its sum of squared probabilities is computed for vopd-rb
alone, which needs it, so that no work is charged to the others that a plain implementation would not do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

from vopd_client.batch import Batch
from vopd_client.config import FULL_VOCABULARY_OBJECTIVES, Objective
from vopd_client.linear_logprobs import Logits, linear_logprobs
from vopd_client.losses import compute_loss
from vopd_client.student import StudentOutputs
from vopd_client.teacher_head import TeacherHead
from vopd_client.whole_vocabulary import RewardMoments, whole_vocabulary


@dataclass(frozen=True)
class Shape:
    batch: int = 32
    tokens: int = 128
    vocab: int = 49_152
    hidden: int = 576
    k: int = 100

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


@dataclass(frozen=True)
class Inputs:
    """hidden_NH and weight_VH want gradients; the teacher's two are what its service would have sent."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_hidden_NH: Tensor
    teacher_weight_VH: Tensor
    sampled_ids_N: Tensor
    support_ids_NK: Tensor
    teacher_sampled_N: Tensor
    teacher_support_NK: Tensor

    @classmethod
    def load(cls, path: Path, device: str, teacher_dtype: torch.dtype) -> Inputs:
        tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        tensors["teacher_weight_VH"] = tensors["teacher_weight_VH"].to(teacher_dtype)
        for name in ("hidden_NH", "weight_VH"):
            tensors[name].requires_grad_()
        return cls(**tensors)

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden_NH.grad is not None
        assert self.weight_VH.grad is not None
        return self.hidden_NH.grad, self.weight_VH.grad

    def drop_gradients(self) -> None:
        self.hidden_NH.grad = self.weight_VH.grad = None

    def first_rows(self, count: int) -> Inputs:
        """A small problem of the same kind; the heads are shared."""
        return Inputs(
            **{
                name: value.detach()[:count].requires_grad_(value.requires_grad)
                if name.endswith(("_NH", "_N", "_NK"))
                else value
                for name, value in vars(self).items()
            }
        )


def write_inputs(path: Path, shape: Shape, seed: int = 0) -> None:
    """Random students whose next token is neither certain nor open, and a teacher that differs by a nat or so."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    hidden_NH, weight_VH = normal(shape.rows, shape.hidden), 4 * normal(shape.vocab, shape.hidden) / shape.hidden**0.5
    teacher_hidden_NH = hidden_NH + 0.3 * normal(shape.rows, shape.hidden)
    made: dict[str, list[Tensor]] = {"sampled": [], "support": [], "teacher_sampled": [], "teacher_support": []}
    for student_nH, teacher_nH in zip(torch.split(hidden_NH, 256), torch.split(teacher_hidden_NH, 256), strict=True):
        student_nV = torch.log_softmax(student_nH @ weight_VH.T, -1)
        teacher_nV = torch.log_softmax(teacher_nH @ weight_VH.T, -1)
        sampled_n1 = torch.multinomial(student_nV.exp(), 1, generator=generator)
        support_nK = student_nV.topk(shape.k, -1).indices
        made["sampled"].append(sampled_n1)
        made["support"].append(support_nK)
        made["teacher_sampled"].append(teacher_nV.gather(-1, sampled_n1))
        made["teacher_support"].append(teacher_nV.gather(-1, support_nK))
    joined = {name: torch.cat(parts) for name, parts in made.items()}
    tensors = {
        "hidden_NH": hidden_NH,
        "weight_VH": weight_VH,
        "teacher_hidden_NH": teacher_hidden_NH,
        "teacher_weight_VH": weight_VH.clone(),
        "sampled_ids_N": joined["sampled"][:, 0].contiguous(),
        "support_ids_NK": joined["support"],
        "teacher_sampled_N": joined["teacher_sampled"][:, 0].contiguous(),
        "teacher_support_NK": joined["teacher_support"],
    }
    save_file(tensors, path)


def ours(objective: Objective, inputs: Inputs, batch_size: int) -> None:
    """Forward and backward as a training step does them."""
    logits = Logits(len(inputs.weight_VH))
    batch = _batch(objective, inputs, batch_size)
    outputs: StudentOutputs
    if objective in FULL_VOCABULARY_OBJECTIVES:
        head = TeacherHead(inputs.teacher_weight_VH, None, Logits(len(inputs.teacher_weight_VH)))
        whole = whole_vocabulary(
            inputs.hidden_NH,
            inputs.weight_VH,
            None,
            inputs.sampled_ids_N,
            logits,
            inputs.teacher_hidden_NH,
            head,
            want_kl_gradient=objective == "full-kl",
        )
        outputs = StudentOutputs(
            _as_batch(whole.sampled_N, batch_size),
            whole.sampled_N.new_zeros((*batch.loss_mask_BT.shape, 0)),
            _as_batch(whole.moments.sum_pi_squared, batch_size),
            RewardMoments(*(_as_batch(moment, batch_size) for moment in whole.moments)),
            whole.reverse_kl_sum,
            logits.num_ids,
        )
    else:
        ids_NK = batch.support_ids_BTK.flatten(0, 1)
        logprobs = linear_logprobs(
            inputs.hidden_NH,
            inputs.weight_VH,
            None,
            inputs.sampled_ids_N,
            ids_NK,
            torch.ones_like(ids_NK, dtype=torch.bool),
            logits,
        )
        outputs = StudentOutputs(
            _as_batch(logprobs.sampled_N, batch_size),
            _as_batch(logprobs.support_NK, batch_size),
            _as_batch(logprobs.sum_pi_squared_N, batch_size),
        )
    compute_loss(objective, outputs, batch).loss_sum.backward()  # type: ignore[no-untyped-call]


def plain(objective: Objective, inputs: Inputs, batch_size: int) -> None:
    """The same gradients through the whole [N, V] array."""
    student_NV = torch.log_softmax(linear(inputs.hidden_NH, inputs.weight_VH).float(), dim=-1)
    if objective in FULL_VOCABULARY_OBJECTIVES:
        loss = _plain_over_vocabulary(objective, inputs, student_NV)
    else:
        batch = _batch(objective, inputs, batch_size)
        ids_NK = torch.cat([inputs.sampled_ids_N[:, None], batch.support_ids_BTK.flatten(0, 1)], dim=1)
        gathered_NK = student_NV.gather(-1, ids_NK)
        sum_pi_squared_N = torch.zeros_like(inputs.teacher_sampled_N)
        if objective == "vopd-rb":
            sum_pi_squared_N = student_NV.detach().mul(2).exp_().sum(-1)
        outputs = StudentOutputs(
            _as_batch(gathered_NK[:, 0], batch_size),
            _as_batch(gathered_NK[:, 1:], batch_size),
            _as_batch(sum_pi_squared_N, batch_size),
        )
        loss = compute_loss(objective, outputs, batch).loss_sum
    del student_NV  # autograd keeps what it needs
    loss.backward()  # type: ignore[no-untyped-call]


def _plain_over_vocabulary(objective: Objective, inputs: Inputs, student_NV: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast(student_NV.device.type, enabled=False):
        hidden_NH = inputs.teacher_hidden_NH.to(inputs.teacher_weight_VH.dtype)
        teacher_NV = torch.log_softmax(linear(hidden_NH, inputs.teacher_weight_VH).float(), dim=-1)
    if objective == "full-kl":
        return (student_NV.exp() * (student_NV - teacher_NV)).sum()
    ids_N1 = inputs.sampled_ids_N[:, None]
    with torch.no_grad():
        value_N = (student_NV.exp() * (teacher_NV - student_NV)).sum(-1)
        reward_N = (teacher_NV.gather(-1, ids_N1) - student_NV.gather(-1, ids_N1))[:, 0]
    return -((reward_N - value_N) * student_NV.gather(-1, ids_N1)[:, 0]).sum()


def _batch(objective: Objective, inputs: Inputs, batch_size: int) -> Batch:
    """The inputs as the microbatch they would have come in; opd has no support."""
    k = 0 if objective in {"opd", *FULL_VOCABULARY_OBJECTIVES} else inputs.support_ids_NK.shape[1]
    ids_BT = _as_batch(inputs.sampled_ids_N, batch_size)
    support_ids_BTK = _as_batch(inputs.support_ids_NK[:, :k], batch_size)
    zeros_BT = torch.zeros(ids_BT.shape, device=ids_BT.device)
    return Batch(
        input_ids_BS=ids_BT,
        attention_mask_BS=torch.ones_like(ids_BT),
        row_index_BT=torch.zeros_like(ids_BT),
        completion_ids_BT=ids_BT,
        loss_mask_BT=torch.ones_like(ids_BT, dtype=torch.bool),
        support_ids_BTK=support_ids_BTK,
        support_mask_BTK=torch.ones_like(support_ids_BTK, dtype=torch.bool),
        behaviour_logprobs_BT=zeros_BT,
        teacher_logprobs_BT=_as_batch(inputs.teacher_sampled_N, batch_size),
        teacher_support_logprobs_BTK=_as_batch(inputs.teacher_support_NK[:, :k], batch_size),
        task_advantages_BT=zeros_BT,
        teacher_hidden_BTH=None,  # they are given to the head directly
        prompt_names=("random",) * batch_size,
    )


def _as_batch(values: Tensor, batch_size: int) -> Tensor:
    """[N, ...] -> [B, T, ...]."""
    return values.reshape(batch_size, len(values) // batch_size, *values.shape[1:])
