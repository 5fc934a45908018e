"""A rollout of text that somebody else sampled: what the student knows at each position, from its hidden states.

Axes: T completion tokens, n of one chunk, V vocabulary (the ids that both sides have), H hidden size. Natural log.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vopd_client.linear_logprobs import CHUNK_ELEMENTS, HeadInDtype, Logits, chunks
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.support import adaptive_support
from vopd_proto.arrays import IntArray


class Recalled(NamedTuple):
    """entropy_T: the student's, of every position, without a gradient."""

    rollout: Rollout
    entropy_T: Tensor


@torch.no_grad()
def recall(
    key: RolloutKey,
    prompt_ids: IntArray,
    completion_ids: IntArray,
    hidden_TH: Tensor,
    head: HeadInDtype,
    logits: Logits,
    *,
    top_k: int,
    support_mass: float,
) -> Recalled:
    """The rollout that sampling with these weights would have recorded: the support is a function of the state alone.

    `ended` is False: only a loss that drops end tokens would look at it.

    Args: hidden_TH: row t predicts completion token t. top_k, support_mass: see `adaptive_support`.
    """
    sampled_T = torch.from_numpy(completion_ids).to(hidden_TH.device)
    parts = [
        _positions(hidden_TH[rows], sampled_T[rows], head, logits, top_k=top_k, support_mass=support_mass)
        for rows in chunks(len(sampled_T), logits.num_ids, CHUNK_ELEMENTS)
    ]
    support_ids, counts_T, mass_T, sampled_logprobs_T, entropy_T = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    rollout = Rollout(
        key=key,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        behaviour_logprobs_T=sampled_logprobs_T.cpu().numpy().astype(np.float32),
        support_ids=support_ids.cpu().numpy(),
        support_counts_T=counts_T.cpu().numpy(),
        support_mass_T=mass_T.cpu().numpy().astype(np.float32),
        ended=False,
    )
    return Recalled(rollout, entropy_T)


def _positions(
    hidden_nH: Tensor, sampled_n: Tensor, head: HeadInDtype, logits: Logits, *, top_k: int, support_mass: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Support ids (flat), how many of them a position, their mass, log pi of the sampled token, and the entropy."""
    with torch.autocast(hidden_nH.device.type, enabled=False):  # the product has its dtype from the head already
        logits_nV = logits.of(head.cast(hidden_nH), head.weight_VH, head.bias_V)
        log_z_n = logits_nV.logsumexp(dim=-1)
        support = adaptive_support(logits_nV, log_z_n, top_k=top_k, support_mass=support_mass)
        is_kept_nK = torch.arange(support.ids_BK.shape[1], device=log_z_n.device) < support.counts_B[:, None]
        # A token that the two sides do not share has no probability here; it is refused when rows are aligned.
        sampled_logits_n = logits_nV.gather(1, sampled_n.clamp(max=logits.num_ids - 1)[:, None])[:, 0]
        mean_logit_n = (logits_nV.softmax(dim=-1) * logits_nV).sum(dim=-1)
        return (
            support.ids_BK[is_kept_nK],
            support.counts_B,
            support.mass_B,
            sampled_logits_n - log_z_n,
            log_z_n - mean_logit_n,
        )
