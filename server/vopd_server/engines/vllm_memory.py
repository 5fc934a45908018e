"""Device memory that vLLM's prompt log-probabilities take, and how to leave room for it. Pure, no vLLM.

vLLM measures a forward and a sampling step, gives the KV cache all that these leave of `gpu_memory_utilization`
(v1/worker/gpu_worker.py, determine_available_memory), and never counts the log-probabilities of a prompt. They
have to live in the share of the device that vLLM leaves alone. Read in vLLM 0.32:

- V1 (v1/worker/gpu_model_runner.py, _get_prompt_logprobs_dict) does not chunk. Request by request it takes all the
  rows that a step has computed, max_num_batched_tokens at most: their logits in the model's dtype, a float32
  log-softmax of them (v1/sample/sampler.py), and a comparison of both for the ranks.
- V2 (v1/worker/gpu/sample/prompt_logprob.py) takes 1024 rows at a time and no float32 copy, but a chunk's logits
  stay until the next chunk's are there. Answers stay on the device until their prompt is done and are joined then.

Behind more than one GPU the logits are a rank's part, the gathered parts and the whole at a time
(model_executor/layers/logits_processor.py); a soft cap or a scale takes a second copy on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vopd_server.errors import ConfigError

Runner = Literal["V1", "V2"]

V2_CHUNK_ROWS = 1024
# Per row and id, V1: top values and ids, then both joined with the sampled token's, then ids as int32.
_V1_ANSWER_BYTES = 4 + 8 + 4 + 8 + 4
# V2: an id and its value, twice while they are joined.
_V2_ANSWER_BYTES = 2 * (8 + 4)
# Below these the teacher would rather not start.
LEAST_ROWS = 256
LEAST_UTILIZATION = 0.5


@dataclass(frozen=True, slots=True)
class LogprobsShape:
    """What the peak depends on, rows excepted. longest: tokens of one sequence. k: ids a row beside the sampled one."""

    runner: Runner
    vocab_size: int
    k: int
    itemsize: int  # bytes of one of the model's own logits
    num_gpus: int  # that share the output head
    longest: int


def peak_bytes(shape: LogprobsShape, rows: int) -> int:
    """Bytes on one device that a step of `rows` prompt tokens takes beside what vLLM has measured, at most."""
    logits_copies = 3 if shape.num_gpus > 1 else 2
    if shape.runner == "V1":
        per_logit = max(logits_copies * shape.itemsize, shape.itemsize + 4 + 1)
        return rows * (shape.vocab_size * per_logit + (shape.k + 1) * _V1_ANSWER_BYTES)
    chunk_rows = min(rows, V2_CHUNK_ROWS)
    logits = chunk_rows * shape.vocab_size * (logits_copies + 1) * shape.itemsize
    return logits + (rows + shape.longest) * (shape.k + 1) * _V2_ANSWER_BYTES


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """max_num_batched_tokens and gpu_memory_utilization; whether the operator has set them."""

    rows: int
    rows_are_set: bool
    utilization: float
    utilization_is_set: bool


def leave_room(shape: LogprobsShape, plan: MemoryPlan, *, device_bytes: int) -> MemoryPlan:
    """`plan`, or less of what the operator has not set, so that log-probabilities fit beside vLLM's share.

    The utilization goes down first, which costs KV cache; fewer rows a step cost speed.

    Raises: ConfigError, with the numbers, when what the operator has set does not fit.
    """
    needed = peak_bytes(shape, plan.rows)
    if needed <= _free_bytes(plan.utilization, device_bytes):
        return plan
    if not plan.utilization_is_set:
        lowered = int(100 * (1 - needed / device_bytes)) / 100
        if lowered >= LEAST_UTILIZATION:
            return MemoryPlan(plan.rows, plan.rows_are_set, lowered, False)
    rows = plan.rows // 2
    while not plan.rows_are_set and rows >= LEAST_ROWS:
        if peak_bytes(shape, rows) <= _free_bytes(plan.utilization, device_bytes):
            return MemoryPlan(rows, False, plan.utilization, plan.utilization_is_set)
        rows //= 2
    raise ConfigError(
        f"log-probabilities of {plan.rows} tokens a step over {shape.vocab_size} ids take {_gib(needed)}, and "
        f"gpu_memory_utilization {plan.utilization:g} leaves {_gib(_free_bytes(plan.utilization, device_bytes))} of "
        f"{_gib(device_bytes)} for them: lower engine_args.gpu_memory_utilization, "
        "engine_args.max_num_batched_tokens, max_context_length or max_top_k"
    )


def _free_bytes(utilization: float, device_bytes: int) -> int:
    return int(device_bytes * (1 - utilization))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
