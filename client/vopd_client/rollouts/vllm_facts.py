"""What vLLM's workers say of themselves, and whether a run can sample there. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from vopd_client.errors import ConfigError

WORKER_EXTENSION = "vopd_client.rollouts.vllm_worker.StudentWorker"


class EngineFacts(BaseModel):
    """An answer of `StudentWorker.vopd_facts`. weight_transfer: the backend that the engine was started with, or ""."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    vllm_version: str
    model: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    max_logprobs: int
    logprobs_mode: str
    dtype: Literal["float32", "bfloat16", "float16"]
    device: str
    weight_transfer: str
    world_size: int


class StudentShape(BaseModel):
    """What of the trainer's student must be the same in the engine."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int


def check_settings(facts: EngineFacts, *, num_logprobs: int, max_length: int, where: str) -> None:
    """Whether the engine was started with what a run needs. Raises: ConfigError naming the flags that are missing.

    Args:
        num_logprobs: log-probabilities that are asked for at each position.
        max_length: tokens of the longest prompt with the longest completion.
        where: how messages call the engine.
    """
    wrong = []
    if facts.logprobs_mode != "processed_logprobs":
        wrong.append(
            f"--logprobs-mode processed_logprobs (it has {facts.logprobs_mode}, which knows no temperature and no "
            "masked ids)"
        )
    if 0 <= facts.max_logprobs < num_logprobs:
        wrong.append(f"--max-logprobs {num_logprobs} (it has {facts.max_logprobs})")
    if facts.max_model_len < max_length:
        wrong.append(f"--max-model-len {max_length} (it has {facts.max_model_len}; prompt and completion must fit)")
    if wrong:
        raise ConfigError(f"{where} must be started with {' and '.join(wrong)}")


def check_student(facts: EngineFacts, student: StudentShape, *, where: str) -> None:
    """Whether the trainer's weights fit. Raises: ConfigError naming every difference."""
    differences = [
        f"{name} {getattr(facts, name)} instead of {getattr(student, name)}"
        for name in StudentShape.model_fields
        if getattr(facts, name) != getattr(student, name)
    ]
    if differences:
        raise ConfigError(f"{where} serves {facts.model}, which is not the student: {', '.join(differences)}")
