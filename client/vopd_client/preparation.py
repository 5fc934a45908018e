"""Everything a run needs, loaded and checked against each other, before its first step.

In this order, so that a mistake costs as little waiting as can be: directory and prompts (by the trainer), then the
teachers, then the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vopd_client.baselines import choose_baseline
from vopd_client.chat_templates import chat_options, check_has_chats
from vopd_client.checkpoint import RunIdentity, StateStorage, TrainerState, checkpoint_name
from vopd_client.environment import check_rows, gives_rewards, introduce_environment
from vopd_client.errors import ConfigError, DataError
from vopd_client.optimization import make_optimizer, make_scheduler
from vopd_client.pipeline import InFlight
from vopd_client.processes import wrap
from vopd_client.prompt_source import ListedPrompts, PromptSource
from vopd_client.prompts import Prompt, PromptRow, RowFormat, choose_teachers, load_prompts, open_stream, read_row
from vopd_client.resumption import check_room, go_back_to_checkpoint, rollouts_in_flight
from vopd_client.rollout_engine import EngineStart, VllmRollouts, introduce_rollouts
from vopd_client.rollouts.base import Rollout, Sampler
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.run_directory import RunDirectory, settings_hash
from vopd_client.scoring import about_teacher
from vopd_client.shaping import DIFFERENTIATED_OBJECTIVES, Shaping, check_shaping, reward_floor
from vopd_client.sharded_checkpoint import ShardedState
from vopd_client.sharding import is_sharded, shard
from vopd_client.streamed_prompts import StreamedPrompts, StreamOfRows
from vopd_client.student import LoadedStudent, load_student
from vopd_client.teaching import (
    Tell,
    bias_warnings,
    compare_tokenizers,
    introduce,
    longest_completion,
    measures_teacher,
    plan_teaching,
    render,
)
from vopd_client.teaching_plan import Teachers, TeachingPlan, fit_to_teachers
from vopd_client.train_config import TrainConfig

STALE_IMPORTANCE_CAP = 2.0  # one update moves few tokens' probabilities by more; the metrics say how many


@dataclass(frozen=True)
class PromptRows:
    """The rows of both files, checked but not rendered yet.

    stream: where the training rows come from when they are not held; `train` then has those that it begins with.
    """

    train: list[PromptRow]
    held_out: list[PromptRow]
    stream: StreamOfRows | None = None


@dataclass(frozen=True)
class Run:
    """A run that can start: nothing in it changes but the weights."""

    config: TrainConfig
    accelerator: Accelerator
    directory: RunDirectory
    plans: Mapping[str, TeachingPlan]  # of the teachers, by the names that prompts call them by
    student: LoadedStudent
    model: nn.Module  # the student's module as accelerate wrapped it
    optimizer: Any
    scheduler: Any
    storage: StateStorage
    sampler: Sampler
    vllm: VllmRollouts | None  # what `sampler` samples with, where it is not transformers
    shaping: Shaping
    prompts: PromptSource
    eval_prompts: list[Prompt]
    identity: RunIdentity
    state: TrainerState
    in_flight: list[InFlight[list[Rollout]]]  # of this process: what the checkpoint holds of steps to come


def load_rows(config: TrainConfig) -> PromptRows:
    """Raises: DataError with file and line, also for a row whose teacher there is not; ConfigError for a teacher that
    no row names."""
    row_format = RowFormat(config.prompt_column, config.answer_column, config.prompt_suffix, config.answer_form)
    names = sorted(config.teacher)

    def load(spec: str) -> list[PromptRow]:
        rows = load_prompts(spec, default_verifier=config.verifier, row_format=row_format)
        return choose_teachers(rows, names)

    held_out = load(config.eval_prompts) if config.eval_prompts else []
    if config.eval_samples_per_prompt > 1 and all(row.answer is None for row in held_out):
        raise DataError(
            f"{config.eval_prompts}: no row has an answer, and eval_samples_per_prompt "
            f"{config.eval_samples_per_prompt} compares with answers"
        )
    if config.stream_prompts:
        parse = partial(parse_streamed_row, config=config, row_format=row_format)
        stream = StreamOfRows(
            config.prompts, open_stream(config.prompts, row_format=row_format), parse, config.shuffle_buffer
        )
        return PromptRows(stream.beginning(), held_out, stream)
    rows = PromptRows(check_rows(config, load(config.prompts)), held_out)
    check_has_chats(chat_options(config), (*rows.train, *rows.held_out))
    idle = set(names) - {row.teacher for row in (*rows.train, *rows.held_out)}
    if idle:
        raise ConfigError(f"no row names teacher {', '.join(sorted(idle))}: leave out what has nothing to teach")
    return rows


def parse_streamed_row(
    value: object, index: int, source: str, *, config: TrainConfig, row_format: RowFormat
) -> PromptRow:
    """One row of a stream with all that lists of rows are checked for. Raises: DataError with file and line."""
    row = read_row(value, index=index, source=source, default_verifier=config.verifier, row_format=row_format)
    if config.task_reward_weight > 0 and row.answer is None and not gives_rewards(config):
        raise DataError(f"{source}: no answer, and task_reward_weight {config.task_reward_weight:g} needs one")
    return check_rows(config, choose_teachers([row], sorted(config.teacher)))[0]


def prepare_run(
    config: TrainConfig,
    accelerator: Accelerator,
    directory: RunDirectory,
    rows: PromptRows,
    teachers: Teachers,
    tell: Tell,
    engine: EngineStart | None = None,
) -> Run:
    """Loads the student, checks that teachers, student and prompts go together, and goes back to a checkpoint.

    Raises: ConfigError, DataError, HandshakeError, RunDirectoryError, CheckpointError.
    """
    shaping = check_objective(config)
    check_answers(config, rows.train)
    for name, teacher in teachers.items():
        with about_teacher(name):
            measures_teacher(config, teacher.info)
    torch.manual_seed(config.seed)  # LoRA starts from it
    student = load_student(
        config.student,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        device=accelerator.device,
    )
    for name, teacher in teachers.items():
        with about_teacher(name):
            compare_tokenizers(student, teacher)
    prompts = render(rows.train, config, student, teachers, max_new_tokens=config.max_new_tokens)
    eval_prompts = render(rows.held_out, config, student, teachers, max_new_tokens=longest_completion(config))
    plans = plan_teaching(config, student, teachers, [*prompts, *eval_prompts], tell)
    plans = fit_to_teachers(student, plans, temperature=config.temperature, head_cache=config.head_cache, tell=tell)

    module = student.module
    check_end_tokens(config, shaping, plans)
    module.reward_floor = shaping.reward_floor
    check_room(config, directory, module)
    introduction = [*introduce(config, student, plans, prompts, eval_prompts), *introduce_environment(config)]
    for line in (*introduction, *introduce_staleness(config, shaping), *bias_warnings(config)):
        tell(line)

    if config.sharding == "fsdp":
        shard(module, accelerator)
    optimizer = make_optimizer(module, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = make_scheduler(
        optimizer, schedule=config.schedule, warmup_steps=config.warmup_steps, total_steps=config.steps
    )
    wrapped = wrap(accelerator, module, optimizer, scheduler)
    storage = ShardedState(accelerator, module, *wrapped[1:]) if is_sharded(module) else accelerator
    source = prompt_source(config, rows, prompts, student, teachers)
    identity = identity_of(config, source, teachers)
    state = go_back_to_checkpoint(config, storage, directory, identity, tell)
    if state.step > 0:
        source.read_state(directory.checkpoints / checkpoint_name(state.step), state.step)
    in_flight = rollouts_in_flight(config, accelerator, directory.checkpoints, state, source, tell)
    vllm = engine.prepare(student, accelerator, directory.path) if engine is not None else None
    for line in introduce_rollouts(vllm, importance_cap=shaping.importance_cap, is_weighed=has_sampled_term(config)):
        tell(line)
    return Run(
        config=config,
        accelerator=accelerator,
        directory=directory,
        plans=plans,
        student=student,
        model=wrapped.model,
        optimizer=wrapped.optimizer,
        scheduler=wrapped.scheduler,
        storage=storage,
        sampler=make_sampler(config, student, seed=config.seed) if vllm is None else vllm.sampler,
        vllm=vllm,
        shaping=shaping,
        prompts=source,
        eval_prompts=eval_prompts,
        identity=identity,
        state=state,
        in_flight=in_flight,
    )


def prompt_source(
    config: TrainConfig, rows: PromptRows, prompts: Sequence[Prompt], student: LoadedStudent, teachers: Teachers
) -> PromptSource:
    """Where steps get their prompts from; prompts: `rows.train`, rendered."""
    if rows.stream is None:
        return ListedPrompts(prompts, config.seed, config.prompts_per_step)

    def render_one(row: PromptRow) -> Prompt:
        return render([row], config, student, teachers, max_new_tokens=config.max_new_tokens)[0]

    return StreamedPrompts(
        rows.stream,
        render_one,
        seed=config.seed,
        prompts_per_step=config.prompts_per_step,
        max_staleness=config.max_staleness,
    )


def identity_of(config: TrainConfig, source: PromptSource, teachers: Teachers) -> RunIdentity:
    """What a checkpoint is compared with before a run goes on from it."""
    return RunIdentity(
        config_hash=settings_hash(config.model_dump(mode="json")),
        prompts_hash=source.fingerprint,
        teacher_model_id=of_each_teacher({name: teacher.info.model_id for name, teacher in teachers.items()}),
        teacher_model_revision=of_each_teacher(
            {name: teacher.info.model_revision for name, teacher in teachers.items()}
        ),
    )


def of_each_teacher(values: Mapping[str, str]) -> str:
    """What a checkpoint remembers of its teachers: `code=a, math=b`; of one without a name the value alone."""
    return ", ".join(f"{name}={value}" if name else value for name, value in sorted(values.items()))


def check_objective(config: TrainConfig) -> Shaping:
    """What is done to rewards and advantages. Raises: ConfigError for settings that do not go together."""
    choose_baseline(config.objective, config.baseline)
    importance_cap = config.importance_cap
    sampled_elsewhere = config.max_staleness > 0 or config.rollouts == "vllm"
    if importance_cap is None and sampled_elsewhere and has_sampled_term(config):
        importance_cap = STALE_IMPORTANCE_CAP
    shaping = Shaping(reward_floor(config.reward_clip_lambda), config.advantage_clip, importance_cap)
    check_shaping(config.objective, shaping, has_task_reward=config.task_reward_weight > 0)
    return shaping


def check_end_tokens(config: TrainConfig, shaping: Shaping, plans: Mapping[str, TeachingPlan]) -> None:
    """Importance weights compare probabilities of the same ids. Raises: ConfigError where end tokens are dropped."""
    if shaping.importance_cap is None or not any(plan.request.drop_end_ids for plan in plans.values()):
        return
    setting = "max_staleness 1" if config.max_staleness > 0 else "rollouts vllm"
    setting = "importance_cap" if config.importance_cap is not None else setting
    raise ConfigError(
        f"{setting} does not go with end_token drop: completions were sampled with the end token, and the "
        "probabilities that the loss sees, and importance weights compare with, are those without it"
    )


def has_sampled_term(config: TrainConfig) -> bool:
    """Whether the gradient depends on which token was drawn, so that an older student's draws must be weighed."""
    return config.objective not in DIFFERENTIATED_OBJECTIVES or config.task_reward_weight > 0


