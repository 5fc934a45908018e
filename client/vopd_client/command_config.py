"""Settings of the commands beside training: info, score, eval, variance, report, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from vopd_client.config import (
    AnyTeacherConfig,
    ChatSettings,
    CommaSeparated,
    MixedPrecision,
    PromptColumns,
    Settings,
    TeacherConfig,
    Temperature,
    Verifier,
)
from vopd_client.named_values import split_commas


def _split_numbers(value: object) -> object:
    """`1,4` is two numbers, and one may stand alone."""
    return split_commas([value] if isinstance(value, int | float) else value)


Integers = Annotated[list[int], NoDecode, BeforeValidator(_split_numbers)]
Paths = Annotated[list[Path], NoDecode, BeforeValidator(split_commas)]
Shares = Annotated[list[float], NoDecode, BeforeValidator(_split_numbers)]


class InfoConfig(TeacherConfig):
    """`vopd-client info`."""

    teacher_url: CommaSeparated = Field(min_length=1, description=TeacherConfig.model_fields["teacher_url"].description)
    # Somebody looks at the screen: a teacher that is not there is soon said so.
    teacher_timeout_s: float = Field(
        20.0, gt=0, description=TeacherConfig.model_fields["teacher_timeout_s"].description
    )


class ScoreConfig(InfoConfig):
    """`vopd-client score`."""

    prompt: str = Field(min_length=1, description="Text before the completion.")
    completion: str = Field(description="Text to score.")
    chat: bool = Field(False, description="Render the prompt as a user's message with the teacher's chat template.")
    top: int = Field(5, ge=0, description="The teacher's own most likely tokens shown at every position; 0: none.")
    temperature: Temperature = Field(1.0, description="Temperature of the teacher's log-probabilities.")


class EvalConfig(PromptColumns, ChatSettings):
    """`vopd-client eval`."""

    model: str = Field(description="Model to evaluate: a directory (a run's model/) or a hub id.")
    prompts: str = Field(
        description="Prompts with answers: a .jsonl or .parquet file, a hub data set (name, name:split or "
        "name:configuration:split), or rows that a task makes (reasoning-gym:task, see docs/evaluation.md)."
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
    samples_per_prompt: int = Field(
        1, ge=1, description="Completions of each prompt (n): 1 is the greedy one, more are sampled."
    )
    temperature: Temperature = Field(1.0, description="Temperature of the samples.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Samples come from the fewest ids whose probability reaches this; 1: from all."
    )
    # Not top_k: that is the support's size in training, and the environment variable would be the same.
    sampling_top_k: int = Field(
        0, ge=0, description="Samples come from this many most likely ids, before top-p; 0: from all."
    )
    seed: int = Field(42, ge=0, description="Every draw derives from it, the prompt, the sample and the token's place.")
    sample_count: int = Field(3, ge=0, description="Completions shown.")
    mixed_precision: MixedPrecision = Field("no", description="Autocast over fp32 weights.")
    device: str | None = Field(None, description="Device: cpu, cuda, mps; default: the best there is.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model's files.")
    json_file: Path | None = Field(None, description="File to write the result to as JSON, beside the table.")

    @model_validator(mode="after")
    def _sampling_needs_samples(self) -> Self:
        for name in ("temperature", "top_p", "sampling_top_k"):
            value = getattr(self, name)
            if self.samples_per_prompt == 1 and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {value} has no effect on the one greedy completion of samples_per_prompt 1: "
                    "give samples_per_prompt 2 or more"
                )
        return self


class VarianceConfig(AnyTeacherConfig, PromptColumns, ChatSettings):
    """`vopd-client variance`."""

    student: str = Field(description="Student model: a directory or a hub id.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the student's model files.")
    prompts: str = Field(
        description="Prompts that the student answers: a .jsonl or .parquet file, or a hub data set (name, name:split "
        "or name:configuration:split)."
    )
    max_prompts: int = Field(
        32, ge=1, description="Rows of them that are used, at most: the ones that training with this seed begins with."
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Tokens of a prompt, at most; a longer one is refused before anything is sampled."
    )
    rollouts_per_prompt: int = Field(1, ge=1, description="Completions sampled for each row.")
    max_new_tokens: int = Field(64, ge=1, description="Tokens of a completion, at most.")
    max_positions: int = Field(
        256,
        ge=1,
        description="Positions measured, at most, drawn at random from those of all completions; each costs several "
        "passes over both distributions.",
    )
    support_sizes: Integers = Field(
        [1, 4, 16, 100],
        min_length=1,
        description="Support sizes compared (K), in ids a position; repeat, or separate by commas.",
    )
    support_masses: Shares = Field(
        [1.0, 0.9999, 0.99, 0.9],
        min_length=1,
        description="Student probabilities at which an adaptive support of at most the largest K stops growing, "
        "compared in the second table; repeat, or separate by commas.",
    )
    temperature: Temperature = Field(
        1.0, description="Temperature of the sampling and of both models' log-probabilities."
    )
    end_token: Literal["map", "drop", "keep"] = Field(
        "map",
        description="When student and teacher end with different tokens: map the student's to the teacher's, leave its "
        "row out, or keep it as it is.",
    )
    seed: int = Field(42, ge=0, description="The choice of rows and positions and every sampled token derive from it.")
    rollout_batch_size: int = Field(16, ge=1, description="Completions sampled side by side.")
    microbatch_tokens: int = Field(
        4096, ge=1, description="Tokens, padding included, of one forward pass, at most (one sequence always fits)."
    )
    mixed_precision: MixedPrecision = Field("no", description="Autocast over fp32 weights of the student.")
    device: str | None = Field(None, description="Device: cpu, cuda, mps; default: the best there is.")
    json_file: Path | None = Field(None, description="File to write the tables to as JSON.")
    plot_file: Path | None = Field(None, description="File to draw the first table to; .png, .svg or .pdf.")

    @field_validator("support_sizes")
    @classmethod
    def _positive_sizes(cls, sizes: list[int]) -> list[int]:
        if min(sizes) < 1:
            raise ValueError("a support has at least 1 id")
        return sorted(set(sizes))

    @field_validator("support_masses")
    @classmethod
    def _probabilities(cls, masses: list[float]) -> list[float]:
        if not all(0 < mass <= 1 for mass in masses):
            raise ValueError("a student probability lies in (0, 1]")
        return sorted(set(masses), reverse=True)

    @field_validator("plot_file")
    @classmethod
    def _known_picture(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in {".png", ".svg", ".pdf"}:
            raise ValueError("a picture's name ends with .png, .svg or .pdf")
        return path


class ReportConfig(Settings):
    """`vopd-client report`."""

    run_dir: Path = Field(description="Directory of the run (also as the first argument).")


class ExportConfig(Settings):
    """`vopd-client export`."""

    run_dir: Path = Field(description="Directory of the run (also as the first argument).")
    checkpoint: str | None = Field(
        None, description="Checkpoint of the run, such as step-000020; default: the newest complete one."
    )
    export: Literal["merged", "adapter"] | None = Field(
        None,
        description="The whole model, LoRA merged in, or LoRA's adapter alone; default: as the run's settings say.",
    )
    export_dtype: Literal["auto", "float32", "bfloat16"] | None = Field(
        None,
        description="Type of the weights, auto: that of the student's own files; default: as the run's settings say.",
    )
    # Not output_dir: that holds the runs in training, and the environment variable would be the same.
    export_dir: Path | None = Field(
        None, description="Directory to write; default: in the run's, such as merged-step-000020."
    )


class CompareConfig(Settings):
    """`vopd-client compare`."""

    inputs: Paths = Field(
        description="Directories of runs, or result files of eval's json-file (also as the first arguments); repeat, "
        "or separate by commas."
    )
    # Not output_dir: that holds the runs, and the environment variable would be the same.
    comparison_dir: Path | None = Field(
        None,
        description="Directory for comparison.png and comparison.html; default: comparison-a-b beside the first input, "
        "a and b being the inputs' names.",
    )
