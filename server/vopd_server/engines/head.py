"""Log-probabilities from final hidden states, a chunk of rows at a time.

Axes: N rows (one a scored token), H hidden size, V vocabulary, M candidates over all rows, K top-k.

The product with the output head runs in the model's dtype; everything after it in float32. Nothing here
is larger than `rows_per_chunk` x V, whatever N is: log-softmax is never materialised, only its normaliser, and
hidden states that are asked for leave the device with their chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vopd_proto.arrays import Float32Array, IntArray
from vopd_server.errors import ConfigError, EngineError
from vopd_server.types import Candidates, HiddenStates, NoSupport, ScoreRequest, Scores, TeacherTopK

BoolArray = npt.NDArray[np.bool_]

# Float32 logits that exist at once: 16 MiB on a CPU, where 4 to 64 MiB measured alike with V = 49,152;
# an accelerator needs more rows at a time to be busy (256 MiB).
CPU_CHUNK_ELEMENTS = 2**22
ACCELERATOR_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The model's way from final hidden states to logits: a linear module, then scale, then soft cap."""

    linear: torch.nn.Module  # called, not unpacked: ties, biases and quantised weights are its own affair
    vocab_size: int  # V: rows of the head, padded ones included
    hidden_size: int
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """[N, V] float32, freshly allocated."""
        product = self.linear(hidden_NH)
        logits_NV: torch.Tensor = product.float() if product.dtype != torch.float32 else product
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


def output_head(model: Any) -> OutputHead:
    """The head of a transformers causal LM, with what its architecture does to the logits afterwards.

    The names differ by family and one name is used both ways, so the engine compares the result with the
    model's own logits before it serves.

    Raises: ConfigError for a model without a linear output head.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, torch.nn.Linear):  # quantised linears are subclasses
        raise ConfigError(f"{type(model).__name__} has no linear output head to score with: {linear!r}")
    config = model.config.get_text_config()
    scale = 1.0
    if isinstance(logit_scale := getattr(model, "logit_scale", None), int | float):  # Cohere
        scale *= logit_scale
    if (logits_scaling := getattr(config, "logits_scaling", None)) is not None:
        # Granite and MiniCPM divide by it, HyperCLOVA X multiplies.
        scale *= logits_scaling if config.model_type.startswith("hyperclovax") else 1.0 / logits_scaling
    for name in ("lm_head_multiplier", "output_multiplier"):  # Falcon-H1; Muse Glimmer
        scale *= getattr(config, name, None) or 1.0
    softcap_names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((cap for name in softcap_names if (cap := getattr(config, name, None))), None)
    return OutputHead(linear, linear.out_features, linear.in_features, scale, softcap)


@dataclass(frozen=True, slots=True, eq=False)
class RowQueries:
    """What is asked of N rows, the requests' rows one after the other."""

    sampled_ids_N: IntArray
    temperatures_N: Float32Array
    candidate_ids_M: IntArray
    candidate_offsets: IntArray  # [N + 1]: row n's candidates are [offsets[n], offsets[n + 1])
    top_k_N: IntArray  # 0: none asked for
    wants_hidden_N: BoolArray


@dataclass(frozen=True, slots=True, eq=False)
class RowAnswers:
    """The log-probabilities of N rows, in nats, and their hidden states.

    R: the rows with a top-k, K: the largest k. S: the rows whose hidden states are asked for.
    """

    sampled_N: Float32Array
    is_nan_N: BoolArray  # the model gave NaN in this row
    candidates_M: Float32Array
    top_logprobs_RK: Float32Array
    top_ids_RK: IntArray
    hidden_SH: Float32Array  # the model's own values, whatever its dtype


