"""The student's log-probabilities from its last hidden states, without logits for all rows at once.

Axes: N rows (completion positions, flattened), K support size, V vocabulary (rows of the head), H hidden size.
Natural log, nats.

The largest arrays are one chunk's logits, [chunk_rows, V]: the backward pass computes them again, chunk by chunk,
instead of keeping [N, V]. The product with the head runs in the autocast dtype, everything after it in float32
(float64 when the head computes in float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class LinearLogprobs(NamedTuple):
    """sampled_N and support_NK carry gradients; sum_pi_squared_N = sum over the vocabulary of pi^2 does not."""

    sampled_N: Tensor
    support_NK: Tensor
    sum_pi_squared_N: Tensor


def linear_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    sampled_ids_N: Tensor,
    support_ids_NK: Tensor,
    support_mask_NK: Tensor,
    *,
    temperature: float,
    num_shared_ids: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dropped_ids: tuple[int, ...] = (),
    chunk_rows: int = 1024,
) -> LinearLogprobs:
    """log pi at the sampled token and on the support, for every row.

    Equal to log_softmax(logits[:, :num_shared_ids] / temperature) gathered at the ids, with
    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap).

    Args:
        hidden_NH: last hidden states, after the final norm. Gradients reach it, weight_VH and bias_V.
        sampled_ids_N: int64 in [0, num_shared_ids), at padding too.
        support_ids_NK: int64; columns outside support_mask_NK may hold anything and come back as 0, without gradient.
        temperature: of the distillation; divides the logits.
        num_shared_ids: the ids that both sides have are a prefix; the others are left out of the softmax.
        logit_scale, softcap: what the model does to its logits, in this order; softcap None: nothing.
        dropped_ids: ids below num_shared_ids that are left out of the softmax too; never sampled, never in a support.
        chunk_rows: rows whose logits exist at the same time.
    """
    # Sliced once, out here: the gradient of a slice is an array as large as the whole head.
    weight_VH, bias_V = _shared_rows(weight_VH, bias_V, num_shared_ids)
    ids_NK = torch.cat([sampled_ids_N[:, None], support_ids_NK], dim=1)
    mask_NK = torch.cat([torch.ones_like(sampled_ids_N, dtype=torch.bool)[:, None], support_mask_NK], dim=1)
    is_training = torch.is_grad_enabled()

    chunks: list[tuple[Tensor, Tensor]] = []
    for start in range(0, max(len(hidden_NH), 1), chunk_rows):  # one empty chunk when there are no rows
        rows = slice(start, start + chunk_rows)
        arguments = (hidden_NH[rows], weight_VH, bias_V, ids_NK[rows], mask_NK[rows])
        settings = (temperature, logit_scale, softcap, dropped_ids)
        if is_training:
            # Nothing in a chunk is random, so the generator's state need not be kept for the second forward.
            chunk = checkpoint(_chunk_logprobs, *arguments, *settings, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_logprobs(*arguments, *settings)
        chunks.append(chunk)

    logprobs_NK = torch.cat([logprobs for logprobs, _ in chunks])
    sum_pi_squared_N = torch.cat([sum_pi_squared for _, sum_pi_squared in chunks])
    return LinearLogprobs(logprobs_NK[:, 0], logprobs_NK[:, 1:], sum_pi_squared_N)


def full_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    *,
    temperature: float,
    num_shared_ids: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dropped_ids: tuple[int, ...] = (),
) -> Tensor:
    """log pi of every shared id, [N, num_shared_ids], with a gradient; for the objectives over the whole vocabulary.

    The arguments are those of `linear_logprobs`. The result itself is [N, V], so nothing is gained by chunks.
    """
    weight_VH, bias_V = _shared_rows(weight_VH, bias_V, num_shared_ids)
    logits_NV = _logits(hidden_NH, weight_VH, bias_V, temperature, logit_scale, softcap, dropped_ids)
    return torch.log_softmax(logits_NV, dim=-1)


def gather_masked(values_NV: Tensor, ids_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """values_NV at the ids, [N, K]; exactly 0 outside the mask, without gradient, whatever the ids are there."""
    safe_ids_NK = torch.where(mask_NK, ids_NK, 0)
    return torch.where(mask_NK, values_NV.gather(-1, safe_ids_NK), 0.0)


def _shared_rows(weight_VH: Tensor, bias_V: Tensor | None, num_shared_ids: int) -> tuple[Tensor, Tensor | None]:
    """The head's rows of the ids that both sides have."""
    if num_shared_ids > len(weight_VH):
        raise ValueError(f"num_shared_ids {num_shared_ids} > {len(weight_VH)} rows of the student's head")
    if num_shared_ids == len(weight_VH):
        return weight_VH, bias_V
    return weight_VH[:num_shared_ids], None if bias_V is None else bias_V[:num_shared_ids]


def _logits(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    dropped_ids: tuple[int, ...],
) -> Tensor:
    """The logits at the distillation's temperature, [N, V] float32 or float64."""
    # Under autocast the head is cast here, once a chunk: cast once for all chunks, its gradient would add up in
    # bfloat16 over them; cast here, it adds up in float32.
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    if logit_scale != 1.0:
        logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    if dropped_ids:
        logits_NV = logits_NV.index_fill(-1, torch.tensor(dropped_ids, device=logits_NV.device), float("-inf"))
    return logits_NV if temperature == 1.0 else logits_NV / temperature


def _chunk_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ids_NK: Tensor,
    mask_NK: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    dropped_ids: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """log pi at the ids [n, K], 0 outside the mask, and sum pi^2 [n], for one chunk of rows."""
    logits_NV = _logits(hidden_NH, weight_VH, bias_V, temperature, logit_scale, softcap, dropped_ids)
    log_z_N = torch.logsumexp(logits_NV, dim=-1)
    # One gather for sampled token and support alike: its gradient is one [n, V] array, not two.
    logprobs_NK = torch.where(mask_NK, gather_masked(logits_NV, ids_NK, mask_NK) - log_z_N[:, None], 0.0)
    with torch.no_grad():
        sum_pi_squared_N = torch.exp(2 * (logits_NV - log_z_N[:, None])).sum(-1)
    return logprobs_NK, sum_pi_squared_N
