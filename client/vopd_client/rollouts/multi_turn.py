"""Trajectories of several turns: the student samples, an environment replies, the student goes on.

Wraps any sampler, and asks it for one turn at a time. A turn's tokens stay as they were sampled; what comes between two
turns is added as token ids that the student did not sample. Every turn is a new request for the grown prompt: vLLM
finds what it has read before in its prefix cache, the sampler of transformers reads it anew.

Axes: C prompt tokens, T tokens of the trajectory after the prompt, K support ids of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from vopd_client.environment import Conversation, LoadedEnvironment
from vopd_client.environment_threads import EnvironmentThreads
from vopd_client.prompt_rows import Message
from vopd_client.render import Prompt
from vopd_client.rollouts.base import Rollout, RolloutKey, RolloutRequest, Sampler, is_sampled
from vopd_proto.arrays import IntArray


class PromptOf(Protocol):
    """Prompts by the index that rollout keys call them by."""

    def __getitem__(self, position: int, /) -> Prompt: ...


AddedIds = Callable[[Prompt, Sequence[Message], int], IntArray]  # see `AddedTurns.ids`


def not_sampled(key: RolloutKey, ids: IntArray) -> Rollout:
    """Ids that stand between two turns, as a part of a trajectory: no support, no probability, no mass."""
    return Rollout(
        key=key,
        prompt_ids=np.empty(0, np.int64),
        completion_ids=ids,
        behaviour_logprobs_T=np.zeros(len(ids), np.float32),
        support_ids=np.empty(0, np.int64),
        support_counts_T=np.zeros(len(ids), np.int64),
        support_mass_T=np.zeros(len(ids), np.float32),
        ended=False,
        is_sampled_T=np.zeros(len(ids), np.bool_),
    )


def joined(
    key: RolloutKey, prompt_ids: IntArray, parts: Sequence[Rollout], *, ended: bool, reward: float | None = None
) -> Rollout:
    """One rollout of the student's turns and what stands between them, in order."""
    return Rollout(
        key=key,
        prompt_ids=prompt_ids,
        completion_ids=np.concatenate([part.completion_ids for part in parts]),
        behaviour_logprobs_T=np.concatenate([part.behaviour_logprobs_T for part in parts]),
        support_ids=np.concatenate([part.support_ids for part in parts]),
        support_counts_T=np.concatenate([part.support_counts_T for part in parts]),
        support_mass_T=np.concatenate([part.support_mass_T for part in parts]),
        ended=ended,
        is_sampled_T=np.concatenate([is_sampled(part) for part in parts]),
        task_reward=reward,
    )


@dataclass(slots=True, eq=False)
class _Trajectory:
    """One that grows. turns: messages after the prompt's; ended: so far."""

    key: RolloutKey
    prompt: Prompt
    prompt_ids: IntArray
    limit: int
    parts: list[Rollout] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    num_turns: int = 0
    ended: bool = False

    @property
    def room(self) -> int:
        return self.limit - sum(len(part.completion_ids) for part in self.parts)

    @property
    def request(self) -> RolloutRequest:
        seen_ids = np.concatenate([self.prompt_ids, *(part.completion_ids for part in self.parts)])
        return replace(self.key, turn=self.num_turns), seen_ids

    @property
    def conversation(self) -> Conversation:
        assert self.prompt.messages is not None, "an environment replies to chats"
        key = self.key
        return Conversation(
            messages=(*self.prompt.messages, *self.turns),
            turn=self.num_turns,
            source=self.prompt.source,
            answer=self.prompt.answer,
            kind=self.prompt.kind,
            trajectory=f"step {key.step}, prompt {key.prompt_index}, rollout {key.rollout_index}",
        )

    def rollout(self, reward: float | None) -> Rollout:
        return joined(self.key, self.prompt_ids, self.parts, ended=self.ended, reward=reward)


_Answer = tuple[Message, ...] | float  # to a call of reply or of reward


