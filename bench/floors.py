"""What a machine could do at best: its matrix rates and memory bandwidth, and the least time that work takes on it.

    rates = measure_rates(ModelShape.of(config))
    forward_floor_s(rates, shape, [320] * 16, scored_tokens=1024, dtype="bfloat16")

The formulas are pure; only `measure_rates` runs anything. A floor counts the operations of the matrix products and of
attention, and for decoding the bytes that every step has to read; what a program does besides is its own affair.

Letters in names: N rows of a product, H hidden size, O output size.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

DtypeName = Literal["bfloat16", "float32"]
BYTES = {"bfloat16": 2, "float32": 4}
LAYER_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
HEAD_ROWS = (1, 4, 16, 64, 256, 1024)
BANDWIDTH_BYTES = 2**28
# A layer's weights, over and over, would come from the processor's cache, which decoding never gets them from.
WEIGHT_COPIES = 8


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder whose layers have gated perceptrons, as Llama and most since."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """From a transformers configuration."""
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_size=head_size,
            vocab_size=config.vocab_size,
        )

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of one layer's products: q, k, v, o, gate, up, down."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, shared = self.num_heads * self.head_size, self.num_key_value_heads * self.head_size
        attention = ((hidden, queries), (hidden, shared), (hidden, shared), (queries, hidden))
        return (*attention, (hidden, inner), (hidden, inner), (inner, hidden))

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.layer_matrices)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def cache_numbers_per_token(self) -> int:
        """Keys and values that one token leaves behind."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_size


# ---------------------------------------------------------------- operations and bytes


def layer_flops(shape: ModelShape, num_tokens: int) -> float:
    """Floating-point operations of the layers' matrix products."""
    return 2.0 * shape.layer_weights * num_tokens


def attention_flops(shape: ModelShape, num_pairs: float) -> float:
    """Scores and weighted sums over `num_pairs` of a token and one that it sees."""
    return 4.0 * shape.num_layers * shape.num_heads * shape.head_size * num_pairs


def causal_pairs(length: int, cached: int = 0) -> float:
    """Pairs of a token and one that it sees, itself included, for `length` tokens after `cached` others."""
    return length * cached + length * (length + 1) / 2


def head_flops(shape: ModelShape, scored_tokens: int) -> float:
    """The product with the output head."""
    return 2.0 * shape.head_weights * scored_tokens


def forward_flops(shape: ModelShape, lengths: Sequence[int], *, scored_tokens: int) -> float:
    """One forward over whole sequences of `lengths` tokens, without padding, with logits at `scored_tokens` rows."""
    pairs = sum(causal_pairs(length) for length in lengths)
    return layer_flops(shape, sum(lengths)) + attention_flops(shape, pairs) + head_flops(shape, scored_tokens)


def update_flops(shape: ModelShape, lengths: Sequence[int], *, scored_tokens: int) -> float:
    """Forward and backward: the gradients of inputs and of weights cost one forward each."""
    return 3.0 * forward_flops(shape, lengths, scored_tokens=scored_tokens)


def decoding_step_flops(shape: ModelShape, cached_lengths: Sequence[int]) -> float:
    """One token for each row, after `cached_lengths` tokens."""
    rows = len(cached_lengths)
    pairs = sum(causal_pairs(1, cached) for cached in cached_lengths)
    return layer_flops(shape, rows) + attention_flops(shape, pairs) + head_flops(shape, rows)


def decoding_step_bytes(shape: ModelShape, cached_lengths: Sequence[int], dtype: DtypeName) -> float:
    """What one step cannot do without reading: every weight once, and each row's keys and values."""
    numbers = shape.layer_weights + shape.head_weights + shape.cache_numbers_per_token * sum(cached_lengths)
    return float(numbers * BYTES[dtype])


# ---------------------------------------------------------------- this machine's rates


@dataclass(frozen=True)
class MatrixRate:
    """Measured rate of products with this many rows."""

    rows: int
    gflops: float


@dataclass(frozen=True)
class MachineRates:
    """What was measured, each curve by rising number of rows; gigabytes are 10^9 bytes."""

    layers: dict[DtypeName, tuple[MatrixRate, ...]]
    head: dict[DtypeName, tuple[MatrixRate, ...]]
    bandwidth_gb_s: float

    def flops_per_s(self, dtype: DtypeName, rows: int, *, of: Literal["layers", "head"] = "layers") -> float:
        """The rate at `rows`, linear in their logarithm between measured ones; beyond them, that of the nearest."""
        return 1e9 * interpolated((self.layers if of == "layers" else self.head)[dtype], rows)

    def best_flops_per_s(self, dtype: DtypeName) -> float:
        return 1e9 * max(rate.gflops for rate in (*self.layers[dtype], *self.head[dtype]))

    def bytes_s(self, num_bytes: float) -> float:
        """Seconds to read so many bytes."""
        return num_bytes / (1e9 * self.bandwidth_gb_s)


def interpolated(curve: Sequence[MatrixRate], rows: int) -> float:
    """GFLOP/s at `rows`."""
    index = bisect_left([rate.rows for rate in curve], rows)
    if index == 0 or index == len(curve):
        return curve[min(index, len(curve) - 1)].gflops
    low, high = curve[index - 1], curve[index]
    part = math.log(rows / low.rows) / math.log(high.rows / low.rows)
    return low.gflops + part * (high.gflops - low.gflops)


