"""The student's log-probabilities from its last hidden states, without logits for all rows at once.

Axes: N rows (completion positions, flattened), n rows of one chunk, K support size, V vocabulary (rows of the head),
H hidden size. Natural log, nats.

The largest arrays are a few chunks of logits, [n, V], in the forward and in the backward pass, which computes the
logits again, chunk by chunk, instead of keeping [N, V]. The products with the head run in the autocast dtype; the
softmax, and the sum of the chunks' gradients of the head, in float32 (float64 when the head computes in float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Float32 logits that one chunk holds, 64 MiB: with V = 49,152 that is 341 rows. The gradient of the head is added to
# once a chunk, which many small chunks would pay for; a few arrays of this size exist at once.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Logits:
    """From hidden @ weight.T + bias to the logits whose softmax is meant.

    num_ids: only the first so many ids take part in the softmax.
    temperature: of the distillation; divides the logits.
    scale, softcap: what the model itself does to them before, in this order: times scale, then
        softcap * tanh(. / softcap); None: nothing.
    dropped_ids: ids below num_ids that are left out of the softmax too; never sampled, never in a support.
    """

    num_ids: int
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    dropped_ids: tuple[int, ...] = ()

    def of(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        """[N, num_ids] float32, or float64 where the product is; -inf at dropped ids. Without a gradient.

        out: [at least N, num_ids], of the result's dtype, for the result: fresh memory costs a page fault every 4 kB.
        """
        if self.num_ids > len(weight_VH):
            raise ValueError(f"num_ids {self.num_ids} > {len(weight_VH)} rows of the head")
        with torch.no_grad():
            weight_VH, bias_V = weight_VH[: self.num_ids], None if bias_V is None else bias_V[: self.num_ids]
            logits_NV = _product(hidden_NH, weight_VH, bias_V, out)
            if self.scale != 1.0:
                logits_NV.mul_(self.scale)
            if self.softcap is not None:
                logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
            if self.dropped_ids:
                logits_NV.index_fill_(-1, torch.tensor(self.dropped_ids, device=logits_NV.device), -torch.inf)
            return logits_NV if self.temperature == 1.0 else logits_NV.div_(self.temperature)

    def backward_(self, grad_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """The gradient of the product from that of the logits, in the place of `grad_NV`; 0 at dropped ids."""
        factor = self.scale / self.temperature
        if self.softcap is not None:
            capped_NV = logits_NV * (self.temperature / self.softcap)
            if self.dropped_ids:
                capped_NV.index_fill_(-1, torch.tensor(self.dropped_ids, device=capped_NV.device), 0.0)
            grad_NV.mul_(1 - capped_NV.square_())
        return grad_NV if factor == 1.0 else grad_NV.mul_(factor)


def _product(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias in the weight's dtype, then float32 or float64."""
    if out is None or out.dtype != weight_VH.dtype:
        product_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
        if out is not None:
            return out[: len(product_NV)].copy_(product_NV)
        return product_NV if product_NV.dtype == torch.float64 else product_NV.float()
    product_NV = torch.mm(hidden_NH, weight_VH.T, out=out[: len(hidden_NH)])
    return product_NV if bias_V is None else product_NV.add_(bias_V)


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
    logits: Logits,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> LinearLogprobs:
    """log pi at the sampled token and on the support, for every row.

    Equal to log_softmax(logits.of(hidden, weight, bias)) gathered at the ids.

    Args:
        hidden_NH: last hidden states, after the final norm. Gradients reach it, weight_VH and bias_V.
        sampled_ids_N: int64 in [0, logits.num_ids), at padding too.
        support_ids_NK: int64; columns outside support_mask_NK may hold anything and come back as 0, without gradient.
        chunk_elements: logits that one chunk holds, at most, but for a single row.
    """
    ids_NK = torch.cat([sampled_ids_N[:, None], support_ids_NK], dim=1)
    mask_NK = torch.cat([torch.ones_like(sampled_ids_N, dtype=torch.bool)[:, None], support_mask_NK], dim=1)
    logprobs_NK, sum_pi_squared_N = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, ids_NK, mask_NK, logits, chunk_elements
    )
    return LinearLogprobs(logprobs_NK[:, 0], logprobs_NK[:, 1:], sum_pi_squared_N)


