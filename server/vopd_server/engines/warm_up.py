"""Before serving on an accelerator: do the largest forwards that admission allows fit its memory?

They are planned and run as the engine does it, so that a request which is admitted later finds room. Memory in
use is a matter of tokens, of how they are spread over rows and of what is cached, so there is one pass for each:
the longest sequence, a full batch read whole, and a full batch on shared contexts, all of them with the largest
support at every position. Hidden states need no pass of their own: they leave the device a chunk of rows at a time,
and a chunk takes less than the exponentials of its logits, whose memory is free by then (H < V; see `head`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from vopd_server.engines.batching import Shape, plan_next_pass
from vopd_server.engines.contexts import ContextCache
from vopd_server.engines.forward import context_key
from vopd_server.engines.scoring_model import ScoringModel
from vopd_server.errors import ConfigError
from vopd_server.types import ScoreRequest, TeacherTopK

logger = logging.getLogger(__name__)


def warm_up(
    model: ScoringModel,
    *,
    max_context_length: int,
    max_batch_tokens: int,
    context_cache_tokens: int,
    max_top_k: int,
    deterministic: bool,
) -> None:
    """Runs the largest passes beside a full cache of contexts, and leaves their memory to the allocator.

    Raises: ConfigError, with the settings to lower, when one does not fit the device.
    """
    started_s = time.monotonic()
    keep_tokens = context_cache_tokens * model.can_share_contexts
    kept = ContextCache(context_cache_tokens)
    for requests in largest_passes(
        max_context_length=max_context_length,
        max_batch_tokens=max_batch_tokens,
        k=min(max_top_k, model.head.vocab_size),
        vocab_size=model.head.vocab_size,
        can_share=model.can_share_contexts,
        deterministic=deterministic,
    ):
        try:
            if keep_tokens and not len(kept):  # its memory is allocated with the first
                kept.keep(
                    model.read_contexts([ScoreRequest("warm-up", np.zeros(1, np.int64), np.zeros(1, np.int64))])[0]
                )
            _run(
                model,
                requests,
                max_batch_tokens=max_batch_tokens,
                deterministic=deterministic,
                keep_tokens=keep_tokens,
            )
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not _is_out_of_memory(error):
                raise
            what = f"{len(requests)} x {requests[0].num_tokens} tokens with a support of {max_top_k} ids"
            raise ConfigError(
                f"{what} would be admitted and do not fit the memory of {model.backbone.device}: "
                f"lower max_context_length (now {max_context_length}), max_batch_tokens (now {max_batch_tokens}), "
                f"context_cache_tokens (now {context_cache_tokens}) or max_top_k (now {max_top_k}): "
                f"{str(error).splitlines()[0]}"
            ) from None  # the frames of the cause hold the tensors that did fit
    logger.info("the largest forwards fit the device", extra={"seconds": time.monotonic() - started_s})


def largest_passes(
    *, max_context_length: int, max_batch_tokens: int, k: int, vocab_size: int, can_share: bool, deterministic: bool
) -> list[list[ScoreRequest]]:
    """What admission lets through at its largest: lists of requests that are planned as one pass each.

    max_context_length: context + completion tokens of one sequence. max_batch_tokens: padded tokens of a forward
    of several. k: ids in every position's support.
    """

    def request(context_length: int, num_tokens: int, number: int = 0) -> ScoreRequest:
        context_ids = np.zeros(context_length, np.int64)
        context_ids[:2] = divmod(number, vocab_size)[:context_length]  # equal contexts would be shared
        completion_ids = np.zeros(num_tokens - context_length, np.int64)
        return ScoreRequest("warm-up", context_ids, completion_ids, TeacherTopK(k))

    longest = max_context_length
    passes = [[request(1, longest)]]
    if can_share and longest >= 4:
        passes.append([request(longest - 2, longest)] * (1 if deterministic else 2))
    width = min(longest, max_batch_tokens)
    num_rows = max_batch_tokens // width
    if deterministic or num_rows == 1 or width < 4:
        return passes  # forwards of one row each, and none is larger than these
    passes.append([request(2, width, row) for row in range(num_rows)])
    passes.append([request(width - 1, width, row) for row in range(num_rows)])  # contexts that are kept
    if can_share:  # two of each context, and what is not shared is short: nearly all of it is cached, twice
        passes.append([request(width - 2, width, row // 2) for row in range(num_rows - num_rows % 2)])
    return passes


def _run(
    model: ScoringModel,
    requests: Sequence[ScoreRequest],
    *,
    max_batch_tokens: int,
    deterministic: bool,
    keep_tokens: int,
) -> None:
    """One pass, as `TransformersEngine` runs it."""
    plan = plan_next_pass(
        [Shape(context_key(request), len(request.context_ids), len(request.completion_ids)) for request in requests],
        max_tokens=max_batch_tokens,
        can_share=model.can_share_contexts,
        one_by_one=deterministic,
    )
    contexts = None
    if plan.shares_contexts:
        contexts, _ = model.read_contexts([requests[index] for index in plan.members])
    for wave in plan.waves:
        model.score([requests[index] for index in wave], contexts, keep_tokens=keep_tokens)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Not every device says it with torch's own exception."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
