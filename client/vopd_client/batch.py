"""Rollouts and their scores as padded tensors.

Axes: B sequences, S input tokens (prompt + completion, right-padded), T completion tokens, K support size,
V vocabulary, C prompt tokens. Row t of every [B, T] array belongs to completion token t, which the model predicts
from input position `row_index_BT[b, t]` = C_b - 1 + t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vopd_client.alignment import AlignedSequence, BoolArray, SupportOwner, align
from vopd_client.errors import AlignmentError
from vopd_client.like_lengths import TRAINING_COST_TOKENS, plan_like_lengths
from vopd_client.rollouts.base import Rollout
from vopd_client.types import SequenceScores


@dataclass(frozen=True)
class Batch:
    """One microbatch. Padding is False in the masks and holds harmless finite numbers everywhere else."""

    input_ids_BS: Tensor  # int64
    attention_mask_BS: Tensor  # int64, 1 at real tokens
    row_index_BT: Tensor  # int64, 0 at padding
    completion_ids_BT: Tensor  # int64
    loss_mask_BT: Tensor  # bool
    support_ids_BTK: Tensor  # int64
    support_mask_BTK: Tensor  # bool
    behaviour_logprobs_BT: Tensor  # float32
    teacher_logprobs_BT: Tensor  # float32
    teacher_support_logprobs_BTK: Tensor  # float32
    task_advantages_BT: Tensor  # float32, the same at every token of a completion
    teacher_hidden_BTH: Tensor | None  # float32, only when the whole vocabulary was asked for
    prompt_names: tuple[str, ...]  # file:line of each sequence's prompt, for error messages

    @property
    def student_inputs(self) -> dict[str, Tensor | None]:
        """The arguments of `StudentForTraining.forward`, by name."""
        return {
            "input_ids_BS": self.input_ids_BS,
            "attention_mask_BS": self.attention_mask_BS,
            "row_index_BT": self.row_index_BT,
            "completion_ids_BT": self.completion_ids_BT,
            "support_ids_BTK": self.support_ids_BTK,
            "support_mask_BTK": self.support_mask_BTK,
            "loss_mask_BT": self.loss_mask_BT,
            "teacher_hidden_BTH": self.teacher_hidden_BTH,
        }

    @property
    def num_valid_tokens(self) -> int:
        return int(self.loss_mask_BT.sum())

    def to(self, device: torch.device) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        return replace(self, **moved)


def collate(
    rollouts: Sequence[Rollout],
    scores: Sequence[SequenceScores],
    *,
    prompt_names: Sequence[str],
    pad_id: int,
    num_shared_ids: int,
    support: SupportOwner = "student",
    max_support: int | None = None,
    drop_end_ids: frozenset[int] = frozenset(),
    task_advantages: Sequence[float] | None = None,
    loss_masks: Sequence[BoolArray] | None = None,
) -> Batch:
    """Pads rollouts and their scores into one microbatch; nothing is invented and nothing is dropped silently.

    Args:
        scores: one a rollout, in the same order. With support "student" their support log-probabilities belong to
            the rollout's recorded ids, in the same flat order; with "teacher" S is the teacher's own ids, as they
            came; with "none" S is empty, and with "vocabulary" too, where the hidden states are taken instead. From S
            come out the ids that one side does not have: those outside [0, num_shared_ids) and those with a teacher
            log-probability of -inf.
        prompt_names: file:line of each rollout's prompt.
        pad_id: fills input_ids_BS; an embedding row must exist for it.
        max_support: the most ids a position may have; None: any number.
        drop_end_ids: an end of the student's with one of these has its row masked out of the loss.
        task_advantages: of each rollout, see `task_rewards`; None: 0.
        loss_masks: [T] bool of each rollout, False at tokens that stay out of the loss, beside those that a rollout
            itself says were not sampled; None: no others. The models read masked tokens as they are.

    Raises: AlignmentError when numbers of rows or ids disagree, for missing hidden states, for a sampled token in the
        loss that the two sides do not share, and for an id that occurs twice in one position's support.
    """
    if not len(rollouts) == len(scores) == len(prompt_names) > 0:
        raise AlignmentError(
            f"{len(rollouts)} rollouts, {len(scores)} scores and {len(prompt_names)} prompt names make no batch"
        )
    if loss_masks is not None and len(loss_masks) != len(rollouts):
        raise AlignmentError(f"{len(loss_masks)} loss masks for {len(rollouts)} rollouts")
    masks: Sequence[BoolArray | None] = [None] * len(rollouts) if loss_masks is None else loss_masks
    aligned = [
        align(
            rollout,
            score,
            prompt_name=name,
            support=support,
            num_shared_ids=num_shared_ids,
            max_support=max_support,
            drop_end_ids=drop_end_ids,
            loss_mask_T=loss_mask_T,
        )
        for rollout, score, name, loss_mask_T in zip(rollouts, scores, prompt_names, masks, strict=True)
    ]
    inputs = [np.concatenate([rollout.prompt_ids, rollout.completion_ids]) for rollout in rollouts]
    # Row C-1, the last of the prompt, predicts completion token 0.
    rows = [np.arange(len(r.completion_ids)) + len(r.prompt_ids) - 1 for r in rollouts]
    return Batch(
        input_ids_BS=_pad(inputs, fill=pad_id),
        attention_mask_BS=_pad([np.ones(len(ids), np.int64) for ids in inputs]),
        row_index_BT=_pad(rows),
        completion_ids_BT=_pad([sequence.completion_ids_T for sequence in aligned]),
        loss_mask_BT=_pad([sequence.in_loss_T for sequence in aligned]),
        support_ids_BTK=_pad([sequence.support_ids_TK for sequence in aligned]),
        support_mask_BTK=_pad([sequence.support_mask_TK for sequence in aligned]),
        behaviour_logprobs_BT=_pad([sequence.behaviour_logprobs_T for sequence in aligned]),
        teacher_logprobs_BT=_pad([sequence.teacher_logprobs_T for sequence in aligned]),
        teacher_support_logprobs_BTK=_pad([sequence.teacher_support_logprobs_TK for sequence in aligned]),
        task_advantages_BT=_pad(
            [
                np.full(len(rollout.completion_ids), advantage, np.float32)
                for rollout, advantage in zip(rollouts, task_advantages or [0.0] * len(rollouts), strict=True)
            ]
        ),
        teacher_hidden_BTH=_pad_hidden_states(scores, aligned, prompt_names) if support == "vocabulary" else None,
        prompt_names=tuple(prompt_names),
    )


def _pad(arrays: Sequence[npt.NDArray[Any]], *, fill: int = 0) -> Tensor:
    """Stacks arrays of one dtype and rank, each padded at its ends to the largest, [B, ...]."""
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    padded = np.full((len(arrays), *shape), fill, arrays[0].dtype)
    for target, array in zip(padded, arrays, strict=True):
        target[tuple(slice(size) for size in array.shape)] = array
    return torch.from_numpy(padded)


def _pad_hidden_states(
    scores: Sequence[SequenceScores], aligned: Sequence[AlignedSequence], prompt_names: Sequence[str]
) -> Tensor:
    """The teacher's final hidden states, [B, T, H]; 0 at rows outside the loss."""
    kept = []
    for score, sequence, name in zip(scores, aligned, prompt_names, strict=True):
        hidden_TH = score.hidden_states_TH
        if hidden_TH is None or len(hidden_TH) != len(sequence.in_loss_T):
            found = "no" if hidden_TH is None else str(len(hidden_TH))
            raise AlignmentError(
                f"{found} hidden states from the teacher for the {len(sequence.in_loss_T)} completion tokens of {name}"
            )
        kept.append(np.where(sequence.in_loss_T[:, None], hidden_TH, np.float32(0)))
    return _pad(kept)


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups sequences so that none pads to more than `max_tokens`: (sequences) x (longest of them).

    Sequences of like length go together, the longest first, so what does not fit in memory fails at once; where one
    more microbatch saves more padding than it costs, there is one more. A sequence longer than max_tokens makes a
    microbatch of its own. The same lengths give the same plan.

    Args: lengths: input tokens of each sequence. Returns: indices into `lengths`, each once.
    """
    return plan_like_lengths(lengths, pass_cost_tokens=TRAINING_COST_TOKENS, max_tokens=max_tokens)
