"""The evaluations of a run: when they are due, the student's and the teachers', and that none is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vopd_client.batch import Batch, collate
from vopd_client.evaluation import Evaluation, evaluate_student, evaluate_teachers
from vopd_client.held_out_kl import KlMeasurement
from vopd_client.preparation import Run, make_sampler
from vopd_client.run_directory import read_rows
from vopd_client.sampled_evaluation import Sampling
from vopd_client.schedule import evaluation_samples_seed, evaluation_seed, is_due
from vopd_client.scoring import Request, SentRollout, Waiter
from vopd_client.teaching import measures_teacher
from vopd_client.train_config import TrainConfig
from vopd_client.types import SequenceScores, Teacher
from vopd_proto.arrays import IntArray


@dataclass(frozen=True)
class EvaluationsDone:
    """Which evaluations a run's evals.jsonl holds already."""

    student_steps: frozenset[int]
    teacher: bool


def evaluations_done(rows: Sequence[dict[str, Any]]) -> EvaluationsDone:
    return EvaluationsDone(
        frozenset(row["step"] for row in rows if row["who"] == "student"),
        any(row["who"] == "teacher" for row in rows),
    )


def evaluation_due(run: Run, step: int) -> bool:
    """Whether the student is to be evaluated after `step`: before the first one, now and then, after the last."""
    if not run.eval_prompts:
        return False
    return step == 0 or is_due(step, every=run.config.eval_every, total_steps=run.config.steps)


def evaluate(run: Run, step: int, waiter: Waiter) -> Iterator[Evaluation]:
    """The evaluations after `step` that are not on disk yet; the teachers' own comes with the first of them.

    Args: waiter: waits for teachers' answers.

    Raises: TeacherError, NonFiniteError.
    """
    done = evaluations_done(read_rows(run.directory.evals_file))
    drafts: Sequence[IntArray] = ()
    if step not in done.student_steps:
        evaluation = _evaluate_student(run, step, waiter.scores)
        drafts = evaluation.completion_ids
        yield evaluation
    if not done.teacher and (measured := _measured_teachers(run)):
        yield evaluate_teachers(
            measured,
            run.student.tokenizer,
            run.eval_prompts,
            step=step,
            max_new_tokens=_max_new_tokens(run),
            sample_count=run.config.sample_count,
            student_completions=drafts,
            receive=waiter.answer,
        )


def _measured_teachers(run: Run) -> dict[str, Teacher]:
    """Those whose own exact match is measured: they can say what they would write, and some prompt is theirs."""
    asked = {prompt.teacher for prompt in run.eval_prompts}
    return {
        name: plan.teacher
        for name, plan in run.plans.items()
        if name in asked and measures_teacher(run.config, plan.teacher.info)
    }


def _evaluate_student(run: Run, step: int, receive: Callable[[SentRollout], SequenceScores]) -> Evaluation:
    run.student.module.eval()
    return evaluate_student(
        run.student.module,
        run.student.tokenizer,
        run.eval_prompts,
        step=step,
        end_ids=run.student.end_ids,
        pad_id=run.student.pad_id,
        max_new_tokens=_max_new_tokens(run),
        batch_size=run.config.rollout_batch_size,
        sample_count=run.config.sample_count,
        mixed_precision=run.config.mixed_precision,
        kl=_kl_measurement(run, receive),
        sampling=_sampling(run.config),
    )


def _sampling(config: TrainConfig) -> Sampling | None:
    """How completions to be judged are drawn; None: they are greedy."""
    if config.eval_samples_per_prompt == 1:
        return None
    return Sampling(
        samples_per_prompt=config.eval_samples_per_prompt,
        temperature=config.eval_temperature,
        top_p=config.eval_top_p,
        top_k=config.eval_top_k,
        seed=evaluation_samples_seed(config.seed),
    )


def _kl_measurement(run: Run, receive: Callable[[SentRollout], SequenceScores]) -> KlMeasurement | None:
    """None without any support: there is nothing to take a closed form of."""
    plans = {name: plan for name, plan in run.plans.items() if plan.evaluation_request.support != "none"}
    if not plans:
        return None
    return KlMeasurement(
        plans=plans,
        sampler=make_sampler(run.config, run.student, seed=evaluation_seed(run.config.seed)),
        make_batch=partial(make_batch, run),
        microbatch_tokens=run.config.microbatch_tokens,
        receive=receive,
    )


def make_batch(
    run: Run,
    request: Request,
    sent: Sequence[SentRollout],
    scores: Sequence[SequenceScores],
    task_advantages: Sequence[float] | None = None,
) -> Batch:
    """Rollouts and one teacher's answers to `request`, as tensors."""
    return collate(
        [item.rollout for item in sent],
        [request.swap.from_teacher(score) for score in scores],
        prompt_names=[item.prompt.source for item in sent],
        pad_id=run.student.pad_id,
        num_shared_ids=run.student.module.num_shared_ids,
        support=request.support,
        max_support=run.config.top_k,
        drop_end_ids=request.drop_end_ids,
        task_advantages=task_advantages,
    )


def _max_new_tokens(run: Run) -> int:
    return run.config.eval_max_new_tokens or run.config.max_new_tokens
