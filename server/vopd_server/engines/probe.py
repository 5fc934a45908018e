"""Before serving: does our way to the log-probabilities agree with the model's own?

The engine takes a model apart (base model, output head, cache) and puts it together in its own way, which is
right for the architectures it knows and could be silently wrong for one it does not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vopd_server.engines.forward import Backbone
from vopd_server.engines.head import OutputHead, full_logprobs
from vopd_server.errors import ConfigError
from vopd_server.types import ScoreRequest

logger = logging.getLogger(__name__)

# Context and completion lengths: unequal ones, one context twice, a one-token completion.
_PROBE_LENGTHS = ((11, 6), (7, 9), (11, 1), (3, 4))

# Relative, in units of the dtype's rounding. Behind one forward the head is the same product twice, then some
# rounding in 16 bits on their side. Between batches whole models round differently, layer after layer.
_HEAD_TOLERANCE_EPS = 4
_BATCH_TOLERANCE_EPS = 16
_FLOAT32_TOLERANCE = 1e-4  # where rounding is small, what counts is what the engine promises


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two tables of log-probabilities of the same rows."""

    largest_nats: float
    relative: float  # mean absolute difference over the standard deviation of the log-probabilities


def check_head(model: Any, backbone: Backbone, head: OutputHead) -> None:
    """Compares base model plus our head with the whole model.

    Raises: ConfigError naming the architecture and the difference.
    """
    request = _probe_requests(head.vocab_size)[0]
    fed_ids = np.concatenate((request.context_ids, request.completion_ids[:-1]))
    logits_SV = model(input_ids=torch.as_tensor(fed_ids[None], device=backbone.device), use_cache=False).logits[0]
    theirs_TV = logits_SV[len(request.context_ids) - 1 :].float().log_softmax(dim=-1)
    hidden_TH, _ = backbone.read_whole([request])
    ours_TV = full_logprobs(head, hidden_TH, temperature=1.0, chunk_rows=2)
    _refuse_if_different(model, ours_TV, theirs_TV, "its output head", _HEAD_TOLERANCE_EPS)


def check_padding(model: Any, backbone: Backbone, head: OutputHead) -> None:
    """Compares sequences read together with the same read alone.

    Raises: ConfigError: what stands in the padding behind a sequence changes its scores.
    """
    requests = _probe_requests(head.vocab_size)
    ours_NV = _logprobs(head, backbone.read_whole(requests)[0])
    theirs_NV = _logprobs(head, _alone(backbone, requests))
    _refuse_if_different(model, ours_NV, theirs_NV, "a padded batch", _BATCH_TOLERANCE_EPS)


def can_share_contexts(model: Any, backbone: Backbone, head: OutputHead) -> bool:
    """Whether completions may continue from a context's cache: known cache layers and equal scores."""
    architecture = type(model).__name__
    if not backbone.has_expandable_cache:
        logger.info("%s has a cache that cannot be shared: contexts are read once a completion", architecture)
        return False
    requests = _probe_requests(head.vocab_size)
    contexts, _ = backbone.read_contexts(requests)
    if any(None in context.layers for context in contexts.values()):
        logger.info("%s has layers that share one cache: contexts are read once a completion", architecture)
        return False
    expected = _logprobs(head, _alone(backbone, requests))
    whole_NH, kept, _ = backbone.read_whole_and_contexts(requests, max_context_tokens=2 * sum(map(sum, _PROBE_LENGTHS)))
    ways = (whole_NH, *(backbone.read_completions(read, requests)[0] for read in (contexts, kept)))
    differences = [_difference(_logprobs(head, hidden_NH), expected) for hidden_NH in ways]
    if not all(difference.relative <= _tolerance(model.dtype, _BATCH_TOLERANCE_EPS) for difference in differences):
        logger.warning(
            "%s scores up to %.3g nats differently on a shared context: contexts are read once a completion",
            architecture,
            max(difference.largest_nats for difference in differences),
        )
        return False
    return True


def _probe_requests(vocab_size: int) -> list[ScoreRequest]:
    requests = []
    for context_length, completion_length in _PROBE_LENGTHS:
        # Equal lengths give equal contexts; multiplying by a prime spreads the ids over the vocabulary.
        context_ids = (np.arange(context_length) + 17 * context_length) * 7919 % vocab_size
        completion_ids = (np.arange(completion_length) + 31 * completion_length) * 7907 % vocab_size
        requests.append(ScoreRequest("probe", context_ids, completion_ids))
    return requests


def _alone(backbone: Backbone, requests: list[ScoreRequest]) -> torch.Tensor:
    return torch.cat([backbone.read_whole([request])[0] for request in requests])


def _logprobs(head: OutputHead, hidden_NH: torch.Tensor) -> torch.Tensor:
    return full_logprobs(head, hidden_NH, temperature=1.0, chunk_rows=len(hidden_NH))


def _refuse_if_different(model: Any, ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance_eps: int) -> None:
    difference = _difference(ours, theirs)
    tolerance = _tolerance(model.dtype, tolerance_eps)
    # Not `>`: a NaN must refuse too.
    if not difference.relative <= tolerance:
        raise ConfigError(
            f"{type(model).__name__} cannot be served: through {what}, this engine's log-probabilities differ "
            f"from the model's own by up to {difference.largest_nats:.3g} nats "
            f"(relative {difference.relative:.2g}, tolerance {tolerance:.2g} in {model.dtype})"
        )


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    distance = (ours - theirs).abs()
    spread = theirs.std().clamp(min=torch.finfo(torch.float32).tiny)
    return Difference(distance.max().item(), (distance.mean() / spread).item())


def _tolerance(dtype: torch.dtype, tolerance_eps: int) -> float:
    return max(_FLOAT32_TOLERANCE, tolerance_eps * torch.finfo(dtype).eps)
