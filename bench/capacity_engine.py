"""What a workload of `make bench-scaling` asks of the transformers engine: work that takes time, and memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from capacity_model import (
    ACTIVATION_BYTES,
    HIDDEN_COPIES,
    MLP_COPIES,
    Load,
    TeacherModel,
    group_flops,
    uint_bytes,
    wire_bytes,
)
from floors import ModelShape
from scaling_points import Point

# Logits of a chunk: the product, its float32 copy, and the exponentials.
LOGIT_BYTES = ACTIVATION_BYTES + 4 + 4
# Of one log-probability of the support: as it came and went, unpacked, gathered, packed.
SUPPORT_BYTES = 24
FLOAT16_BYTES = 2


@dataclass(frozen=True)
class Work:
    """Of one sequence, its share of the context included. Every field is something that takes time."""

    matrix_flops: float  # of layers and head
    attention_flops: float
    support_logprobs: float
    searched_logits: float  # for the teacher's own top k
    sequences: float = 1.0


@dataclass(frozen=True)
class Costs:
    """Seconds a unit of each kind of work."""

    matrix_flop_s: float
    attention_flop_s: float
    support_logprob_s: float = 0.0
    searched_logit_s: float = 0.0
    sequence_s: float = 0.0

    def seconds(self, work: Work) -> float:
        return (
            work.matrix_flops * self.matrix_flop_s
            + work.attention_flops * self.attention_flop_s
            + work.support_logprobs * self.support_logprob_s
            + work.searched_logits * self.searched_logit_s
            + work.sequences * self.sequence_s
        )


def work_of(shape: ModelShape, point: Point) -> Work:
    """A context is shared by those of its group that are outstanding together."""
    shape = replace(shape, vocab_size=point.vocabulary)
    whole = group_flops(shape, context=point.context, completion=point.completion, group=point.sharing)
    one = whole / point.sharing
    searched = point.completion * point.vocabulary if point.support == "teacher_top_k" else 0
    return Work(one.layers + one.head, one.attention, float(point.k * point.completion), float(searched))


def one_rate(work: Work, seconds: float) -> Costs:
    """All of `seconds` are floating-point operations, and all operations take alike."""
    each_s = seconds / (work.matrix_flops + work.attention_flops)
    return Costs(each_s, each_s)


def fitted(works: Sequence[Work], seconds: Sequence[float]) -> Costs:
    """Costs that explain as many points as there are kinds of work, none of them negative.

    Least squares of relative errors; a kind whose cost would be negative costs nothing.

    Raises: ValueError for fewer points than kinds of work.
    """
    table = np.array([astuple(work) for work in works])
    if len(table) < table.shape[1]:
        raise ValueError(f"{len(table)} points for {table.shape[1]} kinds of work")
    relative = table / np.asarray(seconds)[:, None]
    scale = relative.max(axis=0)
    kept = [int(kind) for kind in np.flatnonzero(scale)]
    while True:
        found, *_ = np.linalg.lstsq(relative[:, kept] / scale[kept], np.ones(len(table)))
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    costs = np.zeros(table.shape[1])
    costs[kept] = found / scale[kept]
    return Costs(*map(float, costs))


def wire_bytes_of(point: Point) -> tuple[float, float]:
    """Bytes a scored token, sent and received, in float16."""
    load = Load(
        students=1,
        rollouts=point.group,
        group=point.group,
        context=point.context,
        completion=point.completion,
        k=point.k,
        mean_support=point.k,
        id_bytes=uint_bytes(point.vocabulary - 1),
        logprob_bytes=FLOAT16_BYTES,
        support=point.support,
    )
    made = wire_bytes(load)
    return made.sent, made.received


def held_bytes(model: TeacherModel, point: Point, *, max_batch_tokens: int, chunk_elements: int) -> float:
    """Memory of a round beyond what an idle teacher has."""
    shape = model.shape
    length = point.context + point.completion - 1
    together = max(1, min(point.concurrency, max_batch_tokens // length))
    outstanding = point.concurrency
    kv_tokens, forwarded = 0, together * length
    if point.sharing > 1:
        contexts = -(-outstanding // point.group)
        kv_tokens = contexts * point.context + together * length
        forwarded = max(contexts * point.context, together * (point.completion - 1))
    activations = (
        forwarded * (MLP_COPIES * shape.intermediate_size + HIDDEN_COPIES * shape.hidden_size) * ACTIVATION_BYTES
    )
    logits = min(chunk_elements, together * point.completion * point.vocabulary) * LOGIT_BYTES
    support = outstanding * point.completion * point.k * SUPPORT_BYTES
    return kv_tokens * model.kv_bytes_a_token + activations + logits + support