def row_queries(requests: Sequence[ScoreRequest]) -> RowQueries:
    """Flattens the requests' questions; completions may have any length, supports of several kinds may mix."""
    lengths = [len(request.completion_ids) for request in requests]
    supports = [request.support for request in requests]
    counts_N = [
        support.counts_T if isinstance(support, Candidates) else np.zeros(length, np.int64)
        for support, length in zip(supports, lengths, strict=True)
    ]
    candidate_ids = [support.ids for support in supports if isinstance(support, Candidates)]
    # Below the smallest normal float the division overflows where its limit, the greedy choice, is meant.
    temperatures = [max(request.temperature, float(np.finfo(np.float32).tiny)) for request in requests]
    top_k = [support.k if isinstance(support, TeacherTopK) else 0 for support in supports]
    return RowQueries(
        sampled_ids_N=np.concatenate([request.completion_ids for request in requests]),
        temperatures_N=np.repeat(np.array(temperatures, np.float32), lengths),
        candidate_ids_M=np.concatenate([np.empty(0, np.int64), *candidate_ids]),
        candidate_offsets=np.concatenate(([0], np.cumsum(np.concatenate(counts_N)))),
        top_k_N=np.repeat(np.array(top_k, np.int64), lengths),
        wants_hidden_N=np.repeat([isinstance(support, HiddenStates) for support in supports], lengths),
    )


