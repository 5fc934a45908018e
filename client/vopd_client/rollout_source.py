"""This process's rollouts: sampled or taken from a checkpoint, sent to their teachers, and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vopd_client.added_turns import AddedTurns
from vopd_client.chat_templates import chat_options
from vopd_client.cut_completions import is_masked
from vopd_client.environment import DEFAULT_MAX_TURNS, environment_of, gives_rewards
from vopd_client.judging import completion_text, reward
from vopd_client.preparation import Run
from vopd_client.rollouts.base import Rollout, RolloutKey, Sampler, last_turn_ids
from vopd_client.rollouts.multi_turn import MultiTurnSampler
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
        for rollout in sampler_of_run(self.run, self.check).sample(
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
            positions=self.run.prompts.of_step(step),
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
        """What each completion is worth: what its environment gave, else see `judging.reward` of its last turn.

        None when that has no part in the loss and no environment gives it.
        """
        if self.run.config.task_reward_weight == 0 and not gives_rewards(self.run.config):
            return None
        tokenizer, end_ids = self.run.student.tokenizer, self.run.student.end_ids
        return [
            reward(item.prompt, completion_text(tokenizer, last_turn_ids(item.rollout), end_ids))
            if item.rollout.task_reward is None
            else item.rollout.task_reward
            for item in sent
        ]

    def task_advantages(self, sent: Sequence[SentRollout], task_rewards: Sequence[float] | None) -> list[float]:
        """What each completion's task reward adds to the advantage of all its tokens."""
        if task_rewards is None:
            return [0.0] * len(sent)
        advantages = leave_one_out_advantages(task_rewards, [item.rollout.key.prompt_index for item in sent])
        return [float(self.run.config.task_reward_weight * advantage) for advantage in advantages]

    def _send(self, rollout: Rollout) -> SentRollout:
        prompt = self.run.prompts[rollout.key.prompt_index]
        if is_masked(rollout, self.run.config.cut_completions):
            return SentRollout(rollout, prompt, answer=None)
        plan = self.run.plans[prompt.teacher]
        return send(rollout, prompt, request=plan.request, teacher=plan.teacher)


def sampler_of_run(run: Run, check: Callable[[], None]) -> Sampler:
    """The run's own, or with an environment one of whole trajectories. check: called while replies are waited for."""
    config, environment = run.config, environment_of(run.config)
    if environment is None:
        return run.sampler
    added_turns = AddedTurns.of(
        run.student.tokenizer,
        chat_options(config, environment.tools),
        {name: (plan.teacher.info, plan.request.swap) for name, plan in run.plans.items()},
    )
    return MultiTurnSampler(
        run.sampler,
        prompts=run.prompts,
        environment=environment,
        added_ids=added_turns.ids,
        tokenizer=run.student.tokenizer,
        max_new_tokens=config.max_new_tokens,
        max_turns=config.max_turns or DEFAULT_MAX_TURNS,
        timeout_s=config.environment_timeout_s,
        in_rounds=config.deterministic,
        check=check,
    )
