"""Trajectories from a scripted student: which tokens are whose, what ends them, and that nothing is sampled twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tiny_model import tiny_tokenizer
from vopd_client.environment import Conversation, LoadedEnvironment
from vopd_client.errors import EnvironmentReplyError
from vopd_client.prompts import Prompt
from vopd_client.rollouts.base import Rollout, RolloutKey, RolloutRequest, last_turn_ids, turn_bounds
from vopd_client.rollouts.multi_turn import MultiTurnSampler

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
KEY = RolloutKey(3, 0, 1)


def prompt(index: int) -> Prompt:
    asked = ({"role": "user", "content": f"q{index}"},)
    return Prompt(
        index, f"p:{index}", np.arange(3) + index, np.arange(2), str(index), "exact", "odd", "", messages=asked
    )


PROMPTS = [prompt(index) for index in range(3)]


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


class ScriptedStudent:
    """Writes the next line of its prompt's script; `requests` and `limits` are what it was asked."""

    def __init__(self, *scripts: Sequence[str]) -> None:
        self._scripts = scripts
        self.requests: list[list[RolloutRequest]] = []
        self.limits: list[list[int]] = []

    def sample(self, requests: Sequence[RolloutRequest], *, limits: Sequence[int] | None = None) -> Iterator[Rollout]:
        assert limits is not None
        self.requests.append(list(requests))
        self.limits.append(list(limits))
        for (key, prompt_ids), limit in reversed(list(zip(requests, limits, strict=True))):  # in no particular order
            ids = [*ids_of(self._scripts[key.prompt_index][key.turn]), END]
            kept = np.array(ids[:limit])
            counts_T = np.arange(len(kept)) % 3
            yield Rollout(
                key=key,
                prompt_ids=prompt_ids,
                completion_ids=kept,
                behaviour_logprobs_T=-np.arange(1, len(kept) + 1, dtype=np.float32),
                support_ids=np.arange(counts_T.sum()) + 10 * key.turn,
                support_counts_T=counts_T,
                support_mass_T=np.full(len(kept), 0.5, np.float32),
                ended=len(ids) <= limit,
            )


def echo(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": "tool", "content": conversation.text.upper()}]


def added_ids(prompt: Prompt, turns: Sequence[Any], end_id: int) -> np.ndarray:
    """`[reply]`: as many tokens as that has letters."""
    assert turns[-2]["role"] == "assistant"
    return np.array(ids_of(f"[{turns[-1]['content']}]"))


def sampler(
    student: ScriptedStudent,
    reply: Callable[[Conversation], Any] = echo,
    *,
    reward: Callable[[Conversation], float] | None = None,
    **settings: Any,
) -> MultiTurnSampler:
    defaults: dict[str, Any] = {
        "prompts": PROMPTS, "added_ids": added_ids, "tokenizer": TOKENIZER, "max_new_tokens": 100, "max_turns": 8,
        "timeout_s": 20, "in_rounds": True,
    }  # fmt: skip
    return MultiTurnSampler(student, environment=LoadedEnvironment("m:E", reply, reward, ()), **defaults | settings)


def requests_of(*positions: int) -> list[RolloutRequest]:
    return [(replace(KEY, prompt_index=position), PROMPTS[position].student_ids) for position in positions]


def only(rollouts: Iterator[Rollout]) -> Rollout:
    [rollout] = rollouts
    return rollout


def until(number: int) -> Callable[[Conversation], Any]:
    """Replies to all turns before this one."""
    return lambda conversation: echo(conversation) if conversation.turn < number else []


# ---------------------------------------------------------------- whose tokens


def test_sampled_tokens_stay_as_they_are_and_replies_lie_between() -> None:
    student = ScriptedStudent(["ab", "c"])
    rollout = only(sampler(student, until(2)).sample(requests_of(0)))
    expected = [*ids_of("ab"), END, *ids_of("[AB]"), *ids_of("c"), END]
    assert rollout.completion_ids.tolist() == expected
    assert rollout.is_sampled_T is not None
    assert rollout.is_sampled_T.tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert rollout.behaviour_logprobs_T.tolist() == [-1, -2, -3, 0, 0, 0, 0, -1, -2]
    assert rollout.support_counts_T.tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 1]
    assert rollout.support_ids.tolist() == [0, 1, 2, 10]
    assert rollout.support_mass_T.tolist() == [0.5] * 3 + [0.0] * 4 + [0.5] * 2
    assert (rollout.key, rollout.ended, rollout.task_reward) == (replace(KEY, prompt_index=0), True, None)
    assert rollout.prompt_ids is PROMPTS[0].student_ids
    assert turn_bounds(rollout) == [(0, 3), (7, 9)]
    assert last_turn_ids(rollout).tolist() == [*ids_of("c"), END]


