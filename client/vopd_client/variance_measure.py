"""Both models' whole distributions at sampled positions, and every estimator's variance there, block by block.

Axes: B sequences, T completion tokens, N positions of a microbatch, n of one block, K support size, V vocabulary (the
ids that both sides have), H hidden sizes. Natural log, nats. Products run as in training, everything after them in
float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vopd_client.alignment import BoolArray, Scalar
from vopd_client.baselines import SupportLogprobs, tail_mass
from vopd_client.batch import Batch
from vopd_client.linear_logprobs import HeadInDtype, chunks, gather_masked
from vopd_client.output_head import hidden_states, output_head
from vopd_client.rollouts.base import Rollout
from vopd_client.rollouts.decoding import MixedPrecision
from vopd_client.rollouts.support import adaptive_support
from vopd_client.student import StudentForTraining
from vopd_client.teacher.codec import FloatTypeName
from vopd_client.variance import (
    Distributions,
    moments_of_everything,
    moments_outside,
    variances_of_support,
    variances_without_support,
)
from vopd_client.variance_report import Approximation, FloatArray, Measurement, Owner, SupportRule, SupportValues
from vopd_client.wire_bytes import bytes_of_sequence
from vopd_proto.arrays import IntArray

# float64 log-probabilities of one model in one block, 32 MiB: with V = 49,152 that is 85 positions. About ten arrays
# of this size exist at once.
BLOCK_ELEMENTS = 2**22
# The teacher's masses are sums of float32 probabilities: what is smaller than its epsilon is noise.
LEAST_TAIL = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Block:
    """Both distributions at some positions.

    sequence_n: which sequence of the batch each position belongs to.
    left_out_n: the probability that the student, and the teacher, gave to ids whose teacher log-probability is made
        up; None where none is.
    """

    sequence_n: Tensor
    student_nV: Tensor
    teacher_nV: Tensor
    left_out_n: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class SupportNumbers:
    """Of the supports of one rule in one block, [n] each, on the host."""

    num_ids_n: IntArray
    largest_id_n: IntArray
    left_out_n: FloatArray
    variances_n: dict[str, FloatArray]


@dataclass(frozen=True, eq=False)
class BlockNumbers:
    """What is kept of a block, on the host."""

    sequence_n: IntArray
    kl_n: FloatArray
    signal_n: FloatArray
    variances_n: dict[str, FloatArray]
    supports: dict[SupportRule, SupportNumbers]
    left_out_n: tuple[FloatArray, FloatArray] | None


@torch.no_grad()
def blocks_of_batch(
    student: StudentForTraining,
    batch: Batch,
    chosen_BT: Tensor,
    mixed_precision: MixedPrecision,
    *,
    block_elements: int = BLOCK_ELEMENTS,
) -> Iterator[Block]:
    """Both distributions at the chosen positions, which lie inside the loss mask.

    With the teacher's hidden states they are exact; else the teacher's is completed from the batch's support.
    """
    device = next(student.parameters()).device
    precise_device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    sequence_N, token_N = (chosen_BT & batch.loss_mask_BT).nonzero(as_tuple=True)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16"):
        hidden_BSH = hidden_states(student.causal_lm, batch.input_ids_BS, batch.attention_mask_BS)
        layer = output_head(student.causal_lm)
        head = HeadInDtype.of(layer.weight, layer.bias, hidden_BSH)
    hidden_NH = head.cast(hidden_BSH[sequence_N, batch.row_index_BT[sequence_N, token_N]])
    del hidden_BSH
    logits = student.logits
    for rows in chunks(len(sequence_N), logits.num_ids, block_elements):
        at = sequence_N[rows], token_N[rows]
        logits_nV = logits.of(hidden_NH[rows], head.weight_VH, head.bias_V).to(precise_device)
        student_nV = logits_nV.double().log_softmax(-1)
        if batch.teacher_hidden_BTH is not None:
            assert student.teacher_head is not None, "hidden states without the head that they belong to"
            dtype = torch.float32 if device.type == "mps" else torch.float64
            teacher_hidden_nH = batch.teacher_hidden_BTH[at]
            teacher_nV = student.teacher_head.logprobs(teacher_hidden_nH, num_ids=logits.num_ids, dtype=dtype)
            yield Block(at[0], student_nV, teacher_nV.to(precise_device).double(), None)
        else:
            support = batch.support_ids_BTK[at], batch.teacher_support_logprobs_BTK[at], batch.support_mask_BTK[at]
            teacher_nV, left_out_n = completed_teacher(student_nV, *(part.to(precise_device) for part in support))
            yield Block(at[0], student_nV, teacher_nV, left_out_n)


def completed_teacher(
    student_NV: Tensor, ids_NK: Tensor, teacher_NK: Tensor, mask_NK: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A whole distribution from log-probabilities on a support S: outside it log q = log pi + r_tail.

    r_tail = log((1 - q(S)) / (1 - pi(S))), so it adds up to 1, and the KL to it is the bucket's, the least that S
    allows. The spread of the log-ratio outside S is unknown and taken as none.

    Returns: [N, V] float64, and the probabilities that student and teacher have outside S, [N] each.
    """
    student_NK = gather_masked(student_NV, ids_NK, mask_NK)
    teacher_NK = torch.where(mask_NK, teacher_NK.double(), 0.0)
    student_tail_N = tail_mass(student_NK, mask_NK)
    teacher_tail_N = tail_mass(teacher_NK, mask_NK)
    tail_ratio_N1 = (teacher_tail_N.clamp_min(LEAST_TAIL).log() - student_tail_N.clamp_min(LEAST_TAIL).log())[:, None]
    correction_NK = torch.where(mask_NK, teacher_NK - student_NK - tail_ratio_N1, 0.0)
    # Padding adds 0 to id 0.
    teacher_NV = (student_NV + tail_ratio_N1).scatter_add(-1, torch.where(mask_NK, ids_NK, 0), correction_NK)
    return teacher_NV, (student_tail_N, teacher_tail_N)


