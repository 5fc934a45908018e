"""This process's rollouts: sampled or taken from a checkpoint, sent to their teachers, and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vopd_client.evaluation import judge
from vopd_client.preparation import Run
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.schedule import draws_of_process
from vopd_client.scoring import SentRollout, send
from vopd_client.task_rewards import leave_one_out_advantages


@dataclass(frozen=True, slots=True)
class RolloutSource:
    """check: raises at a safe point when someone asked for the end."""

    run: Run
    check: Callable[[], None]

    def sample(self, step: int) -> list[SentRollout]:
        """In the order of their draws, each on its way to the teacher since it was finished.

        Raises: Interrupted, and NonFiniteError when the student's logits are not finite.
        """
        draws = self.draws(step)
        sent: dict[RolloutKey, SentRollout] = {}
        for rollout in self.run.sampler.sample(
            [(key, self.run.prompts[key.prompt_index].student_ids) for key in draws]
        ):
            sent[rollout.key] = self._send(rollout)
            self.check()
        return [sent[key] for key in draws]

    def draws(self, step: int) -> list[RolloutKey]:
        accelerator = self.run.accelerator
        return draws_of_process(
            self.run.config,
            step,
            num_prompts=len(self.run.prompts),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def prompt_names(self, step: int) -> list[str]:
        """file:line of each prompt of this process, once, for error messages."""
        return sorted({self.run.prompts[key.prompt_index].source for key in self.draws(step)})

    def send_again(self, rollouts: Sequence[Rollout]) -> list[SentRollout]:
        """What an earlier process sampled and had scored, as far as it got."""
        return [self._send(rollout) for rollout in rollouts]

    def task_rewards(self, sent: Sequence[SentRollout]) -> list[float] | None:
        """1 for a completion that its row's verifier accepts, else 0; None when they have no part in the loss."""
        if self.run.config.task_reward_weight == 0:
            return None
        student = self.run.student
        samples = judge(
            [item.prompt for item in sent],
            [item.rollout.completion_ids for item in sent],
            student.tokenizer,
            student.end_ids,
        )
        return [float(bool(sample.correct)) for sample in samples]

    def task_advantages(self, sent: Sequence[SentRollout], task_rewards: Sequence[float] | None) -> list[float]:
        """What each completion's task reward adds to the advantage of all its tokens."""
        if task_rewards is None:
            return [0.0] * len(sent)
        advantages = leave_one_out_advantages(task_rewards, [item.rollout.key.prompt_index for item in sent])
        return [float(self.run.config.task_reward_weight * advantage) for advantage in advantages]

    def _send(self, rollout: Rollout) -> SentRollout:
        prompt = self.run.prompts[rollout.key.prompt_index]
        plan = self.run.plans[prompt.teacher]
        return send(rollout, prompt, request=plan.request, teacher=plan.teacher)
