"""A student's logits and the teacher's scores, as a loss reads them: for loops whose student is not ours.

Axes: B sequences, T completion tokens (of the longest), N completion tokens of all, K support size, V vocabulary.
Row t of every array belongs to completion token t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vopd_client.alignment import BoolArray, SupportOwner
from vopd_client.batch import Batch, collate
from vopd_client.errors import AlignmentError, ConfigError
from vopd_client.linear_logprobs import gather_masked
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.student import StudentOutputs
from vopd_client.types import Candidates, HiddenStates, SequenceScores, SequenceToScore, TeacherTopK


def batch_of(
    sequences: Sequence[SequenceToScore],
    scores: Sequence[SequenceScores],
    *,
    num_shared_ids: int,
    loss_masks: Sequence[BoolArray] | None = None,
) -> Batch:
    """What the teacher was asked and what it answered as one microbatch; its contexts are the teacher's.

    Raises: AlignmentError as `collate`; ConfigError for supports of several kinds, or hidden states.
    """
    return collate(
        [_rollout(index, sequence) for index, sequence in enumerate(sequences)],
        scores,
        prompt_names=[f"sequence {index}" for index in range(len(sequences))],
        pad_id=0,
        num_shared_ids=num_shared_ids,
        support=_support_owner(sequences),
        loss_masks=loss_masks,
    )


def outputs_of(logits_BTV: Tensor, batch: Batch, *, num_shared_ids: int, temperature: float) -> StudentOutputs:
    """Plain log-softmax over the first `num_shared_ids` ids, at the rows inside the loss mask; 0 elsewhere.

    Raises: AlignmentError when there is not one row of logits a completion token.
    """
    mask_BT = batch.loss_mask_BT
    if logits_BTV.shape[:-1] != mask_BT.shape:
        raise AlignmentError(
            f"logits are {list(logits_BTV.shape)}, for {mask_BT.shape[0]} completions of up to {mask_BT.shape[1]} "
            "tokens: row t must predict completion token t (of a model's own logits, those from the last token of "
            "the context to the last but one of all)"
        )
    logits_NV = logits_BTV[mask_BT][:, :num_shared_ids]
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logprobs_NV = torch.log_softmax(logits_NV / temperature, dim=-1)

    def padded(values: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], 0 outside the mask."""
        return values.new_zeros((*mask_BT.shape, *values.shape[1:])).index_put((mask_BT,), values)

    support = gather_masked(logprobs_NV, batch.support_ids_BTK[mask_BT], batch.support_mask_BTK[mask_BT])
    return StudentOutputs(
        sampled_logprobs_BT=padded(logprobs_NV.gather(-1, batch.completion_ids_BT[mask_BT][:, None])[:, 0]),
        support_logprobs_BTK=padded(support),
        sum_pi_squared_BT=padded(logprobs_NV.detach().exp().square().sum(-1)),
    )


def _rollout(index: int, sequence: SequenceToScore) -> Rollout:
    """As if it had been sampled here, but nobody knows with what probability."""
    candidates = sequence.support if isinstance(sequence.support, Candidates) else None
    unknown_T = np.full(len(sequence.completion_ids), np.nan, np.float32)
    return Rollout(
        key=RolloutKey(0, index, 0),
        prompt_ids=sequence.context_ids,
        completion_ids=sequence.completion_ids,
        behaviour_logprobs_T=unknown_T,  # importance weights alone read it
        support_ids=candidates.ids if candidates else np.empty(0, np.int64),
        support_counts_T=candidates.counts_T if candidates else np.zeros(len(unknown_T), np.int64),
        support_mass_T=unknown_T,
        ended=False,
    )


def _support_owner(sequences: Sequence[SequenceToScore]) -> SupportOwner:
    """Whose ids the support is, of all sequences alike."""
    kinds = {type(sequence.support) for sequence in sequences}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ConfigError(f"the sequences of one loss were scored with several kinds of support: {names}")
    if HiddenStates in kinds:
        raise ConfigError("hidden states are compared by StudentForTraining, which knows the teacher's output head")
    return "student" if Candidates in kinds else "teacher" if TeacherTopK in kinds else "none"
