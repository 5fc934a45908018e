"""Sampling from the most likely ids only, as evaluations do.

Training never truncates: a sampled estimator whose tokens come from another distribution than the loss's is biased.
Axes: B rows, V ids that may be sampled.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import pad


def truncate(logits_BV: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits with -inf for the ids that are cut off: first all but the top k, then all outside the nucleus.

    The nucleus is the smallest set of most likely ids whose probability, among those that top_k leaves, reaches
    `top_p`; the id that reaches it is in. Of equal logits at its edge, lower ids go first; at the edge of the top k
    all are kept, which may be more than k ids.

    Args:
        logits_BV: float32, at the temperature of the draw.
        top_k: 0 cuts nothing.
        top_p: in (0, 1]; 1 cuts nothing, whatever rounding makes of the sum.

    Source: the definitions of transformers' TopKLogitsWarper and TopPLogitsWarper, in this order.
    """
    if 0 < top_k < logits_BV.shape[1]:
        smallest_kept_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, -math.inf)
    if top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        reached_BV = ordered_BV.softmax(dim=-1).cumsum(dim=-1)
        outside_BV = pad(reached_BV[:, :-1], (1, 0)) >= top_p  # what comes before already reaches it
        outside_BV = outside_BV.scatter(1, order_BV, outside_BV)
        logits_BV = logits_BV.masked_fill(outside_BV, -math.inf)
    return logits_BV
