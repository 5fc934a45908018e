"""What to ask vLLM for, and when its prefix cache must not be read. Pure: nothing here imports vLLM.

vLLM computes log-probabilities only for prompt tokens that it forwards. A token found in the prefix cache is not
forwarded and has none, so a request may use the cache for its first C - 1 tokens and no further: row C - 1, which
scores the first completion token, must be computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np

from vopd_proto.arrays import IntArray
from vopd_server.errors import UnsupportedError
from vopd_server.types import Candidates, HiddenStates, NoSupport, ScoreRequest, TeacherTopK

# Openings that are remembered: 16 bytes each and some bookkeeping, a few megabytes together.
REMEMBERED_OPENINGS = 32_768


def scoring_arguments(request: ScoreRequest, *, has_token_ids: bool) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams that say what to score.

    has_token_ids: the runner scores given ids a position (`prompt_logprob_token_ids`). It then runs the output
        head on the scored rows only, so the sampled log-probabilities alone are asked for this way too.

    Raises: UnsupportedError for a support that this runner cannot give.
    """
    match request.support:
        case TeacherTopK(k=k):
            return {"prompt_logprobs": k}
        case NoSupport() if not has_token_ids:
            return {"prompt_logprobs": 0}
        case NoSupport() | Candidates() if has_token_ids:
            return {
                "prompt_logprob_token_ids": token_id_columns(request),
                "prompt_logprob_start": len(request.context_ids) - 1,
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


class RecentOpenings:
    """Tells which requests would find part of their own completion in the prefix cache.

    The cache holds whole blocks. An *opening* is a prompt up to the first block boundary at or behind its
    context: once it is cached, whoever shares it finds row C - 1 there and has no score for it. Rollouts of one
    context that begin with the same words share openings routinely, and where the context itself ends on a
    boundary all of its completions do. Such a request is better submitted with cache reads off than submitted,
    refused by `vllm_scores.read_scores` and submitted again.

    It only saves work: a forgotten opening, or a cache that is fed otherwise, costs the second submission.
    """

    def __init__(self, *, block_size: int, capacity: int = REMEMBERED_OPENINGS) -> None:
        self._block_size = block_size
        self._capacity = capacity
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def meet(self, request: ScoreRequest, *, salt: str = "") -> bool:
        """Whether to submit `request` with cache reads off; remembers its opening.

        salt: requests with different salts never share cached blocks.
        """
        end = opening_length(len(request.context_ids), self._block_size)
        if request.num_tokens < end:
            return False  # its blocks end before the boundary: nothing to find, nothing to leave
        from_completion = request.completion_ids[: end - len(request.context_ids)]
        key = _digest(salt, request.context_ids, from_completion)
        was_seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        # vLLM never takes the last token from the cache, so a prompt that ends on the boundary is safe.
        return was_seen and request.num_tokens > end


def opening_length(context_length: int, block_size: int) -> int:
    """Tokens up to the first block boundary at or behind the context's end."""
    return -(-context_length // block_size) * block_size


def _digest(salt: str, *parts: IntArray) -> bytes:
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    return digest.digest()