def introduce_staleness(config: TrainConfig, shaping: Shaping) -> list[str]:
    """What is off-policy about the run, and what is done about it; nothing for a run that is on-policy."""
    if config.max_staleness == 0:
        return []
    weighed = (
        f"objective {config.objective} has no sampled terms to weigh"
        if shaping.importance_cap is None
        else f"sampled terms are weighed by min({shaping.importance_cap:g}, pi_now / pi_then), see "
        "importance_truncated_fraction"
    )
    return [
        f"max_staleness 1: rollouts are sampled one update before they are learned from; {weighed}; "
        "which states they visit stays the older student's choice"
    ]


def check_answers(config: TrainConfig, rows: Sequence[PromptRow]) -> None:
    """A task reward compares every completion with an answer. Raises: ConfigError naming the rows without one."""
    if config.task_reward_weight == 0 or gives_rewards(config):
        return
    without = [row.source for row in rows if row.answer is None]
    if without:
        raise ConfigError(
            f"task_reward_weight {config.task_reward_weight:g} needs an answer in every row of {config.prompts}; "
            f"{len(without)} of {len(rows)} have none, first {without[0]}"
        )


def make_sampler(config: TrainConfig, student: LoadedStudent, *, seed: int) -> RolloutSampler:
    """Rollouts of the student as the run samples them."""
    return RolloutSampler(
        student.module.model,
        num_shared_ids=student.module.num_shared_ids,
        end_ids=student.end_ids,
        pad_id=student.pad_id,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        support_mass=config.support_mass,
        seed=seed,
        batch_size=config.rollout_batch_size,
        mixed_precision=config.mixed_precision,
    )
