"""Settings of a training run.

Each has its unit and default, and is the one source of its flag, file key and environment variable.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from vopd_client.config import (
    ONLY_TENSORBOARD,
    OURS,
    SETTINGS_OF_THE_PAPER,
    AnyTeacherConfig,
    ChatSettings,
    MixedPrecision,
    Objective,
    PromptColumns,
    Temperature,
    Tracker,
    Verifier,
    YesNoAuto,
)
from vopd_client.named_values import JsonObject, NamedLists, split_commas


class TrainConfig(ChatSettings, PromptColumns, AnyTeacherConfig):
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
        description="Training prompts: a .jsonl or .parquet file, a hub data set (name, name:split or "
        "name:configuration:split), or rows that a task makes (reasoning-gym:task, see docs/evaluation.md)."
    )
    eval_prompts: str | None = Field(None, description="Held-out prompts, in the same forms; none: no evaluation.")
    stream_prompts: bool = Field(
        False,
        description="Read the training prompts piece by piece as steps need them, in file order through a shuffle "
        "buffer: for those that are too large to hold.",
    )
    shuffle_buffer: int = Field(
        1000, ge=1, description="Rows of a stream that are read at once and drawn in random order; 1: in file order."
    )
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
        "2 with max-staleness 1 or rollouts vllm.",
    )
    task_reward_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Add this weight times (1 for a right answer - the mean of the prompt's other rollouts) to the "
        "advantage of every token: for answers that can be checked; rows of reasoning-gym give their task's score. "
        "Another objective than the teacher's KL.",
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
    rollouts: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What samples them: transformers in the trainer, or vLLM, as an engine in the trainer or, with "
        "rollouts-url, as a server; see docs/rollouts.md.",
    )
    rollouts_url: str | None = Field(
        None,
        description="Address of a vLLM server for the rollouts, http://host:port; none: vLLM runs in the trainer's "
        "environment, one engine a process.",
    )
    rollouts_engine_args: JsonObject = Field(
        default_factory=dict,
        description="vLLM's own engine arguments for an engine in the trainer, as a JSON object: "
        "'{\"gpu_memory_utilization\": 0.4}'.",
    )
    rollouts_timeout_s: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without any answer of the rollout server after which it counts as gone.",
    )
    weight_sync: Literal["auto", "disk", "nccl", "ipc"] = Field(
        "auto",
        description="How weights reach vLLM before each step's rollouts: files that it reads, GPU to GPU over NCCL "
        "(servers), or memory of a GPU that both use (an engine in the trainer); auto: what the engine can, else disk.",
    )
    cut_completions: Literal["keep", "mask"] = Field(
        "keep",
        description="Completions that reach max-new-tokens without an end token: learned from as far as they go, or "
        "masked, that is left out of the loss and not sent to the teacher. Masking is biased: what is long is never "
        "corrected.",
    )

    environment: str | None = Field(
        None,
        description="What replies to the student between its turns, package.module:name, a class or a function that "
        "makes one; importable from the working directory. None: completions are single turns.",
    )
    max_turns: int | None = Field(
        None, ge=1, description="Turns of the student in a trajectory, at most; default: 8 with an environment."
    )
    environment_timeout_s: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="Seconds that one reply of the environment may take."
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
    gradient_checkpointing: bool = Field(
        False,
        description="Keep the inputs of the student's layers only and compute the rest again in the backward pass: "
        "less memory, for about a third more computation in an update.",
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="Several processes: none keeps the whole model in each, fsdp (FSDP2) a part of every weight, "
        "gradient and moment; see docs/processes.md.",
    )
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
    trackers: Annotated[list[Tracker], NoDecode, BeforeValidator(split_commas)] = Field(
        ONLY_TENSORBOARD,
        description="Where metrics go beside metrics.jsonl, accelerate's trackers: tensorboard, wandb, mlflow, "
        "comet_ml, aim, clearml, dvclive, swanlab, trackio; repeat, or separate by commas; none: nowhere.",
    )
    tracker_project: str = Field("vopd", min_length=1, description="Project of the trackers that have projects.")
    checkpoint_every: int = Field(20, ge=0, description="Steps between checkpoints; 0: at the end only.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept, the newest first.")
    sample_count: int = Field(3, ge=0, description="Completions shown and written at each evaluation.")
    export: Literal["merged", "adapter"] = Field(
        "merged",
        description="What model/ holds in the end: the whole model, LoRA merged in, or LoRA's adapter alone, to be "
        "loaded over the student's base.",
    )
    export_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of the weights in model/; auto: that of the student's own files. Checkpoints keep float32.",
    )
    eval_samples_per_prompt: int = Field(
        1,
        ge=1,
        description="Completions of each held-out prompt (n): 1 is the greedy one and gives exact match, more are "
        "sampled and give avg@n, pass@n and maj@n.",
    )
    eval_temperature: Temperature = Field(1.0, description="Temperature of these samples.")
    eval_top_p: float = Field(
        1.0, gt=0, le=1, description="They come from the fewest ids whose probability reaches this; 1: from all."
    )
    eval_top_k: int = Field(
        0, ge=0, description="They come from this many most likely ids, before eval-top-p; 0: from all."
    )

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

    @field_validator("trackers")
    @classmethod
    def _trackers_once(cls, trackers: list[Tracker]) -> list[Tracker]:
        if "none" in trackers and len(trackers) > 1:
            raise ValueError(f"none stands alone, and not with {', '.join(set(trackers) - {'none'})}")
        if not trackers:
            raise ValueError("name a tracker, or none")
        return list(dict.fromkeys(trackers))

    @model_validator(mode="after")
    def _a_stream_has_a_buffer(self) -> Self:
        if not self.stream_prompts and self.shuffle_buffer != type(self).model_fields["shuffle_buffer"].default:
            raise ValueError(
                f"shuffle_buffer {self.shuffle_buffer} has no effect without stream_prompts: a list of prompts is "
                "shuffled whole"
            )
        return self

    @model_validator(mode="after")
    def _sampling_needs_samples(self) -> Self:
        for name in ("eval_temperature", "eval_top_p", "eval_top_k"):
            value = getattr(self, name)
            if self.eval_samples_per_prompt == 1 and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {value} has no effect on the one greedy completion of eval_samples_per_prompt 1: "
                    "give eval_samples_per_prompt 2 or more"
                )
        if self.eval_samples_per_prompt > 1 and self.eval_prompts is None:
            raise ValueError(f"eval_samples_per_prompt {self.eval_samples_per_prompt} needs eval_prompts")
        return self

    @model_validator(mode="after")
    def _turns_have_an_environment(self) -> Self:
        if self.environment is None and self.max_turns is not None:
            raise ValueError(f"max_turns {self.max_turns}: without an environment nothing replies to a first turn")
        if self.environment is not None and (self.prompt_column is not None or self.answer_column is not None):
            raise ValueError("prompt_column and answer_column read plain text, and an environment replies to messages")
        return self

    @model_validator(mode="after")
    def _adapters_are_there_to_export(self) -> Self:
        if self.export == "adapter" and self.lora_rank == 0:
            raise ValueError("export adapter needs adapters: give a lora_rank above 0, or export merged")
        return self

    @model_validator(mode="after")
    def _settings_of_vllm_go_with_vllm(self) -> Self:
        given = {
            "rollouts_url": self.rollouts_url is not None,
            "rollouts_engine_args": bool(self.rollouts_engine_args),
            "weight_sync": self.weight_sync != "auto",
        }
        for setting, is_given in given.items():
            if self.rollouts == "transformers" and is_given:
                raise ValueError(f"{setting} is about vLLM: it needs rollouts vllm")
        if self.rollouts_url is not None and not re.fullmatch(r"https?://[^/\s]+/?", self.rollouts_url):
            raise ValueError(f"rollouts_url is http://host:port, and not {self.rollouts_url!r}")
        if self.rollouts_url is not None and self.rollouts_engine_args:
            raise ValueError("rollouts_engine_args are of an engine in the trainer: a server has its own flags")
        if self.rollouts == "vllm" and self.deterministic:
            raise ValueError(
                "deterministic does not go with rollouts vllm: the last bits of its logits depend on what else it "
                "computes at the time, and with them which tokens are drawn"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self
