"""Which sequences to pad to one length: a plan that weighs padding against one forward more."""

from __future__ import annotations

from collections.abc import Sequence

# What a pass costs beyond its tokens, in tokens. A forward reads the weights; a forward and backward pass also casts
# them and reads and writes their gradients, some 30 bytes a parameter where a token costs 6 operations a parameter.
# Between them stand the operations a byte that a machine can do, about 50 on processors and accelerators alike.
FORWARD_COST_TOKENS = 64
TRAINING_COST_TOKENS = 256


def plan_like_lengths(
    lengths: Sequence[int], *, pass_cost_tokens: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Groups sequences so that padded tokens + `pass_cost_tokens` a group is least, the longest sequences first.

    Args:
        lengths: of the sequences, in tokens.
        max_tokens: of a group, (sequences) x (longest of them), at most; a longer sequence is a group of its own.
            None: any number.

    Returns: indices into `lengths`, each once; equal lengths in their order. The same lengths give the same plan.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    # best[end]: the least cost of the first `end` sequences of that order, and where its last group begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        candidates = []
        for start in range(end - 1, -1, -1):
            padded = (end - start) * lengths[order[start]]
            if start < end - 1 and max_tokens is not None and padded > max_tokens:
                break  # further back, sequences are no shorter and the group is larger
            candidates.append((best[start][0] + padded + pass_cost_tokens, start))
        best.append(min(candidates))
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def padding_fraction(lengths: Sequence[int], plan: Sequence[Sequence[int]]) -> float:
    """The share of padding in what a plan's passes read; 0 for no sequences."""
    padded = sum(len(group) * max(lengths[index] for index in group) for group in plan)
    return 1 - sum(lengths[index] for group in plan for index in group) / padded if padded else 0.0
