"""Before serving: which ways to a score does this vLLM have, and do they agree?"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from vopd_server.errors import ConfigError, EngineError, InvalidRequestError
from vopd_server.types import Candidates, ScoreRequest, Scores, Support, TeacherTopK

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 12
# 16-bit kernels of other shapes differ by tenths; a shifted row or a wrong id by nats.
_TOLERANCE_NATS = 0.5


class Ask(Protocol):
    async def __call__(self, request: ScoreRequest, *, has_token_ids: bool) -> Scores: ...


async def has_token_ids(ask: Ask, *, vocab_size: int, max_context_length: int) -> bool:
    """Whether the runner scores given ids a position. Warms up every way there is.

    Raises: ConfigError when vLLM cannot score at all, or two ways to one log-probability disagree.
    """
    try:
        expected = await ask(_probe_request(vocab_size, max_context_length, TeacherTopK(1)), has_token_ids=False)
        assert expected.support_ids_TK is not None
        top_ids = expected.support_ids_TK.reshape(-1)
        candidates = Candidates(top_ids, np.ones(len(top_ids), np.int64))
        found = await ask(_probe_request(vocab_size, max_context_length, candidates), has_token_ids=True)
    except InvalidRequestError as error:
        logger.info("no candidates, since this runner of vLLM scores no given ids: %s", error)
        return False
    except EngineError as error:
        raise ConfigError(f"vLLM loaded the model and cannot score with it: {error}") from error
    difference = np.abs(_flat_logprobs(found) - _flat_logprobs(expected)).max()
    if not difference <= _TOLERANCE_NATS:  # not `>`: a NaN must refuse too
        raise ConfigError(f"vLLM's two ways to one log-probability differ by {difference:.3g} nats")
    return True


def _probe_request(vocab_size: int, max_context_length: int, support: Support) -> ScoreRequest:
    num_tokens = min(_PROBE_TOKENS, max_context_length)
    ids = np.arange(num_tokens) * 7919 % vocab_size  # times a prime: spread over the vocabulary
    return ScoreRequest("probe", ids[: num_tokens // 2], ids[num_tokens // 2 :], support)


def _flat_logprobs(scores: Scores) -> np.ndarray:
    assert scores.support_logprobs is not None
    return np.concatenate((scores.sampled_logprobs_T, scores.support_logprobs.reshape(-1)))
