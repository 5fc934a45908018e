"""Everything a run needs, loaded and checked against each other, before its first step.

In this order, so that a mistake costs as little waiting as can be: directory and prompts (by the trainer), then the
teacher, then the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vopd_client.baselines import choose_baseline
from vopd_client.checkpoint import RunIdentity, TrainerState
from vopd_client.config import TrainConfig
from vopd_client.errors import ConfigError
from vopd_client.handshake import num_shared_ids
from vopd_client.optimization import make_optimizer, make_scheduler
from vopd_client.pipeline import InFlight
from vopd_client.processes import wrap
from vopd_client.prompts import Prompt, PromptRow, RowFormat, load_prompts
from vopd_client.resumption import check_room, go_back_to_checkpoint, hash_prompts, rollouts_in_flight
from vopd_client.rollouts.base import Rollout
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.run_directory import RunDirectory, settings_hash
from vopd_client.scoring import Request
from vopd_client.shaping import DIFFERENTIATED_OBJECTIVES, Shaping, check_shaping, reward_floor
from vopd_client.student import LoadedStudent, load_student
from vopd_client.teacher import RemoteTeacher
from vopd_client.teacher_head import TeacherHead
from vopd_client.teaching import (
    ConnectedTeacher,
    Tell,
    bias_warnings,
    compare_tokenizers,
    introduce,
    longest_completion,
    measures_teacher,
    needs_vocabulary,
    plan_requests,
    render,
)
from vopd_proto.fingerprint import token_table

STALE_IMPORTANCE_CAP = 2.0  # one update moves few tokens' probabilities by more; the metrics say how many
MIN_WINDOW, MAX_WINDOW = 64, 4000  # sequences in flight, where no setting says it


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
    teacher: ConnectedTeacher
    student: LoadedStudent
    model: nn.Module  # the student's module as accelerate wrapped it
    optimizer: Any
    scheduler: Any
    sampler: RolloutSampler
    request: Request
    evaluation_request: Request  # with a support or hidden states whatever the objective, to measure the KL with
    shaping: Shaping
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    identity: RunIdentity
    state: TrainerState
    in_flight: list[InFlight[list[Rollout]]]  # of this process: what the checkpoint holds of steps to come


def load_rows(config: TrainConfig) -> PromptRows:
    """Raises: DataError with file and line."""
    row_format = RowFormat(config.prompt_column, config.answer_column, config.prompt_suffix)

    def load(spec: str) -> list[PromptRow]:
        return load_prompts(spec, default_verifier=config.verifier, row_format=row_format)

    return PromptRows(load(config.prompts), load(config.eval_prompts) if config.eval_prompts else [])


def connect_teacher(config: TrainConfig, device: str | None) -> ConnectedTeacher:
    """The teacher behind the addresses, or the one that is loaded into this process, on `device` (None: the best)."""
    if config.teacher_model is not None:
        from vopd_client.local_teacher import LocalTeacher  # brings the engine, which a remote teacher does not need

        return LocalTeacher.load(
            config.teacher_model,
            device=device,
            deterministic=config.deterministic,
            temperature=config.temperature,
            allow_full_vocab=bool(needs_vocabulary(config)),
        )
    return RemoteTeacher.connect(
        config.teacher_url,
        api_key_file=config.api_key_file,
        plaintext=config.plaintext,
        tls_ca_file=config.tls_ca_file,
        timeout_s=config.teacher_timeout_s,
        window=config.teacher_window or default_window(config),
        float_type=config.score_float_type,
        temperature=config.temperature,
    )


def default_window(config: TrainConfig) -> int:
    """Room for everything that one process has in flight, so that no request waits for another's answer."""
    in_flight = config.prompts_per_step * config.rollouts_per_prompt * (1 + config.max_staleness)
    return min(max(in_flight, MIN_WINDOW), MAX_WINDOW)


def prepare_run(
    config: TrainConfig,
    accelerator: Accelerator,
    directory: RunDirectory,
    rows: PromptRows,
    teacher: ConnectedTeacher,
    tell: Tell,
) -> Run:
    """Loads the student, checks that teacher, student and prompts go together, and goes back to a checkpoint.

    Raises: ConfigError, DataError, HandshakeError, RunDirectoryError, CheckpointError.
    """
    shaping = check_objective(config)
    check_answers(config, rows.train)
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
    compare_tokenizers(student, teacher)
    prompts = render(rows.train, config, student, teacher, max_new_tokens=config.max_new_tokens)
    eval_prompts = render(rows.held_out, config, student, teacher, max_new_tokens=longest_completion(config))
    request, evaluation_request = plan_requests(config, student, teacher, [*prompts, *eval_prompts], tell)

    module = student.module
    fit_to_teacher(
        student,
        teacher,
        config,
        request,
        needs_head="vocabulary" in (request.support, evaluation_request.support),
        tell=tell,
    )
    if shaping.importance_cap is not None and module.dropped_ids:
        setting = "importance_cap" if config.importance_cap is not None else "max_staleness 1"
        raise ConfigError(
            f"{setting} does not go with end_token drop: completions were sampled with the end token, and the "
            "probabilities that the loss sees, and importance weights compare with, are those without it"
        )
    module.reward_floor = shaping.reward_floor
    check_room(config, directory, module)
    introduction = introduce(config, student, teacher, prompts, eval_prompts, request)
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
        teacher_model_id=teacher.info.model_id,
        teacher_model_revision=teacher.info.model_revision,
    )
    state = go_back_to_checkpoint(config, accelerator, directory, identity, tell)
    in_flight = rollouts_in_flight(config, accelerator, directory.checkpoints, state, prompts, tell)
    return Run(
        config=config,
        accelerator=accelerator,
        directory=directory,
        teacher=teacher,
        student=student,
        model=wrapped.model,
        optimizer=wrapped.optimizer,
        scheduler=wrapped.scheduler,
        sampler=make_sampler(config, student, seed=config.seed),
        request=request,
        evaluation_request=evaluation_request,
        shaping=shaping,
        prompts=prompts,
        eval_prompts=eval_prompts,
        identity=identity,
        state=state,
        in_flight=in_flight,
    )


def fit_to_teacher(
    student: LoadedStudent,
    teacher: ConnectedTeacher,
    config: TrainConfig,
    request: Request,
    *,
    needs_head: bool,
    tell: Tell,
) -> None:
    """From here on the student's module gives probabilities of what the teacher scores: of the ids that both have.

    needs_head: something is going to compare the two over the whole vocabulary.

    Raises: HandshakeError for a head that is none, and what fetching it raises.
    """
    module = student.module
    module.temperature = config.temperature
    module.num_shared_ids = num_shared_ids(
        student_vocab_size=student.vocab_size,
        teacher_vocab_size=teacher.info.vocab_size,
        num_ids=len(token_table(student.tokenizer)),
    )
    module.dropped_ids = tuple(sorted(request.drop_end_ids))
    if needs_head:
        tell("fetching the teacher's output head, unless it is in the cache")
        module.teacher_head = TeacherHead.load(
            teacher.head_file(config.head_cache),
            temperature=config.temperature,
            device=next(module.parameters()).device,
            vocab_size=teacher.info.vocab_size,
        ).with_exchanged_ids(request.swap.pair)


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
