"""The adaptive support: which ids of a position the teacher is asked about.

Axes: B rows, V ids that may be sampled, K support size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad


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
    top = logits_BV.topk(min(top_k, logits_BV.shape[1]), dim=-1)
    probabilities_BK = (top.values - log_normaliser_B[:, None]).exp()
    reached_BK = probabilities_BK.cumsum(dim=-1)
    kept_BK = probabilities_BK > 0
    if support_mass < 1:  # at 1, rounding could reach the mass early
        kept_BK &= pad(reached_BK, (1, -1)) < support_mass
    counts_B = kept_BK.sum(dim=-1).clamp(min=1)
    mass_B = reached_BK.gather(1, counts_B[:, None] - 1).squeeze(1).clamp(max=1.0)
    return AdaptiveSupport(top.indices, counts_B, mass_B)
