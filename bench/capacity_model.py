"""What scoring takes, from the shapes of a model and its load: operations, and bytes on the wire. Pure.

docs/performance.md has the formulae in words. Assumed throughout: a dense decoder-only transformer with gated MLPs, in
16 bits; attention is causal and pays for the keys that it sees, no more; a context is read once for the completions
that share it; norms, rotary positions and softmax are free. What it takes on GPUs is in capacity_gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from floors import ModelShape, attention_flops, causal_pairs, head_flops, layer_flops

BITS_A_BYTE = 8
KV_BYTES = ACTIVATION_BYTES = 2  # bfloat16
# In a layer's forward at one time: gate, up and their product; the residual, the normed input, query and output.
MLP_COPIES, HIDDEN_COPIES = 3, 4

SupportName = Literal["candidates", "teacher_top_k"]


@dataclass(frozen=True)
class TeacherModel:
    """tied: the output head is the embedding, and takes no memory of its own."""

    shape: ModelShape
    tied: bool

    @property
    def parameters(self) -> int:
        """Norms left out, which are a ten-thousandth."""
        return self.shape.layer_weights + self.shape.head_weights * (1 if self.tied else 2)

    @property
    def kv_bytes_a_token(self) -> int:
        return self.shape.cache_numbers_per_token * KV_BYTES


@dataclass(frozen=True)
class Load:
    """One optimizer step of every student. Lengths in tokens.

    rollouts: completions a student and step. group: of them that share a context.
    mean_support: ids a position on average; k with dense candidates.
    id_bytes, logprob_bytes: on the wire.
    """

    students: int
    rollouts: int
    group: int
    context: int
    completion: int
    k: int
    mean_support: float
    id_bytes: int
    logprob_bytes: int
    support: SupportName = "candidates"

    def __post_init__(self) -> None:
        lengths = {"students": self.students, "rollouts": self.rollouts, "group": self.group}
        lengths |= {"context": self.context, "completion": self.completion}
        for name, value in lengths.items():
            if value < 1:
                raise ValueError(f"{name} {value} < 1")
        if not 0 <= self.mean_support <= self.k:
            raise ValueError(f"mean_support {self.mean_support} is not in [0, k = {self.k}]")

    @property
    def scored_tokens(self) -> int:
        """Of one step of all students."""
        return self.students * self.rollouts * self.completion


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiplication and an addition being two."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head

    def __truediv__(self, divisor: float) -> Flops:
        return Flops(self.layers / divisor, self.attention / divisor, self.head / divisor)


# ---------------------------------------------------------------- operations


def group_flops(shape: ModelShape, *, context: int, completion: int, group: int) -> Flops:
    """Of one context and `group` completions of it. The last token of a completion is scored and not read."""
    read = completion - 1
    pairs = causal_pairs(context) + group * causal_pairs(read, cached=context)
    return Flops(
        layers=layer_flops(shape, context + group * read),
        attention=attention_flops(shape, pairs),
        head=head_flops(shape, group * completion),
    )


def flops_a_scored_token(shape: ModelShape, load: Load) -> Flops:
    whole = group_flops(shape, context=load.context, completion=load.completion, group=load.group)
    return whole / (load.group * load.completion)


def tokens_read_a_scored_token(load: Load) -> float:
    return (load.context / load.group + load.completion - 1) / load.completion


# ---------------------------------------------------------------- network


@dataclass(frozen=True)
class WireBytes:
    """A scored token's, without what a message costs whatever is in it."""

    sent: float
    received: float


def wire_bytes(load: Load) -> WireBytes:
    """Ids and counts at the narrowest whole bytes, a shared context once a group; log-probabilities back."""
    sent = load.id_bytes * (load.context / (load.group * load.completion) + 1)
    received = load.logprob_bytes * (1 + load.mean_support)
    if load.support == "candidates":
        sent += load.id_bytes * load.mean_support + uint_bytes(load.k)
    else:
        received += load.id_bytes * load.k
    return WireBytes(sent, received)


def uint_bytes(largest: int) -> int:
    """The narrowest whole number of bytes that holds `largest`."""
    return max(1, -(-largest.bit_length() // BITS_A_BYTE))
