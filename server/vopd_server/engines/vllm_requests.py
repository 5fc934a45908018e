"""What to ask vLLM for. Pure: nothing here imports vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np

from vopd_proto.arrays import IntArray
from vopd_server.errors import UnsupportedError
from vopd_server.types import Candidates, HiddenStates, NoSupport, ScoreRequest, TeacherTopK

CONTEXT_TOKENS = "vopd_context_tokens"  # in SamplingParams.extra_args, for `vllm_scheduler`


def scoring_arguments(request: ScoreRequest, *, has_token_ids: bool) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams that say what to score, and how far the prefix cache may be read.

    has_token_ids: the runner scores given ids a position (`prompt_logprob_token_ids`). It then runs the output
        head on the scored rows only, so the sampled log-probabilities alone are asked for this way too.

    Raises: UnsupportedError for a support that this runner cannot give.
    """
    extra_args = {CONTEXT_TOKENS: len(request.context_ids)}
    match request.support:
        case TeacherTopK(k=k):
            return {"prompt_logprobs": k, "extra_args": extra_args}
        case NoSupport() if not has_token_ids:
            return {"prompt_logprobs": 0, "extra_args": extra_args}
        case NoSupport() | Candidates() if has_token_ids:
            return {
                "prompt_logprob_token_ids": token_id_columns(request),
                "prompt_logprob_start": len(request.context_ids) - 1,
                "extra_args": extra_args,
            }
        case NoSupport() | Candidates() | HiddenStates():
            raise UnsupportedError(f"vLLM's runner has no {request.support.kind} support here")


def token_id_columns(request: ScoreRequest) -> IntArray:
    """[T, 1 + K] int64: the sampled token, then the position's candidates, padded with -1."""
    sampled_T1 = request.completion_ids[:, None].astype(np.int64)
    if not isinstance(request.support, Candidates) or len(request.support.ids) == 0:
        return sampled_T1
    mask_TK = candidate_mask(request.support.counts_T)
    ids_TK = np.full(mask_TK.shape, -1, np.int64)
    ids_TK[mask_TK] = request.support.ids
    return np.concatenate((sampled_T1, ids_TK), axis=1)


def candidate_mask(counts_T: IntArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[T, K] bool, K the largest count: where the ragged candidates stand in the padded columns."""
    num_columns = int(counts_T.max(initial=0))
    return np.arange(num_columns)[None, :] < counts_T[:, None]
