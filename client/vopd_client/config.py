"""What the settings of training (`train_config`) and of the other commands (`command_config`) share.

Each setting has its unit and default, and is the one source of its flag, file key and environment variable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from vopd_client.named_values import JsonObject, split_commas

Objective = Literal["opd", "vopd", "vopd-rb", "vopd-full", "topk-kl", "full-kl"]
Verifier = Literal["exact", "contains", "regex", "math", "boxed-math", "choice", "reasoning-gym"]
AnswerForm = Literal["whole", "hashes", "boxed"]
# Accelerate's, by its names for them.
Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio", "none"
]  # fmt: skip
ONLY_TENSORBOARD: list[Tracker] = ["tensorboard"]

FULL_VOCABULARY_OBJECTIVES: frozenset[Objective] = frozenset({"vopd-full", "full-kl"})
OURS: Objective = "vopd-rb"  # all others are the paper's, and come with the paper's settings
# What a chat template reads to switch thinking on and off: Qwen3, SmolLM3 and GLM the first, DeepSeek and Granite the
# second.
THINKING_VARIABLES = ("enable_thinking", "thinking")
# Arguments of the rendering itself, which are not a template's to have.
RENDERING_ARGUMENTS = frozenset(
    {
        *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "bos_token", "eos_token"),
    }
)
SETTINGS_OF_THE_PAPER = {"support_mass": 1.0, "tail": "renormalise"}


class Settings(BaseModel):
    """Unknown keys are errors; values are checked when they are set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _yes_or_no(value: object) -> object:
    """YAML reads a bare `no` as false; here it is a word."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


CommaSeparated = Annotated[list[str], NoDecode, BeforeValidator(split_commas)]
MixedPrecision = Annotated[Literal["bf16", "no"], BeforeValidator(_yes_or_no)]
YesNoAuto = Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_or_no)]
Temperature = Annotated[float, Field(ge=1e-4, allow_inf_nan=False)]  # the teacher takes none below


class TeacherConfig(Settings):
    """How to reach the teacher."""

    teacher_url: CommaSeparated = Field(
        default_factory=list,
        description="Address of the teacher, grpc://host:port or http://host:port, over TLS grpcs:// or https://; "
        "several replicas of one teacher: repeat, or separate by commas.",
    )
    api_key_file: Path | None = Field(
        None, description="File that holds the API key (sent over TLS or to loopback only)."
    )
    plaintext: bool = Field(False, description="Send the API key over an unencrypted connection to another machine.")
    tls_ca_file: Path | None = Field(
        None,
        description="PEM file with the certificate authority of a grpcs:// or https:// teacher; default: those that "
        "gRPC ships, or the system's for https://.",
    )
    teacher_timeout_s: float = Field(
        600.0, gt=0, description="Seconds without any progress of the teacher after which it counts as gone."
    )
    score_float_type: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="Type of the scores on the wire."
    )


class AnyTeacherConfig(TeacherConfig):
    """A teacher at an address, or one in this process."""

    teacher_model: str | None = Field(
        None,
        description="Instead of teacher-url: a directory or hub id of a teacher that runs in this process.",
    )
    head_cache: Path | None = Field(
        None,
        description="Directory for output heads of teachers, which the whole vocabulary needs; default: vopd/heads in "
        "the user's cache directory.",
    )

    @model_validator(mode="after")
    def _one_way_to_teach(self) -> Self:
        if bool(self.teacher_url) == bool(self.teacher_model):
            raise ValueError("give either teacher_url (a remote teacher) or teacher_model (one in this process)")
        return self


class PromptColumns(Settings):
    """How rows that were not written for this project are read as prompts and answers."""

    prompt_column: str | None = Field(
        None,
        description="Column of the rows that holds the prompt, as text; with it or answer-column, all other columns "
        "are left out.",
    )
    answer_column: str | None = Field(
        None, description="Column of the rows that holds the answer, as text or as a number."
    )
    answer_form: AnswerForm = Field(
        "whole",
        description="Where the answer is in its column: the whole text, behind the last #### (GSM8K), or in the last "
        "\\boxed{...} of a worked solution.",
    )
    prompt_suffix: str = Field(
        "",
        description="Text appended to every prompt as it is; the teacher sees it too, unless a row gives it a context "
        "of its own.",
    )


class ChatSettings(Settings):
    """How chats are rendered, by the student's chat template and by the teacher's."""

    thinking: YesNoAuto = Field(
        "auto",
        description="Whether chat templates ask for thinking before the reply, on both sides; auto: as the templates "
        "do when nothing is said.",
    )
    chat_template_kwargs: JsonObject = Field(
        default_factory=dict,
        description='Other variables of both sides\' chat templates, a JSON object: \'{"reasoning_effort": "low"}\'.',
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_of_a_template(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if name in RENDERING_ARGUMENTS:
                raise ValueError(f"{name} is not a variable of the template's own: how chats are rendered is fixed")
        return values

    @model_validator(mode="after")
    def _thinking_is_said_once(self) -> Self:
        both = [name for name in THINKING_VARIABLES if name in self.chat_template_kwargs]
        if self.thinking != "auto" and both:
            raise ValueError(f"thinking {self.thinking} sets {both[0]} itself: take it out of chat_template_kwargs")
        return self
