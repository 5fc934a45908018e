"""What GPUs make of a load: tokens a second, memory, network, and which of them bounds. Pure.

The GPUs of a replica share one copy of the weights; nothing is lost to padding, preemption or waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capacity_model import (
    ACTIVATION_BYTES,
    BITS_A_BYTE,
    HIDDEN_COPIES,
    MLP_COPIES,
    Flops,
    Load,
    TeacherModel,
    WireBytes,
    flops_a_scored_token,
    tokens_read_a_scored_token,
    wire_bytes,
)
from vopd_server.engines.vllm_memory import LogprobsShape, peak_bytes

WEIGHT_BYTES = 2  # bfloat16

BoundName = Literal["compute", "memory", "network"]


@dataclass(frozen=True)
class Accelerator:
    """One GPU, by what its maker publishes. peak_flops_s: dense bfloat16, without sparsity."""

    name: str
    peak_flops_s: float
    memory_bytes: float
    bandwidth_bytes_s: float
    source: str


@dataclass(frozen=True)
class Deployment:
    """GPUs and how they are used.

    tensor_parallel: GPUs that share one copy of the weights; there are gpus / tensor_parallel replicas.
    mfu: operations a second over the published peak, communication between GPUs included.
    step_tokens: tokens in one forward of the engine, at most.
    reserved_share: of each GPU's memory, for contexts of drivers and what allocators leave unused.
    network_bytes_s: between the students and the teacher, each way.
    """

    accelerator: Accelerator
    gpus: int
    tensor_parallel: int
    mfu: float
    step_tokens: int
    reserved_share: float
    network_bytes_s: float

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.tensor_parallel < 1 or self.gpus % self.tensor_parallel:
            raise ValueError(f"{self.gpus} GPUs are not replicas of {self.tensor_parallel} GPUs each")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu {self.mfu} is not in (0, 1]")

    @property
    def replicas(self) -> int:
        return self.gpus // self.tensor_parallel

    @property
    def flops_s(self) -> float:
        return self.gpus * self.accelerator.peak_flops_s * self.mfu


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on each GPU of a replica; what is left is the KV cache's.

    kv_room_tokens: that the replica's GPUs hold together; negative: it does not fit.
    """

    weights: float
    activations: float
    logprobs: float
    reserved: float
    kv_room_tokens: int


def gpu_memory(model: TeacherModel, deployment: Deployment, load: Load) -> GpuMemory:
    """As vLLM's V2 runner: the head on chunks of scored rows, the KV cache split over a replica's GPUs."""
    shards = deployment.tensor_parallel
    weights = model.parameters * WEIGHT_BYTES / shards
    a_token = MLP_COPIES * model.shape.intermediate_size / shards + HIDDEN_COPIES * model.shape.hidden_size
    activations = deployment.step_tokens * a_token * ACTIVATION_BYTES
    longest = load.context + load.completion
    logprobs_shape = LogprobsShape("V2", model.shape.vocab_size, load.k, ACTIVATION_BYTES, shards, longest)
    logprobs = float(peak_bytes(logprobs_shape, deployment.step_tokens))
    reserved = deployment.reserved_share * deployment.accelerator.memory_bytes
    left = deployment.accelerator.memory_bytes - weights - activations - logprobs - reserved
    return GpuMemory(weights, activations, logprobs, reserved, int(left * shards // model.kv_bytes_a_token))


def bytes_moved_a_forward(model: TeacherModel, deployment: Deployment, load: Load) -> float:
    """Device memory traffic of one forward of `step_tokens`: weights and the cache of what went before, once."""
    per_sequence = load.context / load.group + load.completion - 1
    sequences = max(1.0, deployment.step_tokens / per_sequence)
    mean_keys = load.context + load.completion / 2
    rows = deployment.step_tokens / tokens_read_a_scored_token(load)
    cache = (deployment.step_tokens + sequences * mean_keys) * model.kv_bytes_a_token
    logits = 2 * rows * model.shape.vocab_size * ACTIVATION_BYTES  # written, and read again for the normaliser
    return (model.shape.layer_weights + model.shape.head_weights) * WEIGHT_BYTES + cache + logits


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Prediction:
    """rates: scored tokens a second that each resource alone would allow."""

    flops: Flops
    tokens_read: float
    rates: dict[BoundName, float]
    bound: BoundName
    scored_tokens_per_s: float
    step_s: float  # one step's scoring, of all students
    wire: WireBytes
    sent_mbit_s: float
    received_mbit_s: float
    memory: GpuMemory
    sequences_at_once: int  # of a replica, a group's context held once

    @property
    def fits(self) -> bool:
        return self.sequences_at_once >= 1


def predict(model: TeacherModel, deployment: Deployment, load: Load) -> Prediction:
    """The slowest of compute, device memory and network, each taken alone.

    Raises: ValueError for heads that do not divide among a replica's GPUs.
    """
    if model.shape.num_heads % deployment.tensor_parallel:
        raise ValueError(
            f"{model.shape.num_heads} attention heads do not divide among {deployment.tensor_parallel} GPUs"
        )
    flops = flops_a_scored_token(model.shape, load)
    tokens_read = tokens_read_a_scored_token(load)
    wire = wire_bytes(load)
    forward_rows = deployment.step_tokens / tokens_read
    bandwidth_bytes_s = deployment.tensor_parallel * deployment.accelerator.bandwidth_bytes_s
    forward_s = bytes_moved_a_forward(model, deployment, load) / bandwidth_bytes_s
    rates: dict[BoundName, float] = {
        "compute": deployment.flops_s / flops.total,
        "memory": deployment.replicas * forward_rows / forward_s,
        "network": deployment.network_bytes_s / max(wire.sent, wire.received),
    }
    bound = min(rates, key=lambda name: rates[name])
    rate = rates[bound]
    memory = gpu_memory(model, deployment, load)
    held = load.context / load.group + load.completion
    return Prediction(
        flops=flops,
        tokens_read=tokens_read,
        rates=rates,
        bound=bound,
        scored_tokens_per_s=rate,
        step_s=load.scored_tokens / rate,
        wire=wire,
        sent_mbit_s=mbit_s(rate * wire.sent),
        received_mbit_s=mbit_s(rate * wire.received),
        memory=memory,
        sequences_at_once=int(max(0, memory.kv_room_tokens) // held),
    )


def mbit_s(bytes_s: float) -> float:
    return bytes_s * BITS_A_BYTE / 1e6
