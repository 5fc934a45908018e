"""Everything a run needs, loaded and checked against each other, before its first step.

In this order, so that a mistake costs as little waiting as can be: directory and prompts (by the trainer), then the
teachers, then the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vopd_client.baselines import choose_baseline
from vopd_client.checkpoint import RunIdentity, TrainerState
from vopd_client.config import TrainConfig
from vopd_client.errors import ConfigError
from vopd_client.optimization import make_optimizer, make_scheduler
from vopd_client.pipeline import InFlight
from vopd_client.processes import wrap
from vopd_client.prompts import Prompt, PromptRow, RowFormat, choose_teachers, load_prompts
from vopd_client.resumption import check_room, go_back_to_checkpoint, hash_prompts, rollouts_in_flight
from vopd_client.rollouts.base import Rollout
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.run_directory import RunDirectory, settings_hash
from vopd_client.scoring import about_teacher
from vopd_client.shaping import DIFFERENTIATED_OBJECTIVES, Shaping, check_shaping, reward_floor
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

STALE_IMPORTANCE_CAP = 2.0  # one update moves few tokens' probabilities by more; the metrics say how many


@dataclass(frozen=True)
class PromptRows:
    """The rows of both files, checked but not rendered yet."""

    train: list[PromptRow]
    held_out: list[PromptRow]


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
    sampler: RolloutSampler
    shaping: Shaping
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    identity: RunIdentity
    state: TrainerState
    in_flight: list[InFlight[list[Rollout]]]  # of this process: what the checkpoint holds of steps to come


def load_rows(config: TrainConfig) -> PromptRows:
    """Raises: DataError with file and line, also for a row whose teacher there is not; ConfigError for a teacher that
    no row names."""
    row_format = RowFormat(config.prompt_column, config.answer_column, config.prompt_suffix)
    names = sorted(config.teacher)

    def load(spec: str) -> list[PromptRow]:
        rows = load_prompts(spec, default_verifier=config.verifier, row_format=row_format)
        return choose_teachers(rows, names)

    rows = PromptRows(load(config.prompts), load(config.eval_prompts) if config.eval_prompts else [])
    idle = set(names) - {row.teacher for row in (*rows.train, *rows.held_out)}
    if idle:
        raise ConfigError(f"no row names teacher {', '.join(sorted(idle))}: leave out what has nothing to teach")
    return rows


def prepare_run(
    config: TrainConfig,
    accelerator: Accelerator,
    directory: RunDirectory,
    rows: PromptRows,
    teachers: Teachers,
    tell: Tell,
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
    if shaping.importance_cap is not None and any(plan.request.drop_end_ids for plan in plans.values()):
        setting = "importance_cap" if config.importance_cap is not None else "max_staleness 1"
        raise ConfigError(
            f"{setting} does not go with end_token drop: completions were sampled with the end token, and the "
            "probabilities that the loss sees, and importance weights compare with, are those without it"
        )
    module.reward_floor = shaping.reward_floor
    check_room(config, directory, module)
    introduction = introduce(config, student, plans, prompts, eval_prompts)
    for line in (*introduction, *introduce_staleness(config, shaping), *bias_warnings(config)):
        tell(line)

    optimizer = make_optimizer(module, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = make_scheduler(
        optimizer, schedule=config.schedule, warmup_steps=config.warmup_steps, total_steps=config.steps
    )
    wrapped = wrap(accelerator, module, optimizer, scheduler)
    identity = RunIdentity(
        config_hash=settings_hash(config.model_dump(mode="json")),
        prompts_hash=hash_prompts(prompts),
        teacher_model_id=of_each_teacher({name: teacher.info.model_id for name, teacher in teachers.items()}),
        teacher_model_revision=of_each_teacher(
            {name: teacher.info.model_revision for name, teacher in teachers.items()}
        ),
    )
    state = go_back_to_checkpoint(config, accelerator, directory, identity, tell)
    in_flight = rollouts_in_flight(config, accelerator, directory.checkpoints, state, prompts, tell)
    return Run(
        config=config,
        accelerator=accelerator,
        directory=directory,
        plans=plans,
        student=student,
        model=wrapped.model,
        optimizer=wrapped.optimizer,
        scheduler=wrapped.scheduler,
        sampler=make_sampler(config, student, seed=config.seed),
        shaping=shaping,
        prompts=prompts,
        eval_prompts=eval_prompts,
        identity=identity,
        state=state,
        in_flight=in_flight,
    )


def of_each_teacher(values: Mapping[str, str]) -> str:
    """What a checkpoint remembers of its teachers: `code=a, math=b`; of one without a name the value alone."""
    return ", ".join(f"{name}={value}" if name else value for name, value in sorted(values.items()))


def check_objective(config: TrainConfig) -> Shaping:
    """What is done to rewards and advantages. Raises: ConfigError for settings that do not go together."""
    choose_baseline(config.objective, config.baseline)
    importance_cap = config.importance_cap
    if importance_cap is None and config.max_staleness > 0 and has_sampled_term(config):
        importance_cap = STALE_IMPORTANCE_CAP
    shaping = Shaping(reward_floor(config.reward_clip_lambda), config.advantage_clip, importance_cap)
    check_shaping(config.objective, shaping, has_task_reward=config.task_reward_weight > 0)
    return shaping


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
    if config.task_reward_weight == 0:
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