def test_the_next_turn_reads_the_very_ids_and_draws_numbers_of_its_own() -> None:
    student = ScriptedStudent(["ab", "c"])
    only(sampler(student, until(2)).sample(requests_of(0)))
    (first,), (second,) = student.requests
    assert first[0].turn == 0
    assert second[0] == replace(first[0], turn=1)
    assert second[1].tolist() == [*first[1], *ids_of("ab"), END, *ids_of("[AB]")]
    assert student.limits == [[100], [100 - 3 - 4]]


def test_the_environment_sees_the_conversation_and_the_row() -> None:
    seen: list[Conversation] = []

    def reply(conversation: Conversation) -> Any:
        seen.append(conversation)
        return until(2)(conversation)

    only(sampler(ScriptedStudent([], ["<|start|>ab", "c"]), reply).sample(requests_of(1)))
    assert [conversation.turn for conversation in seen] == [1, 2]
    assert seen[1].messages == (
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<|start|>ab"},  # special tokens may be how a tool is called
        {"role": "tool", "content": "<|START|>AB"},
        {"role": "assistant", "content": "c"},
    )
    assert seen[1].text == "c"
    assert (seen[1].source, seen[1].answer, seen[1].kind) == ("p:1", "1", "odd")
    assert seen[1].trajectory == "step 3, prompt 1, rollout 1"


def test_a_single_turn_is_the_samplers_own_rollout() -> None:
    rollout = only(sampler(ScriptedStudent(["ab"]), until(1)).sample(requests_of(0)))
    assert rollout.completion_ids.tolist() == [*ids_of("ab"), END]
    assert turn_bounds(rollout) == [(0, 3)]
    assert turn_bounds(replace(rollout, is_sampled_T=None)) == [(0, 3)]


# ---------------------------------------------------------------- what ends a trajectory


def test_the_last_of_max_turns_is_not_replied_to() -> None:
    asked: list[int] = []

    def reply(conversation: Conversation) -> Any:
        asked.append(conversation.turn)
        return echo(conversation)

    rollout = only(sampler(ScriptedStudent(["a", "b", "c"]), reply, max_turns=2).sample(requests_of(0)))
    assert len(turn_bounds(rollout)) == 2
    assert rollout.ended
    assert asked == [1]


def test_a_turn_that_is_cut_ends_the_trajectory() -> None:
    rollout = only(sampler(ScriptedStudent(["abcdef"]), max_new_tokens=4).sample(requests_of(0)))
    assert rollout.completion_ids.tolist() == ids_of("abcd")
    assert not rollout.ended


@pytest.mark.parametrize(("limit", "num_turns"), [(7, 1), (8, 2)])
def test_a_reply_must_leave_room_for_a_token_of_the_students(limit: int, num_turns: int) -> None:
    # "ab" and its end are 3 tokens, the reply is 4.
    rollout = only(sampler(ScriptedStudent(["ab", "c"]), max_new_tokens=limit, max_turns=2).sample(requests_of(0)))
    assert len(turn_bounds(rollout)) == num_turns
    assert len(rollout.completion_ids) == (3 if num_turns == 1 else 8)
    assert not rollout.ended
    assert rollout.completion_ids[2] == END


