"""Settings of training, and what the commands' settings share; with `command_config`, every setting of the client.

Each has its unit and default, and is the one source of its flag, file key and environment variable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import NoDecode

from vopd_client.named_values import NamedLists, split_commas

Objective = Literal["opd", "vopd", "vopd-rb", "vopd-full", "topk-kl", "full-kl"]
Verifier = Literal["exact", "contains", "regex", "math", "boxed-math", "choice"]

FULL_VOCABULARY_OBJECTIVES: frozenset[Objective] = frozenset({"vopd-full", "full-kl"})
OURS: Objective = "vopd-rb"  # all others are the paper's, and come with the paper's settings
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
    prompt_suffix: str = Field(
        "",
        description="Text appended to every prompt as it is; the teacher sees it too, unless a row gives it a context "
        "of its own.",
    )


class TrainConfig(AnyTeacherConfig, PromptColumns):
    """One training run."""

    teacher: NamedLists = Field(
        default_factory=dict,
        description="Instead of teacher-url: a teacher with a name, name=address; repeat for several teachers, each of "
        "which scores the rows whose key teacher names it. Replicas of one: name=address,address.",
    )
    teacher_key_file: NamedLists = Field(
        default_factory=dict,
        description="File that holds the API key for the teacher of a name, name=file, where it is not api-key-file's; "
        "repeat for several.",
    )
    teacher_window: int | None = Field(
        None,
        ge=1,
        le=4000,
        description="Sequences sent to the teacher and not yet answered, at most; default: 64, or as many as a "
        "process can have in flight where that is more.",
    )

    # --- who and what
    student: str = Field(description="Student model: a directory or a hub id.")
    prompts: str = Field(
        description="Training prompts: a .jsonl or .parquet file, or a hub data set (name, name:split or "
        "name:configuration:split)."
    )
    eval_prompts: str | None = Field(None, description="Held-out prompts, in the same forms; none: no evaluation.")
    output_dir: Path = Field(Path("runs"), description="Directory that holds the runs.")
    name: str | None = Field(
        None, description="Name of the run, a directory in output-dir; default: objective and time of start."
    )
    resume: bool = Field(False, description="Go on from the newest checkpoint of the run of this name.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the student's model files.")

    # --- the objective
    objective: Objective = Field(
        OURS,
        description="What is minimised, see docs/method.md; vopd, with nothing else said, is the paper's estimator.",
    )
    top_k: int = Field(100, ge=1, description="Ids in the support of a position, at most (K).")
    support: Literal["student", "teacher"] = Field(
        "student",
        description="Whose top-k the support is; a teacher that cannot gather falls back to its own, and says so.",
    )
    support_mass: float = Field(
        0.9999,
        gt=0,
        le=1,
        description="Student probability at which a position's support stops growing; 1, the default of the paper's "
        "objectives (all but vopd-rb): always top-k ids.",
    )
    tail: Literal["bucket", "renormalise"] = Field(
        "bucket",
        description="What is outside the support: one bucket, or left out and the support renormalised, the default of "
        "the paper's objectives.",
    )
    baseline: Literal["kl", "optimal", "none"] | None = Field(
        None,
        description="Baseline of the sampled terms: the KL value, the variance-optimal scalar, or none; default: "
        "optimal for vopd-rb, kl for vopd and vopd-full.",
    )
    temperature: Temperature = Field(
        1.0, description="Temperature of the sampling and of both models' log-probabilities."
    )

    max_staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="Updates between the weights that sample and those that learn. 0: strictly on-policy. 1: the next "
        "step's rollouts are sampled, and scored by the teacher, while this step's update computes.",
    )

    # --- what is done to rewards and advantages; see docs/method.md for when, and for what it costs in bias
    reward_clip_lambda: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Cut rewards from below at log(lambda) / (1 - lambda) nats: against single tokens that the "
        "teacher finds impossible. Biased: such tokens are punished less.",
    )
    advantage_clip: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Keep advantages within this many nats on both sides: against outliers that the reward's floor "
        "leaves. Biased, and the more so the worse the baseline.",
    )
    importance_cap: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="Weigh sampled terms by min(cap, pi_now / pi_then): for rollouts of an older student or of "
        "another engine. Biased where the cap cuts (importance_truncated_fraction says how often). Default: none, and "
        "2 with max-staleness 1.",
    )
    task_reward_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Add this weight times (1 for a right answer - the mean of the prompt's other rollouts) to the "
        "advantage of every token: for answers that can be checked. Another objective than the teacher's KL.",
    )

    # --- rollouts
    prompts_per_step: int = Field(8, ge=1, description="Prompts of one optimizer step, over all processes.")
    rollouts_per_prompt: int = Field(
        2,
        ge=1,
        description="Completions sampled for each of them; more of them share a context, and compare task rewards.",
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Tokens of a prompt, at most; a longer one is refused before the run starts."
    )
    max_new_tokens: int = Field(256, ge=1, description="Tokens of a completion, at most.")
    rollout_batch_size: int = Field(16, ge=1, description="Completions sampled side by side.")
    end_token: Literal["map", "drop", "keep"] = Field(
        "map",
        description="When student and teacher end with different tokens: map the student's to the teacher's, drop its "
        "row from the loss, or keep it as it is.",
    )

    # --- optimisation
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    learning_rate: float = Field(1e-5, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate over the steps.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    microbatch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens, padding included, of one forward and backward pass, at most (one sequence always fits).",
    )
    mixed_precision: MixedPrecision = Field("bf16", description="Autocast over fp32 master weights.")
    lora_rank: int = Field(0, ge=0, description="Rank of LoRA adapters; 0: full fine-tuning.")
    lora_alpha: float = Field(128.0, gt=0, description="LoRA alpha.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    seed: int = Field(
        42,
        ge=0,
        description="Everything random derives from it, the step, the prompt and the rollout's index.",
    )
    deterministic: bool = Field(
        False, description="The same run gives the same bits (slower; the teacher must be deterministic too)."
    )
    device: str | None = Field(None, description="Device of the student: cpu, cuda, mps; default: the best there is.")

    # --- what is written
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0: before and after only.")
    eval_max_new_tokens: int | None = Field(
        None, ge=1, description="Tokens of a completion in evaluation; default: max-new-tokens."
    )
    eval_kl: Literal["auto", "support", "vocabulary"] = Field(
        "auto",
        description="What the KL of an evaluation is taken over: the support and one bucket, or the whole vocabulary "
        "(the teacher must give hidden states); auto: the vocabulary where that can be.",
    )
    eval_teacher: YesNoAuto = Field(
        "auto",
        description="Measure the teacher's own exact match through the scoring service; auto: for completions of at "
        "most 64 tokens.",
    )
    verifier: Verifier = Field(
        "exact",
        description="How a completion is compared with a row's answer, unless the row names its own verifier.",
    )
    checkpoint_every: int = Field(20, ge=0, description="Steps between checkpoints; 0: at the end only.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept, the newest first.")
    sample_count: int = Field(3, ge=0, description="Completions shown and written at each evaluation.")

    @model_validator(mode="before")
    @classmethod
    def _objectives_of_the_paper_come_with_its_settings(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("objective", OURS) != OURS:
            return SETTINGS_OF_THE_PAPER | given
        return given

    @model_validator(mode="after")
    def _one_way_to_teach(self) -> Self:
        if sum(map(bool, (self.teacher_url, self.teacher, self.teacher_model))) != 1:
            raise ValueError(
                "give one of teacher_url (a remote teacher), teacher (one or several, each with a name) and "
                "teacher_model (one in this process)"
            )
        return self

    @model_validator(mode="after")
    def _rows_can_name_their_teachers(self) -> Self:
        for setting in ("prompt_column", "answer_column"):
            if len(self.teacher) > 1 and getattr(self, setting) is not None:
                raise ValueError(f"{setting} reads no other columns, and with several teachers each row names its own")
        return self

    @model_validator(mode="after")
    def _one_key_file_each(self) -> Self:
        for name, paths in self.teacher_key_file.items():
            if name not in self.teacher:
                raise ValueError(
                    f"teacher_key_file: no teacher {name!r}; there are {', '.join(self.teacher) or 'none'}"
                )
            if len(paths) > 1:
                raise ValueError(f"teacher_key_file: {name} has {len(paths)} files and takes one: {', '.join(paths)}")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self
