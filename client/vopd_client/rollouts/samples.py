"""Completions sampled for an evaluation: token ids alone, from a distribution that may be cut off.

Axes: B rows still growing, T completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vopd_client.errors import NonFiniteError
from vopd_client.rollouts.decoding import (
    GrowingBatch,
    decode,
    in_batches_of_like_length,
)
from vopd_client.rollouts.forward import InferenceForward, MixedPrecision
from vopd_client.rollouts.sampling import draw_by_inverse_cdf, row_uniforms, sampling_logits
from vopd_client.rollouts.transformers import RolloutRequest
from vopd_client.rollouts.truncation import truncate
from vopd_proto.arrays import IntArray


def sample_completions(
    model: nn.Module,
    requests: Sequence[RolloutRequest],
    *,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    num_shared_ids: int,
    batch_size: int,
    mixed_precision: MixedPrecision = "no",
) -> list[IntArray]:
    """One completion a request, in the requests' order, end token included.

    Every draw is a function of (seed, key, token index) and the model, so that further samples of a prompt, further
    prompts and a longer limit leave the ones there are as they were.

    Args: top_k, top_p: see `truncate`.

    Raises: NonFiniteError when the model's logits are NaN or infinite; it names the draw.
    """
    forward = InferenceForward(model, mixed_precision)
    completions: list[list[int]] = [[] for _ in requests]
    for indices in in_batches_of_like_length([prompt_ids for _, prompt_ids in requests], batch_size):
        keys = [requests[index][0] for index in indices]
        uniforms_BT = np.stack([row_uniforms(seed, key, max_new_tokens) for key in keys])

        def choose(
            logits_BV: Tensor,
            rows: Sequence[int],
            position: int,
            indices: Sequence[int] = indices,
            uniforms_BT: np.ndarray = uniforms_BT,
        ) -> IntArray:
            logits_BV = sampling_logits(logits_BV, num_shared_ids=num_shared_ids, temperature=temperature)
            logits_BV = truncate(logits_BV, top_k=top_k, top_p=top_p)
            draw = draw_by_inverse_cdf(logits_BV, torch.from_numpy(uniforms_BT[rows, position]))
            token_ids_B: IntArray = draw.ids_B.cpu().numpy()
            finite_B = draw.logprobs_B.isfinite().cpu().numpy()
            for slot, row in enumerate(rows):
                if not finite_B[slot]:
                    key = requests[indices[row]][0]
                    raise NonFiniteError(f"the model's logits are not finite at completion token {position} of {key}")
                completions[indices[row]].append(int(token_ids_B[slot]))
            return token_ids_B

        batch = GrowingBatch(
            forward, [requests[index][1] for index in indices], pad_id=pad_id, max_new_tokens=max_new_tokens
        )
        for _ in decode(batch, choose, end_ids=end_ids, max_new_tokens=max_new_tokens):
            pass
    return [np.array(completion, np.int64) for completion in completions]
