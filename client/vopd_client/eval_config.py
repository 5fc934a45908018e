"""The settings of `vopd-client eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vopd_client.config import Settings, Verifier


class EvalConfig(Settings):
    """Exact match of a local model's greedy completions."""

    model: str = Field(description="Model to evaluate: a directory (a run's model/) or a hub id.")
    prompts: str = Field(
        description="Prompts with answers: a .jsonl or .parquet file, or a hub data set (name, or name:split)."
    )
    as_teacher: bool = Field(
        False, description="Show the model what the rows give the teacher (few-shot, hints) instead of the student."
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Tokens of a student's prompt, at most; a longer one is refused before the model runs."
    )
    max_new_tokens: int = Field(256, ge=1, description="Tokens of a completion, at most.")
    batch_size: int = Field(16, ge=1, description="Completions decoded side by side.")
    verifier: Verifier = Field(
        "exact", description="How a completion is compared with a row's answer, unless the row names its own verifier."
    )
    sample_count: int = Field(3, ge=0, description="Completions shown.")
    mixed_precision: Literal["bf16", "no"] = Field("no", description="Autocast over fp32 weights.")
    device: str | None = Field(None, description="Device: cpu, cuda, mps; default: the best there is.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model's files.")
    json_file: Path | None = Field(None, description="File to write the result to as JSON, beside the table.")