class _LinearLogprobs(torch.autograd.Function):
    """log pi at ids_NK, 0 outside mask_NK, and sum pi^2: one product a chunk forward, three backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_NK: Tensor,
        mask_NK: Tensor,
        logits: Logits,
        chunk_elements: int,
    ) -> tuple[Tensor, Tensor]:
        head = HeadInDtype.of(weight_VH, bias_V, hidden_NH)
        dtype = head.softmax_dtype
        logprobs_NK = torch.zeros(ids_NK.shape, dtype=dtype, device=hidden_NH.device)
        sum_pi_squared_N = torch.zeros(len(hidden_NH), dtype=dtype, device=hidden_NH.device)
        log_z_N = torch.zeros_like(sum_pi_squared_N)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            buffer_nV = chunk_buffer(len(hidden_NH), logits.num_ids, chunk_elements, log_z_N)
            for rows in chunks(len(hidden_NH), logits.num_ids, chunk_elements):
                logits_nV = logits.of(head.cast(hidden_NH[rows]), head.weight_VH, head.bias_V, out=buffer_nV)
                gathered_nK = gather_masked(logits_nV, ids_NK[rows], mask_NK[rows])
                largest_n1 = logits_nV.amax(-1, keepdim=True)
                total_n = logits_nV.sub_(largest_n1).exp_().sum(-1)
                log_z_N[rows] = largest_n1[:, 0] + total_n.log()
                sum_pi_squared_N[rows] = inner(logits_nV, logits_nV) / total_n.square()
                logprobs_NK[rows] = torch.where(mask_NK[rows], gathered_nK - log_z_N[rows, None], 0.0)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, ids_NK, mask_NK, log_z_N)
        ctx.logits, ctx.chunk_elements, ctx.product_dtype = logits, chunk_elements, head.weight_VH.dtype
        ctx.mark_non_differentiable(sum_pi_squared_N)
        return logprobs_NK, sum_pi_squared_N

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor, _grad_sum_pi_squared_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, ids_NK, mask_NK, log_z_N = ctx.saved_tensors
        gradients = HeadGradients.zeros(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad[:3])
        head = HeadInDtype.of(weight_VH, bias_V, hidden_NH, dtype=ctx.product_dtype)
        add_gradients_of_logprobs(
            gradients, grad_NK, ids_NK, mask_NK, log_z_N, head, ctx.logits, chunk_elements=ctx.chunk_elements
        )
        return gradients.hidden_NH, gradients.weight_VH, gradients.bias_V, None, None, None, None


def add_gradients_of_logprobs(
    gradients: HeadGradients,
    grad_NK: Tensor,
    ids_NK: Tensor,
    mask_NK: Tensor,
    log_z_N: Tensor,
    head: HeadInDtype,
    logits: Logits,
    *,
    chunk_elements: int,
) -> None:
    """Adds what grad_NK, the gradient of log pi at ids_NK, makes of the head's inputs; computes the logits again."""
    grad_NK = torch.where(mask_NK, grad_NK, 0.0)
    safe_ids_NK = torch.where(mask_NK, ids_NK, 0)
    with torch.autocast(log_z_N.device.type, enabled=False):
        buffer_nV = chunk_buffer(len(log_z_N), logits.num_ids, chunk_elements, log_z_N)
        for rows in chunks(len(log_z_N), logits.num_ids, chunk_elements):
            logits_nV = logits.of(head.cast(gradients.input_NH[rows]), head.weight_VH, head.bias_V, out=buffer_nV)
            kept_nV = logits_nV if logits.softcap is None else logits_nV.clone()
            # d log pi(v) / d logits = e_v - pi, summed over the columns that were asked for.
            grad_nV = logits_nV.sub_(log_z_N[rows, None]).exp_().mul_(-grad_NK[rows].sum(-1, keepdim=True))
            grad_nV.scatter_add_(-1, safe_ids_NK[rows], grad_NK[rows])
            gradients.add_rows(rows, logits.backward_(grad_nV, kept_nV), head)