def numbers_of_block(block: Block, rules: Sequence[SupportRule]) -> BlockNumbers:
    """Every estimator at every position of a block.

    Raises: NonFiniteError where the teacher lacks an id the student gives mass to.
    """
    distributions = Distributions.from_logprobs(block.student_nV, block.teacher_nV)
    everything = moments_of_everything(distributions)
    largest = max(rule.size for rule in rules)
    top = {"student": block.student_nV.topk(largest), "teacher": block.teacher_nV.topk(largest)}
    supports = {}
    for rule in rules:
        ids_nK, mask_nK = support_of(rule, top[rule.owner].values, top[rule.owner].indices)
        mask_nK &= block.student_nV.gather(-1, ids_nK) > -torch.inf  # dropped ids, which no support holds
        outside = moments_outside(distributions, ids_nK, mask_nK)
        support = SupportLogprobs(
            gather_masked(block.student_nV, ids_nK, mask_nK), gather_masked(block.teacher_nV, ids_nK, mask_nK), mask_nK
        )
        supports[rule] = SupportNumbers(
            num_ids_n=_host(mask_nK.sum(-1)),
            largest_id_n=_host(torch.where(mask_nK, ids_nK, 0).amax(-1)),
            left_out_n=_host(outside.pi),
            variances_n=_hosts(variances_of_support(everything, outside, support)),
        )
    return BlockNumbers(
        sequence_n=_host(block.sequence_n),
        kl_n=_host(-everything.pi_r),
        signal_n=_host(everything.squared_mean(0.0)),
        variances_n=_hosts(variances_without_support(everything)),
        supports=supports,
        left_out_n=None if block.left_out_n is None else (_host(block.left_out_n[0]), _host(block.left_out_n[1])),
    )


def support_of(rule: SupportRule, top_nK: Tensor, top_ids_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask, [n, rule.size] each, from an owner's most likely ids and their log-probabilities, sorted."""
    support = adaptive_support(top_nK, torch.zeros_like(top_nK[:, 0]), top_k=rule.size, support_mass=rule.mass)
    column_K = torch.arange(support.ids_BK.shape[1], device=top_nK.device)
    return top_ids_nK.gather(-1, support.ids_BK), column_K < support.counts_B[:, None]


def choose_positions(num_rows: Sequence[int], max_positions: int, seed: int) -> list[BoolArray]:
    """Which rows of each sequence are measured: all, or `max_positions` of them drawn with equal chances.

    Args: num_rows: of each sequence.
    """
    total = sum(num_rows)
    chosen = np.zeros(total, np.bool_)
    chosen[np.random.default_rng(seed).permutation(total)[:max_positions]] = True
    return np.split(chosen, np.cumsum(num_rows)[:-1])


def assemble(
    blocks: Sequence[BlockNumbers],
    rollouts: Sequence[Rollout],
    chosen: Sequence[BoolArray],
    *,
    float_type: FloatTypeName,
    completed: tuple[Owner, int] | None,
) -> Measurement:
    """All blocks in one, with what each rule's supports take on the wire.

    Args:
        blocks: `sequence_n` counts `rollouts` here; a rollout's positions come in their order.
        chosen: rows of each rollout that were measured.
        completed: whose support of how many ids the teacher's distribution was completed from; None: it is exact.
    """
    rollout_N = np.concatenate([block.sequence_n for block in blocks])

    def joined(parts: Iterable[npt.NDArray[Scalar]]) -> npt.NDArray[Scalar]:
        return np.concatenate(list(parts))

    def joined_by_name(parts: Sequence[dict[str, FloatArray]]) -> dict[str, FloatArray]:
        return {name: joined(part[name] for part in parts) for name in parts[0]}

    supports = {}
    for rule in blocks[0].supports:
        parts = [block.supports[rule] for block in blocks]
        num_ids_N, largest_id_N = joined(p.num_ids_n for p in parts), joined(p.largest_id_n for p in parts)
        num_bytes = 0
        for index, (rollout, chosen_T) in enumerate(zip(rollouts, chosen, strict=True)):
            of_rollout_N = rollout_N == index
            num_bytes += bytes_of_sequence(
                rollout.completion_ids[: len(chosen_T)][chosen_T],
                num_ids_N[of_rollout_N],
                largest_id=int(largest_id_N[of_rollout_N].max()),
                owner=rule.owner,
                float_type=float_type,
            )
        supports[rule] = SupportValues(
            num_ids_N=num_ids_N,
            left_out_N=joined(p.left_out_n for p in parts),
            variances_N=joined_by_name([p.variances_n for p in parts]),
            bytes_per_token=num_bytes / len(rollout_N),
        )
    approximation = None
    if completed is not None:
        approximation = Approximation(
            *completed,
            student_left_out_N=joined(b.left_out_n[0] for b in blocks if b.left_out_n is not None),
            teacher_left_out_N=joined(b.left_out_n[1] for b in blocks if b.left_out_n is not None),
        )
    return Measurement(
        prompt_N=np.array([rollout.key.prompt_index for rollout in rollouts])[rollout_N],
        kl_N=joined(block.kl_n for block in blocks),
        signal_N=joined(block.signal_n for block in blocks),
        variances_N=joined_by_name([block.variances_n for block in blocks]),
        supports=supports,
        approximation=approximation,
    )


def _host(values_n: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = values_n.cpu().numpy()
    return array


def _hosts(values_n: dict[str, Tensor]) -> dict[str, FloatArray]:
    return {name: _host(value_n) for name, value_n in values_n.items()}