def forward_floor_s(
    rates: MachineRates, shape: ModelShape, lengths: Sequence[int], *, scored_tokens: int, dtype: DtypeName
) -> float:
    """The least seconds of one forward, each product at the rate of its own number of rows."""
    tokens = sum(lengths)
    pairs = sum(causal_pairs(length) for length in lengths)
    below_head = layer_flops(shape, tokens) + attention_flops(shape, pairs)
    return below_head / rates.flops_per_s(dtype, tokens) + head_flops(shape, scored_tokens) / rates.flops_per_s(
        dtype, scored_tokens, of="head"
    )


def update_floor_s(
    rates: MachineRates, shape: ModelShape, lengths: Sequence[int], *, scored_tokens: int, dtype: DtypeName
) -> float:
    """The least seconds of forward and backward."""
    return 3.0 * forward_floor_s(rates, shape, lengths, scored_tokens=scored_tokens, dtype=dtype)


def decoding_step_floor_s(
    rates: MachineRates, shape: ModelShape, cached_lengths: Sequence[int], dtype: DtypeName
) -> float:
    """The least seconds of one step: its bytes or its operations, whichever takes longer.

    The operations count at the machine's best rate: at few rows a product is slow because it waits for its weights.
    """
    return max(
        rates.bytes_s(decoding_step_bytes(shape, cached_lengths, dtype)),
        decoding_step_flops(shape, cached_lengths) / rates.best_flops_per_s(dtype),
    )


def rollouts_floor_s(
    rates: MachineRates,
    shape: ModelShape,
    prompt_lengths: Sequence[int],
    rows: Sequence[tuple[int, int]],
    dtype: DtypeName,
) -> float:
    """The least seconds of a batch of rollouts that leave as they end.

    Args:
        prompt_lengths: of the distinct prompts, which are read once.
        rows: (prompt tokens, completion tokens) of every rollout, in one batch.
    """
    scored = len(prompt_lengths)
    total_s = forward_floor_s(rates, shape, prompt_lengths, scored_tokens=scored, dtype=dtype)
    for step in range(1, max(completion for _, completion in rows)):
        cached = [prompt + step for prompt, completion in rows if completion > step]
        total_s += decoding_step_floor_s(rates, shape, cached, dtype)
    return total_s


def measure_rates(
    shape: ModelShape,
    *,
    dtypes: Sequence[DtypeName] = ("bfloat16", "float32"),
    layer_rows: Sequence[int] = LAYER_ROWS,
    head_rows: Sequence[int] = HEAD_ROWS,
    bandwidth_bytes: int = BANDWIDTH_BYTES,
    repetitions: int = 5,
    tell: Callable[[str], None] = lambda _: None,
) -> MachineRates:
    """This machine's rates at a model's own shapes, on the threads that torch was told to use; the best of a few."""
    layers: dict[DtypeName, tuple[MatrixRate, ...]] = {}
    head: dict[DtypeName, tuple[MatrixRate, ...]] = {}
    for dtype in dtypes:
        tell(f"matrix rate in {dtype}")
        layers[dtype] = _matrix_rates(shape.layer_matrices, layer_rows, dtype, WEIGHT_COPIES, repetitions)
        head[dtype] = _matrix_rates(((shape.hidden_size, shape.vocab_size),), head_rows, dtype, 1, repetitions)
    tell("memory bandwidth")
    return MachineRates(layers, head, measure_bandwidth_gb_s(bandwidth_bytes, repetitions=repetitions))


def measure_bandwidth_gb_s(num_bytes: int = BANDWIDTH_BYTES, *, repetitions: int = 5) -> float:
    """Reading a large array: the best of a sum, a float32 and a bf16 product of a matrix with a vector."""
    columns = 1024
    matrix = torch.ones(num_bytes // 4 // columns, columns)
    narrow = torch.ones(num_bytes // 2 // columns, columns, dtype=torch.bfloat16)
    vector, narrow_vector = torch.ones(columns), torch.ones(columns, dtype=torch.bfloat16)
    readers: tuple[Callable[[], Tensor], ...] = (
        matrix.sum,
        lambda: torch.mv(matrix, vector),
        lambda: torch.mv(narrow, narrow_vector),
    )
    return num_bytes / min(_best_s(reader, repetitions) for reader in readers) / 1e9


def _matrix_rates(
    matrices: Sequence[tuple[int, int]], rows: Sequence[int], dtype: DtypeName, copies: int, repetitions: int
) -> tuple[MatrixRate, ...]:
    torch_dtype: torch.dtype = getattr(torch, dtype)
    weights_OH = [
        torch.randn(outputs, inputs, dtype=torch_dtype) for _ in range(copies) for inputs, outputs in matrices
    ]
    measured = []
    for num_rows in sorted(rows):
        inputs_NH = {width: torch.randn(num_rows, width, dtype=torch_dtype) for width, _ in matrices}

        def products(inputs_NH: dict[int, Tensor] = inputs_NH) -> None:
            for weight_OH in weights_OH:
                linear(inputs_NH[weight_OH.shape[1]], weight_OH)

        flops = 2.0 * num_rows * sum(weight_OH.numel() for weight_OH in weights_OH)
        measured.append(MatrixRate(num_rows, flops / _best_s(products, repetitions) / 1e9))
    return tuple(measured)


def _best_s(work: Callable[[], object], repetitions: int) -> float:
    """The shortest of some repetitions, after one that does not count: what else the machine did only adds."""
    work()
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
