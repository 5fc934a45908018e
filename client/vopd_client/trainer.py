"""On-policy distillation: sample -> score -> step -> log.

The student writes completions, a teacher says how likely it finds them, the objective turns that into gradients.
Teacher requests leave as rollouts finish and their answers are awaited just before their microbatch is needed; with
max_staleness 1 they have the whole of the step before for their way, see `pipeline`.
Backward runs on sums; gradients are divided once by the number of valid tokens of the whole step. A step is either
complete, logged and counted, or it did not happen.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vopd_client.batch import Batch
from vopd_client.checkpoint import TrainerState, save_checkpoint
from vopd_client.cut_completions import idle_loss, skip_update
from vopd_client.errors import (
    NonFiniteError,
    OutOfMemory,
    VopdError,
)
from vopd_client.interruption import Interrupted, StopRequest
from vopd_client.lockstep import Lockstep
from vopd_client.losses import compute_loss
from vopd_client.optimization import adam_moment_variance, check_finite, scale_and_clip
from vopd_client.periodic_evaluation import evaluate, evaluation_due, make_batch
from vopd_client.pipeline import InFlight, Pipeline
from vopd_client.preparation import Run
from vopd_client.processes import Problem, agree
from vopd_client.rollout_files import write_rollouts
from vopd_client.rollout_source import RolloutSource
from vopd_client.rollouts.base import Rollout
from vopd_client.schedule import dropout_seed, is_due
from vopd_client.scoring import SentRollout, Traffic, Waiter
from vopd_client.sharding import is_sharded, whole_weights
from vopd_client.step_metrics import StepSums, StepTimes, metrics_row
from vopd_client.student import StudentOutputs
from vopd_client.teaching_plan import TeachingPlan, plan_teachers_microbatches
from vopd_client.timeline import Timeline
from vopd_client.tracking import RunLog, append_row


@dataclass(frozen=True)
class StepNotes:
    """What is written down while one step runs, and who waits for its answers."""

    step: int
    waiter: Waiter
    sums: StepSums = field(default_factory=StepSums)
    timeline: Timeline = field(default_factory=Timeline)


class Microbatch(NamedTuple):
    """Rollouts of one teacher that are learned from in one forward and backward."""

    items: list[SentRollout]
    plan: TeachingPlan
    batch: Batch


class Trainer:
    """The loop. `state` counts complete steps only."""

    def __init__(self, run: Run, log: RunLog, stop: StopRequest) -> None:
        self.run = run
        self.state: TrainerState = run.state
        self._saved_step = run.state.step
        self._log = log
        self._stop = stop
        self._module = run.student.module
        self._lockstep = Lockstep(is_sharded(self._module))
        self._left_the_others = False
        self._traffic = {name: Traffic(plan.teacher) for name, plan in run.plans.items()}
        self._rollouts = RolloutSource(run, stop.check)
        if run.vllm is not None:
            run.vllm.sampler.while_waiting = stop.check
        self._pipeline = Pipeline[list[SentRollout]](
            max_staleness=run.config.max_staleness,
            total_steps=run.config.steps,
            in_flight=[sampled.map(self._rollouts.send_again) for sampled in run.in_flight],
        )

    @property
    def how_to_go_on(self) -> str:
        return f"to go on: the same command with --resume --name {self.run.directory.path.name}"

    def train(self) -> None:
        """All steps that are left, with evaluations and checkpoints in between.

        Raises: Interrupted and TeacherError, with `state` and weights as of the last complete step; NonFiniteError
            before the optimizer saw what is not finite.
        """
        config = self.run.config
        for step in range(self.state.step + 1, config.steps + 1):
            self.evaluate_if_due(step - 1)
            self.train_step(step)
            if is_due(step, every=config.checkpoint_every, total_steps=config.steps):
                self.save_if_newer()
        self.evaluate_if_due(config.steps)

    def train_step(self, step: int) -> None:
        """One optimizer step, on rollouts that are at most max_staleness updates old."""
        run, notes = self.run, StepNotes(step, self._waiter(step))
        sums, timeline, waiter = notes.sums, notes.timeline, notes.waiter
        last_loss_sum: Tensor | None = None
        problem: Problem | None = None
        steps_to_sample = self._pipeline.steps_to_sample(step)
        if steps_to_sample and run.vllm is not None:
            with timeline.span("sampling"):
                run.vllm.refresh(self.state.step)
        samples_itself = bool(steps_to_sample) and run.vllm is None
        try:
            with whole_weights(self._module) if samples_itself else nullcontext(), self._lockstep.alone():
                for sampled_step in steps_to_sample:
                    with timeline.span("sampling"):
                        self._pipeline.add(InFlight(sampled_step, self.state.step, self._sample(sampled_step)))
                learning = self._pipeline.of_step(step)
                sent = learning.rollouts
                task_rewards = self._rollouts.task_rewards(sent)
                sums.add_rollouts([item.rollout for item in sent], task_rewards, staleness=learning.staleness)
                if run.config.cut_completions == "mask":
                    sums.add_masked(sum(item.is_masked for item in sent))
                task_advantages = self._rollouts.task_advantages(sent, task_rewards)
            last_loss_sum = self._accumulate(notes, sent, task_advantages)
        except (Interrupted, VopdError) as error:
            problem = error
        except torch.OutOfMemoryError as error:
            problem = out_of_memory(step, error)
            if self._lockstep.sharded:  # the others wait in an exchange that this process has left
                self._left_the_others = True
                raise problem from error
        sums.add_traffic({name: traffic.since_last_look() for name, traffic in self._traffic.items()})

        # From here on all processes do the same: they stop together, or exchange gradients and step together.
        totals = agree(problem, sums.values)
        assert last_loss_sum is not None
        with timeline.span("backward"):
            run.accelerator.backward(last_loss_sum)
        with timeline.span("optimizer"):
            grad_norm, learning_rate = self._update_weights(step, totals["num_valid_tokens"])
        self._pipeline.complete(step)

        rollout_s, step_s = timeline.seconds("sampling"), timeline.elapsed_s
        update_s = step_s - rollout_s - waiter.waited_s
        times = StepTimes(rollout_s, update_s, waiter.waited_s, step_s, waiter.waited_s_by_teacher)
        flights = [item.flight for item in sent if not item.is_masked]
        timeline_row = timeline.to_row(step, sampled_steps=steps_to_sample, flights=flights)
        self.state = TrainerState(
            step=step,
            train_seconds=self.state.train_seconds + step_s,
            teacher_wait_seconds=self.state.teacher_wait_seconds + waiter.waited_s,
            teacher_bytes=self.state.teacher_bytes + int(totals["teacher_bytes"]),
            num_valid_tokens=self.state.num_valid_tokens + int(totals["num_valid_tokens"]),
        )
        self._log.step(
            metrics_row(
                step,
                totals,
                times,
                grad_norm=grad_norm,
                adam_variance=adam_moment_variance(run.optimizer),
                learning_rate=learning_rate,
            )
        )
        if run.accelerator.is_main_process:
            append_row(run.directory.timeline_file, timeline_row)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluates and writes it down, on the main process; the others learn whether it worked."""
        if not evaluation_due(self.run, step):
            return
        problem: Problem | None = None
        with whole_weights(self._module):
            if self.run.accelerator.is_main_process:
                problem = self._evaluate(step)
            agree(problem, {})

    def _evaluate(self, step: int) -> Problem | None:
        """Evaluates and writes it down; what it ran into."""
        self._log.doing("evaluation", step=step)
        evaluations = evaluate(self.run, step, self._waiter(step))
        problem: Problem | None = None
        try:
            while True:
                with self._stop.at_once():
                    evaluation = next(evaluations, None)
                if evaluation is None:
                    break
                self._log.evaluation(evaluation.to_row())
        except (Interrupted, VopdError) as error:
            problem = error
        except torch.OutOfMemoryError as error:
            problem = out_of_memory(step, error)
        for traffic in self._traffic.values():
            traffic.since_last_look()  # an evaluation's bytes are no step's
        return problem

    def save_if_newer(self) -> None:
        """A checkpoint of the last complete step, with what is in flight, unless there is one."""
        if self.state.step == self._saved_step or self._left_the_others:
            return
        in_flight = [
            sampled.map(lambda sent: [item.rollout for item in sent])
            for sampled in self._pipeline.worth_saving(self.state.step)
        ]
        save_checkpoint(
            self.run.directory.checkpoints,
            self.state,
            self.run.identity,
            writer=self.run.storage,
            keep=self.run.config.keep_checkpoints,
            write_own_files=partial(self._write_own_files, in_flight=in_flight),
        )
        self._saved_step = self.state.step

    def _write_own_files(self, checkpoint: Path, in_flight: list[InFlight[list[Rollout]]]) -> None:
        write_rollouts(checkpoint, in_flight, process_index=self.run.accelerator.process_index)
        if self.run.accelerator.is_main_process:
            self.run.prompts.write_state(checkpoint, self.state.step)

    def _waiter(self, step: int) -> Waiter:
        teachers = {name: plan.teacher for name, plan in self.run.plans.items()}
        return Waiter(self._stop, teachers, partial(self._log.waiting, step=step))

    def _sample(self, step: int) -> list[SentRollout]:
        """This process's rollouts of a step in the order of their draws, each on its way to its teacher."""
        self._stop.check()
        self._log.doing("sampling", step=step)
        try:
            return self._rollouts.sample(step)
        except NonFiniteError as error:
            raise stopped_before_update(step, self._rollouts.prompt_names(step), error) from error
        except torch.OutOfMemoryError as error:
            raise out_of_memory(step, error) from error

    def _accumulate(self, notes: StepNotes, sent: list[SentRollout], task_advantages: list[float]) -> Tensor:
        """Adds up gradients of all microbatches but the last, whose summed loss it returns.

        The plan depends on lengths and teachers alone, never on the order in which answers arrive.
        """
        run, timeline = self.run, notes.timeline
        self._log.doing("update", step=notes.step)
        self._module.train()
        torch.manual_seed(dropout_seed(run.config.seed, notes.step, run.accelerator.process_index))
        run.optimizer.zero_grad()
        plan = plan_teachers_microbatches(sent, run.config.microbatch_tokens)
        *earlier, last = self._lockstep.rounds(plan)  # an empty one: the others go on, or all completions are masked
        for indices in earlier:
            with self._lockstep.alone():
                microbatch = self._microbatch(indices, sent, task_advantages, notes)
            with run.accelerator.no_sync(run.model):
                with timeline.span("forward"), self._lockstep.alone():
                    loss_sum = self._loss_sum(microbatch, sent, notes)
                with timeline.span("backward"):
                    run.accelerator.backward(loss_sum)
        with self._lockstep.alone():
            microbatch = self._microbatch(last, sent, task_advantages, notes)
        with timeline.span("forward"):
            return self._loss_sum(microbatch, sent, notes)

    def _microbatch(
        self, indices: list[int], sent: list[SentRollout], task_advantages: list[float], notes: StepNotes
    ) -> Microbatch | None:
        """Rollouts of one teacher, once their answers are there; None for no rollouts."""
        self._stop.check()
        if not indices:
            return None
        run, items = self.run, [sent[index] for index in indices]
        with notes.timeline.span("waiting"):
            scores = [notes.waiter.scores(item) for item in items]
        plan = run.plans[items[0].prompt.teacher]
        batch = make_batch(run, plan.request, items, scores, [task_advantages[index] for index in indices])
        return Microbatch(items, plan, batch.to(run.accelerator.device))

    def _loss_sum(self, microbatch: Microbatch | None, sent: list[SentRollout], notes: StepNotes) -> Tensor:
        """The loss of one microbatch, all of one teacher's, summed over its tokens; 0 of an empty one."""
        run, config = self.run, self.run.config
        if microbatch is None:
            return idle_loss(run.model, sent[0].rollout, run.accelerator.device)
        items, plan, batch = microbatch
        plan.fit(self._module)
        student: StudentOutputs = run.model(**batch.student_inputs, want_kl_gradient=config.objective == "full-kl")
        try:
            loss = compute_loss(
                config.objective,
                student,
                batch,
                tail=config.tail,
                baseline=config.baseline,
                shaping=run.shaping,
            )
            check_finite(float(loss.loss_sum.detach()), "loss")
        except NonFiniteError as error:
            raise stopped_before_update(notes.step, [item.prompt.source for item in items], error) from error
        notes.sums.add_microbatch(loss, student, batch, teacher=plan.name)
        return loss.loss_sum

    def _update_weights(self, step: int, num_valid_tokens: float) -> tuple[float, float]:
        """The optimizer step; returns the gradient's norm before clipping and the learning rate."""
        run = self.run
        learning_rate = float(run.optimizer.param_groups[0]["lr"])
        if num_valid_tokens == 0:
            skip_update(run.scheduler)
            return 0.0, learning_rate
        try:
            grad_norm = scale_and_clip(
                run.accelerator,
                run.model,
                num_valid_tokens=num_valid_tokens,
                max_grad_norm=run.config.max_grad_norm,
            )
        except NonFiniteError as error:
            raise stopped_before_update(step, self._rollouts.prompt_names(step), error) from error
        run.optimizer.step()
        run.scheduler.step()
        return grad_norm, learning_rate


def out_of_memory(step: int, error: torch.OutOfMemoryError) -> OutOfMemory:
    """Names the settings that help."""
    return OutOfMemory(f"step {step}: {error}; lower microbatch_tokens or rollout_batch_size")


def stopped_before_update(step: int, prompt_names: list[str], error: NonFiniteError) -> NonFiniteError:
    """The same error with what is needed to look into it."""
    names = ", ".join(dict.fromkeys(prompt_names))
    return NonFiniteError(f"step {step} stopped before the weights were updated: {error} (prompts: {names})")