def rows_per_chunk(vocab_size: int, chunk_elements: int) -> int:
    return max(1, chunk_elements // vocab_size)


def score_rows(head: OutputHead, hidden_NH: torch.Tensor, queries: RowQueries, *, chunk_rows: int) -> RowAnswers:
    """Answers `queries` from final hidden states.

    hidden_NH: [N, H], row n being the state that predicts sampled id n.
    """
    device = hidden_NH.device
    num_rows = len(queries.sampled_ids_N)
    top_rows_R = np.flatnonzero(queries.top_k_N)
    largest_k = int(queries.top_k_N.max(initial=0))
    sampled_ids_N = torch.as_tensor(queries.sampled_ids_N, device=device)
    candidate_ids_M = torch.as_tensor(queries.candidate_ids_M, device=device)
    row_of_candidate_M = torch.as_tensor(_row_of_candidate(queries.candidate_offsets), device=device)
    top_rows = torch.as_tensor(top_rows_R, device=device)
    hidden_rows_S = np.flatnonzero(queries.wants_hidden_N)

    sampled_N = torch.empty(num_rows, device=device)
    is_nan_N = torch.empty(num_rows, dtype=torch.bool, device=device)
    candidates_M = torch.empty(len(queries.candidate_ids_M), device=device)
    top_logprobs_RK = torch.empty(len(top_rows_R), largest_k, device=device)
    top_ids_RK = torch.empty(len(top_rows_R), largest_k, dtype=torch.long, device=device)
    hidden_SH = torch.empty(len(hidden_rows_S), head.hidden_size)  # in the host's memory

    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        shifted_nV, log_sum_n = shifted_logits(head, hidden_NH[start:stop], queries.temperatures_N[start:stop])
        sampled_N[start:stop] = shifted_nV.gather(1, sampled_ids_N[start:stop, None])[:, 0] - log_sum_n
        is_nan_N[start:stop] = log_sum_n.isnan()
        begin, end = queries.candidate_offsets[[start, stop]]
        if end > begin:
            rows = row_of_candidate_M[begin:end] - start
            candidates_M[begin:end] = shifted_nV[rows, candidate_ids_M[begin:end]] - log_sum_n[rows]
        begin, end = np.searchsorted(top_rows_R, (start, stop))
        if end > begin:
            rows = top_rows[begin:end] - start
            top_values, top_ids = shifted_nV[rows].topk(largest_k, dim=-1)
            top_logprobs_RK[begin:end] = top_values - log_sum_n[rows, None]
            top_ids_RK[begin:end] = top_ids
        begin, end = np.searchsorted(hidden_rows_S, (start, stop))
        if end > begin:
            rows = torch.as_tensor(hidden_rows_S[begin:end], device=device)
            hidden_SH[begin:end] = hidden_NH[rows].cpu()  # every 16-bit float is a float32
    return RowAnswers(
        sampled_N.cpu().numpy(),
        is_nan_N.cpu().numpy(),
        candidates_M.cpu().numpy(),
        top_logprobs_RK.cpu().numpy(),
        top_ids_RK.cpu().numpy(),
        hidden_SH.numpy(),
    )


def full_logprobs(head: OutputHead, hidden_TH: torch.Tensor, *, temperature: float, chunk_rows: int) -> torch.Tensor:
    """[T, V] float32 natural-log probabilities on the hidden states' device: the answer itself grows with T x V."""
    temperatures_T = np.full(len(hidden_TH), max(temperature, float(np.finfo(np.float32).tiny)), np.float32)
    logprobs_TV = torch.empty(len(hidden_TH), head.vocab_size, device=hidden_TH.device)
    for start in range(0, len(hidden_TH), chunk_rows):
        rows = slice(start, start + chunk_rows)
        shifted_nV, log_sum_n = shifted_logits(head, hidden_TH[rows], temperatures_T[rows])
        torch.sub(shifted_nV, log_sum_n[:, None], out=logprobs_TV[rows])
    return logprobs_TV


def shifted_logits(
    head: OutputHead, hidden_nH: torch.Tensor, temperatures_n: Float32Array
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits - row maximum) / temperature [n, V], and the log of the sum of its exponentials [n].

    The maximum goes before the division, so that a small temperature sends the others to -inf instead of
    the largest to +inf. A NaN anywhere in a row makes its log-sum NaN.
    """
    logits_nV = head.logits(hidden_nH)
    logits_nV.sub_(logits_nV.amax(dim=-1, keepdim=True))
    if (temperatures_n != 1.0).any():
        logits_nV.div_(torch.as_tensor(temperatures_n, device=logits_nV.device)[:, None])
    return logits_nV, logits_nV.exp().sum(dim=-1).log()


def split_answers(requests: Sequence[ScoreRequest], answers: RowAnswers) -> list[Scores | EngineError]:
    """One result a request, in order.

    A request with a NaN row, or with a hidden state that is not finite, gets an EngineError; the others their scores.
    """
    results: list[Scores | EngineError] = []
    row = candidate = top_row = hidden_row = 0
    for request in requests:
        num_rows = len(request.completion_ids)
        rows = slice(row, row + num_rows)
        row += num_rows
        support_logprobs, support_ids_TK, hidden_TH = None, None, None
        bad_rows, what = np.flatnonzero(answers.is_nan_N[rows]), "NaN"
        match request.support:
            case Candidates(ids=ids):
                support_logprobs = answers.candidates_M[candidate : candidate + len(ids)]
                candidate += len(ids)
            case TeacherTopK(k=k):
                support_logprobs = answers.top_logprobs_RK[top_row : top_row + num_rows, :k]
                support_ids_TK = answers.top_ids_RK[top_row : top_row + num_rows, :k]
                top_row += num_rows
            case HiddenStates():
                hidden_TH = answers.hidden_SH[hidden_row : hidden_row + num_rows]
                hidden_row += num_rows
                if not len(bad_rows):  # a soft cap makes finite logits of infinite hidden states
                    bad_rows = np.flatnonzero(~np.isfinite(hidden_TH).all(axis=1))
                    what = "hidden states that are not finite"
            case NoSupport():
                pass
        if len(bad_rows):
            results.append(
                EngineError(
                    f"the model gave {what} for {len(bad_rows)} of {num_rows} completion tokens, "
                    f"first at token {bad_rows[0]}"
                )
            )
        else:
            results.append(Scores(answers.sampled_N[rows], support_logprobs, support_ids_TK, hidden_TH))
    return results


def _row_of_candidate(candidate_offsets: IntArray) -> IntArray:
    """[M] the row each candidate belongs to."""
    counts_N = np.diff(candidate_offsets)
    return np.repeat(np.arange(len(counts_N)), counts_N)
