"""The adaptive support: which ids of a position the teacher is asked about.

Axes: B rows, V ids that may be sampled, K support size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

# Ids whose largest logit is looked at first: a selection over all ids of a vocabulary costs a CPU twice as much.
IDS_PER_BLOCK = 32


class AdaptiveSupport(NamedTuple):
    """The student's top ids of each row, most likely first; row b's support is ids_BK[b, :counts_B[b]]."""

    ids_BK: Tensor  # int64
    counts_B: Tensor  # int64, in [1, K]
    mass_B: Tensor  # float32, the probability inside the support


def adaptive_support(
    logits_BV: Tensor, log_normaliser_B: Tensor, *, top_k: int, support_mass: float
) -> AdaptiveSupport:
    """At most `top_k` ids a row, and no more than reach the probability `support_mass`.

    The id that reaches the mass is included, so a support is never empty. It is a function of the logits
    alone: the drawn token is not put into it, which would bias the baseline (see docs/method.md).

    Args:
        logits_BV: float32, at the run's temperature.
        log_normaliser_B: their log-sum-exp.
        support_mass: in (0, 1]; at 1 every row holds top_k ids, short of ids of probability zero.
    """
    values_BK, ids_BK = largest(logits_BV, min(top_k, logits_BV.shape[1]))
    probabilities_BK = (values_BK - log_normaliser_B[:, None]).exp()
    reached_BK = probabilities_BK.cumsum(dim=-1)
    kept_BK = probabilities_BK > 0
    if support_mass < 1:  # at 1, rounding could reach the mass early
        kept_BK &= pad(reached_BK, (1, -1)) < support_mass
    counts_B = kept_BK.sum(dim=-1).clamp(min=1)
    mass_B = reached_BK.gather(1, counts_B[:, None] - 1).squeeze(1).clamp(max=1.0)
    return AdaptiveSupport(ids_BK, counts_B, mass_B)


def largest(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their ids, [B, k] each, largest first; of equal ones any.

    On a CPU, from the k blocks of ids whose largest logits are the largest: every one of the k largest is in one of
    them, since at most k - 1 blocks can hold something larger.
    """
    num_ids = logits_BV.shape[1]
    if logits_BV.device.type != "cpu" or k * IDS_PER_BLOCK * 2 > num_ids:
        top = logits_BV.topk(k, dim=-1)
        return top.values, top.indices
    if num_ids % IDS_PER_BLOCK:
        logits_BV = pad(logits_BV, (0, -num_ids % IDS_PER_BLOCK), value=-math.inf)
    blocks_BNI = logits_BV.view(len(logits_BV), -1, IDS_PER_BLOCK)
    chosen_Bk = blocks_BNI.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    kept_BM = blocks_BNI.gather(1, chosen_Bk[:, :, None].expand(-1, -1, IDS_PER_BLOCK)).flatten(1)
    top = kept_BM.topk(k, dim=-1)
    block_Bk = chosen_Bk.gather(1, top.indices // IDS_PER_BLOCK)
    # Where fewer than k ids have a probability, what fills up the rest may be padding.
    return top.values, (block_Bk * IDS_PER_BLOCK + top.indices % IDS_PER_BLOCK).clamp(max=num_ids - 1)
