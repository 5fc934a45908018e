"""Drawing one token a row: pure functions on logits and on uniform numbers that belong to the draw alone.

Axes: B rows, T completion tokens, V ids that may be sampled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from vopd_client.rollouts.base import RolloutKey

Float64Array = npt.NDArray[np.float64]

# Ids are added up in blocks: a cumulative sum in float64 over a whole vocabulary costs 15 times as much.
IDS_PER_BLOCK = 256


def row_uniforms(seed: int, key: RolloutKey, num_tokens: int) -> Float64Array:
    """Uniform numbers in [0, 1) for one rollout, [num_tokens] float64; number t decides completion token t.

    They are a function of (seed, step, prompt, rollout, turn, t) alone: the key and the upper counter words of a
    Philox generator hold the first five, and the lowest one counts the tokens. So a rollout is the same
    whatever the rank, the batch or the order it is sampled in, and a longer limit only appends numbers.
    """
    generator = np.random.Philox(
        key=np.array([seed, key.step], np.uint64),
        counter=np.array([0, key.turn, key.prompt_index, key.rollout_index], np.uint64),
    )
    return np.random.Generator(generator).random(num_tokens)


def sampling_logits(logits_BV: Tensor, *, num_shared_ids: int, temperature: float) -> Tensor:
    """float32 logits at `temperature` of the ids that both sides have, the ones below `num_shared_ids`.

    Cutting the others off is masking them: they get neither a draw nor a share of the normaliser.
    """
    logits_BV = logits_BV[:, :num_shared_ids].float()
    return logits_BV if temperature == 1.0 else logits_BV / temperature


class Draw(NamedTuple):
    """One drawn token a row, with what was computed on the way."""

    ids_B: Tensor  # int64
    logprobs_B: Tensor  # float32, log pi of the drawn ids
    log_normaliser_B: Tensor  # float32, log-sum-exp of the logits; not finite where a logit is NaN or +inf


def draw_by_inverse_cdf(logits_BV: Tensor, uniforms_B: Tensor) -> Draw:
    """Draws the first id, in the order of ids, at which the cumulative probability exceeds the uniform number.

    The order of ids, and not of probabilities, keeps a draw the same when rounding swaps two almost equal
    logits, and independent of how large a support is recorded. An id of probability zero is never drawn.

    Args:
        logits_BV: float32; -inf is probability zero.
        uniforms_B: in [0, 1); on any device.
    """
    num_rows, num_ids = logits_BV.shape
    largest_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weights_BV = (logits_BV - largest_B1).exp_()
    if num_ids % IDS_PER_BLOCK:
        weights_BV = pad(weights_BV, (0, -num_ids % IDS_PER_BLOCK))
    blocks_BNI = weights_BV.view(num_rows, -1, IDS_PER_BLOCK)

    precise = torch.float32 if logits_BV.device.type == "mps" else torch.float64  # MPS has no float64
    block_ends_BN = blocks_BNI.sum(dim=-1, dtype=precise).cumsum(dim=-1)
    total_B1 = block_ends_BN[:, -1:]
    block_B1, target_B1 = _first_beyond(block_ends_BN, uniforms_B[:, None].to(total_B1) * total_B1)

    block_starts_BN = pad(block_ends_BN, (1, -1))
    target_in_block_B1 = target_B1 - block_starts_BN.gather(1, block_B1)
    chosen_block_BI = blocks_BNI.gather(1, block_B1[:, :, None].expand(-1, 1, IDS_PER_BLOCK)).squeeze(1)
    offset_B1, _ = _first_beyond(chosen_block_BI.cumsum(dim=-1, dtype=precise), target_in_block_B1)

    ids_B1 = block_B1 * IDS_PER_BLOCK + offset_B1
    log_normaliser_B1 = largest_B1 + total_B1.log().float()
    # A row with NaN has no meaningful id; the clamp keeps the look-up inside, the normaliser tells the caller.
    logprobs_B1 = logits_BV.gather(1, ids_B1.clamp(max=num_ids - 1)) - log_normaliser_B1
    return Draw(ids_B1.squeeze(1), logprobs_B1.squeeze(1), log_normaliser_B1.squeeze(1))


def _first_beyond(cumulative_BN: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B, 1] of the first entry above the target, and the target, kept just below the last entry.

    Rounding can lift a target to the very end of the sum; there it would point past the last probable id.
    """
    end_B1 = cumulative_BN[:, -1:]
    below_B1 = torch.minimum(target_B1, torch.nextafter(end_B1, torch.zeros_like(end_B1)))
    index_B1 = torch.searchsorted(cumulative_BN, below_B1, right=True)
    return index_B1.clamp(max=cumulative_BN.shape[1] - 1), below_B1