def test_limits_of_single_requests_hold_for_whole_trajectories() -> None:
    student = ScriptedStudent(["ab", "c"], ["ab", "c"])
    rollouts = sampler(student, until(2)).sample(requests_of(0, 1), limits=[3, 50])
    assert {rollout.key.prompt_index: len(rollout.completion_ids) for rollout in rollouts} == {0: 3, 1: 9}


# ---------------------------------------------------------------- side by side


def test_in_rounds_all_turns_of_a_number_are_sampled_side_by_side() -> None:
    student = ScriptedStudent(["a", "b"], ["a", "b"], ["a"])

    def reply(conversation: Conversation) -> Any:
        time.sleep(0.1 if conversation.source == "p:0" else 0)
        return until(1 if conversation.source == "p:2" else 2)(conversation)

    rollouts = list(sampler(student, reply).sample(requests_of(0, 1, 2)))
    assert sorted(len(turn_bounds(rollout)) for rollout in rollouts) == [1, 2, 2]
    # In the order of asking, which is the one that the student finished in, and not that of the answers.
    assert [[key.prompt_index for key, _ in asked] for asked in student.requests] == [[0, 1, 2], [1, 0]]


def test_out_of_rounds_a_slow_tool_stalls_nobody_else() -> None:
    student, release = ScriptedStudent(["a", "b"], ["a", "b"]), threading.Event()

    def reply(conversation: Conversation) -> Any:
        if conversation.source == "p:0":
            assert release.wait(20)
        return until(2)(conversation)

    rollouts = sampler(student, reply, in_rounds=False).sample(requests_of(0, 1))
    assert next(rollouts).key.prompt_index == 1  # all its turns are over
    release.set()
    assert next(rollouts).key.prompt_index == 0
    assert [len(asked) for asked in student.requests] == [2, 1, 1]


def test_the_order_of_requests_changes_no_trajectory() -> None:
    scripts = (["ab", "c"], ["d", "efg"], ["h", "i"])

    def trajectories(*positions: int) -> dict[int, list[int]]:
        found = sampler(ScriptedStudent(*scripts), until(2)).sample(requests_of(*positions))
        return {rollout.key.prompt_index: rollout.completion_ids.tolist() for rollout in found}

    assert trajectories(0, 1, 2) == trajectories(2, 0, 1)
    assert trajectories(1)[1] == trajectories(0, 1, 2)[1]


# ---------------------------------------------------------------- rewards and errors


def test_an_environments_reward_is_of_the_whole_trajectory() -> None:
    def reward(conversation: Conversation) -> float:
        return float(len(conversation.messages)) + conversation.turn / 8

    rollouts = sampler(ScriptedStudent(["a", "b"], ["a"]), lambda c: until(2 - int(c.source[2:]))(c), reward=reward)
    assert {rollout.key.prompt_index: rollout.task_reward for rollout in rollouts.sample(requests_of(0, 1))} == {
        0: 4 + 2 / 8,
        1: 2 + 1 / 8,
    }


def test_an_error_in_an_environment_names_row_and_turn() -> None:
    def reply(conversation: Conversation) -> Any:
        if conversation.turn == 2:
            raise ConnectionError("the sandbox is gone")
        return echo(conversation)

    with pytest.raises(
        EnvironmentReplyError, match=r"p:1, turn 2 .* reply raised ConnectionError: the sandbox is gone"
    ):
        list(sampler(ScriptedStudent([], ["a", "b"]), reply).sample(requests_of(1)))


def test_a_reply_that_does_not_come_names_row_and_turn() -> None:
    release = threading.Event()
    with pytest.raises(EnvironmentReplyError, match=r"has not answered for 0\.05 s .*p:0, turn 1"):
        list(sampler(ScriptedStudent(["a"]), lambda c: release.wait(20), timeout_s=0.05).sample(requests_of(0)))
    release.set()


def test_no_requests_are_no_trajectories() -> None:
    assert list(sampler(ScriptedStudent()).sample([])) == []