class MultiTurnSampler:
    """A `Sampler` of whole trajectories, from one of single turns.

    Args:
        sampler: of the turns.
        prompts: all of them chats.
        added_ids: what comes between two turns.
        max_new_tokens: of a trajectory, replies included. A reply that leaves no room for another token of the
            student's is not added, and ends the trajectory.
        max_turns: of the student; the last one is not replied to.
        timeout_s: of one call of the environment.
        in_rounds: the next turns wait for all replies, so that what is sampled side by side, and with it the last bits
            of the logits, depends on no clock; otherwise what is ready goes on.
        check: called while replies are waited for; raises when someone asks for the end.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        prompts: PromptOf,
        environment: LoadedEnvironment,
        added_ids: AddedIds,
        tokenizer: Any,
        max_new_tokens: int,
        max_turns: int,
        timeout_s: float,
        in_rounds: bool,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._sampler = sampler
        self._prompts = prompts
        self._environment = environment
        self._added_ids = added_ids
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._max_turns = max_turns
        self._timeout_s = timeout_s
        self._in_rounds = in_rounds
        self._check = check

    def sample(self, requests: Sequence[RolloutRequest], *, limits: Sequence[int] | None = None) -> Iterator[Rollout]:
        """Yields one trajectory a request, each as soon as it is over. The draws of a turn are keyed by its number.

        Raises: EnvironmentReplyError for what goes wrong with the environment; what the sampler and `check` raise.
        """
        limits = [self._max_new_tokens] * len(requests) if limits is None else limits
        ready = [
            _Trajectory(key, self._prompts[key.prompt_index], prompt_ids, limit)
            for (key, prompt_ids), limit in zip(requests, limits, strict=True)
        ]
        with EnvironmentThreads[_Trajectory, _Answer](timeout_s=self._timeout_s) as threads:
            while ready or threads.num_open:
                yield from self._sample_turns(ready, threads)
                ready = []
                if not threads.num_open:
                    return
                for trajectory, answer in threads.collect(all_of_them=self._in_rounds, check=self._check):
                    if isinstance(answer, float):
                        yield trajectory.rollout(answer)
                    elif self._goes_on(trajectory, answer):
                        ready.append(trajectory)
                    else:
                        yield from self._over(trajectory, threads)

    def _sample_turns(
        self, ready: Sequence[_Trajectory], threads: EnvironmentThreads[_Trajectory, _Answer]
    ) -> Iterator[Rollout]:
        """One turn of each; those that are over are yielded, the others wait for their replies."""
        if not ready:
            return
        of_key = {trajectory.key: trajectory for trajectory in ready}
        turns = self._sampler.sample(
            [trajectory.request for trajectory in ready], limits=[trajectory.room for trajectory in ready]
        )
        for turn in turns:
            trajectory = of_key[replace(turn.key, turn=0)]
            own_ids = turn.completion_ids[:-1] if turn.ended else turn.completion_ids
            text = self._tokenizer.decode(own_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            trajectory.parts.append(turn)
            trajectory.turns.append({"role": "assistant", "content": text})
            trajectory.num_turns += 1
            trajectory.ended = turn.ended
            if turn.ended and trajectory.num_turns < self._max_turns:
                threads.ask(trajectory, self._environment.checked_reply, trajectory.conversation)
            else:
                yield from self._over(trajectory, threads)

    def _goes_on(self, trajectory: _Trajectory, reply: tuple[Message, ...]) -> bool:
        """Adds a reply, where there is one and it fits."""
        if not reply:
            return False
        turns = [*trajectory.turns, *reply]
        ids = self._added_ids(trajectory.prompt, turns, int(trajectory.parts[-1].completion_ids[-1]))
        if len(ids) >= trajectory.room:
            trajectory.ended = False
            return False
        trajectory.parts.append(not_sampled(trajectory.key, ids))
        trajectory.turns = turns
        return True

    def _over(self, trajectory: _Trajectory, threads: EnvironmentThreads[_Trajectory, _Answer]) -> Iterator[Rollout]:
        if self._environment.reward is None:
            yield trajectory.rollout(None)
        else:
            threads.ask(trajectory, self._environment.checked_reward, trajectory.conversation)