@dataclass(frozen=True)
class HeadInDtype:
    """The output layer as the product is to see it: in the autocast dtype where there is one, cast once."""

    weight_VH: Tensor
    bias_V: Tensor | None

    @classmethod
    def of(
        cls, weight_VH: Tensor, bias_V: Tensor | None, hidden_NH: Tensor, *, dtype: torch.dtype | None = None
    ) -> HeadInDtype:
        device = hidden_NH.device.type
        if dtype is None:
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        return cls(weight_VH.detach().to(dtype), None if bias_V is None else bias_V.detach().to(dtype))

    @property
    def softmax_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight_VH.dtype == torch.float64 else torch.float32

    def cast(self, values: Tensor) -> Tensor:
        return values.detach().to(self.weight_VH.dtype)


@dataclass(frozen=True)
class HeadGradients:
    """Gradients of the head's three inputs, added up over chunks; None for what needs none."""

    input_NH: Tensor  # the hidden states themselves
    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(
        cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needed: tuple[bool, ...]
    ) -> HeadGradients:
        return cls(
            hidden_NH.detach(),
            torch.zeros_like(hidden_NH) if needed[0] else None,
            torch.zeros_like(weight_VH) if needed[1] else None,
            torch.zeros_like(bias_V) if bias_V is not None and needed[2] else None,
        )

    def add_rows(self, rows: slice, grad_nV: Tensor, head: HeadInDtype) -> None:
        """One chunk. grad_nV: gradient of the product, [n, num_ids]."""
        num_ids = grad_nV.shape[-1]
        if self.bias_V is not None:
            self.bias_V[:num_ids] += grad_nV.sum(0)
        grad_nV = grad_nV.to(head.weight_VH.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[rows] += grad_nV @ head.weight_VH[:num_ids]
        if self.weight_VH is not None:
            hidden_nH = head.cast(self.input_NH[rows])
            if grad_nV.dtype == self.weight_VH.dtype:
                self.weight_VH[:num_ids].addmm_(grad_nV.T, hidden_nH)
            else:  # the chunks add up in the head's own float32, whatever the products run in
                self.weight_VH[:num_ids] += grad_nV.T @ hidden_nH

    def scale_(self, factor: Tensor) -> None:
        """Times a number, in place."""
        for gradient in (self.hidden_NH, self.weight_VH, self.bias_V):
            if gradient is not None:
                gradient.mul_(factor)


def chunks(num_rows: int, num_ids: int, chunk_elements: int) -> Iterator[slice]:
    """Consecutive rows whose logits are at most `chunk_elements`, at least one row each."""
    size = max(1, chunk_elements // num_ids)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def chunk_buffer(num_rows: int, num_ids: int, chunk_elements: int, like: Tensor) -> Tensor:
    """Memory for one chunk's logits after the other, of the dtype and on the device of `like`."""
    return like.new_empty(min(num_rows, max(1, chunk_elements // num_ids)), num_ids)


def inner(left_nV: Tensor, right_nV: Tensor) -> Tensor:
    """[n] inner products of rows, without an array of their size."""
    return torch.bmm(left_nV[:, None, :], right_nV[:, :, None])[:, 0, 0]


def full_logprobs(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, logits: Logits) -> Tensor:
    """log pi of every id that takes part, [N, num_ids], without a gradient; for few rows: nothing here is chunked."""
    return torch.log_softmax(logits.of(hidden_NH, weight_VH, bias_V), dim=-1)


def gather_masked(values_NV: Tensor, ids_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """values_NV at the ids, [N, K]; exactly 0 outside the mask, without gradient, whatever the ids are there."""
    safe_ids_NK = torch.where(mask_NK, ids_NK, 0)
    return torch.where(mask_NK, values_NV.gather(-1, safe_ids_NK), 0.0)
