"""What answers a student between its turns: tools, games, other people. Users' own code is behind it; no torch.

An environment is an object with a method `reply`. It may have `tools`, JSON schemas that the chat templates list, and a
method `reward`. See docs/multi-turn.md.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from vopd_client.errors import ConfigError, DataError, EnvironmentReplyError
from vopd_client.prompt_rows import Message, PromptRow, map_rows
from vopd_client.train_config import TrainConfig

DEFAULT_MAX_TURNS = 8

_REPLY_ROLES = ("tool", "user")
_REPLY_KEYS = ("role", "content", "name", "tool_call_id")  # chat templates read the last two


@dataclass(frozen=True, slots=True)
class Conversation:
    """What an environment replies to.

    messages: the row's, then the student's turns with the replies between them; the last is the student's, as
        {"role": "assistant", "content": what it wrote}, special tokens included but for the end token.
    turn: of the student, counted from 1; the one that is replied to.
    trajectory: names this one among all of a run, and is the same when the run is repeated.
    """

    messages: tuple[Message, ...]
    turn: int
    source: str  # of the row, "data.jsonl:12"
    answer: str | None
    kind: str | None
    trajectory: str  # "step 3, prompt 12, rollout 1"

    @property
    def text(self) -> str:
        """What the student wrote in its last turn."""
        return str(self.messages[-1]["content"])


class Environment(Protocol):
    """One object answers all trajectories of a process, from several threads at once."""

    def reply(self, conversation: Conversation) -> Sequence[Message]:
        """Messages of roles tool or user for the student to go on from; none: the trajectory is over."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedEnvironment:
    """A user's environment, looked at once. reward: of a whole trajectory, in place of the row's verifier."""

    spec: str  # "package.module:name"
    reply: Callable[[Conversation], Sequence[Message]]
    reward: Callable[[Conversation], float] | None
    tools: tuple[Mapping[str, Any], ...]

    def checked_reply(self, conversation: Conversation) -> tuple[Message, ...]:
        """Raises: EnvironmentReplyError for what is no list of messages, and for what the environment raises."""
        value = _called(self, "reply", self.reply, conversation)
        where = _where(self, conversation)
        if not isinstance(value, list | tuple):
            raise EnvironmentReplyError(f"{where}: reply returns a list of messages, not {type(value).__name__}")
        return tuple(_message(item, f"{where}: message {index}") for index, item in enumerate(value))

    def checked_reward(self, conversation: Conversation) -> float:
        """Raises: EnvironmentReplyError for what is no finite number, and for what the environment raises."""
        assert self.reward is not None
        value = _called(self, "reward", self.reward, conversation)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        raise EnvironmentReplyError(f"{_where(self, conversation)}: reward returns a finite number, not {value!r}")


@cache
def load_environment(spec: str) -> LoadedEnvironment:
    """Imports `package.module:name`, from the working directory too, and calls it without arguments, once a process.

    Raises: ConfigError for a name that is not there, an exception on the way, and an object that is no environment.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"environment {spec!r}: an environment is named package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command that pip installed does not look there by itself
    try:
        make = getattr(importlib.import_module(module_name), name)
        made = make()
    except Exception as error:  # whatever a user's module does while it is imported
        raise ConfigError(f"environment {spec}: {type(error).__name__}: {error}") from error
    reply, reward = getattr(made, "reply", None), getattr(made, "reward", None)
    if not callable(reply):
        raise ConfigError(f"environment {spec}: {type(made).__name__} has no method reply(conversation)")
    if reward is not None and not callable(reward):
        raise ConfigError(f"environment {spec}: reward is a method reward(conversation), not {reward!r}")
    return LoadedEnvironment(spec, reply, reward, _checked_tools(getattr(made, "tools", ()), spec))


def environment_of(config: TrainConfig) -> LoadedEnvironment | None:
    """The run's own, made when it is first asked for. Raises: ConfigError."""
    return None if config.environment is None else load_environment(config.environment)


def check_rows(config: TrainConfig, rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows, each of which the run's environment can reply to. Raises: DataError for plain text."""
    if environment_of(config) is None:
        return list(rows)

    def check(row: PromptRow) -> PromptRow:
        if row.messages is None:
            raise DataError(
                f"{row.source}: an environment replies to messages, and this row has a prompt of plain text"
            )
        return row

    return map_rows(check, rows)


def introduce_environment(config: TrainConfig) -> list[str]:
    """What people should know of the run's environment first; nothing where there is none."""
    environment = environment_of(config)
    if environment is None:
        return []
    max_turns = config.max_turns or DEFAULT_MAX_TURNS
    names = [str(tool.get("function", tool).get("name", "a tool without a name")) for tool in environment.tools]
    about_evaluations = "; evaluations are of first turns alone" if config.eval_prompts else ""
    return [
        f"environment {environment.spec}: up to {max_turns} turns, tools listed in the prompts: "
        f"{', '.join(names) or 'none'}; rewards are {'its own' if environment.reward else 'those of the rows'}"
        f"{about_evaluations}"
    ]


def gives_rewards(config: TrainConfig) -> bool:
    """Whether trajectories are judged by the environment, and rows need no answer."""
    environment = environment_of(config)
    return environment is not None and environment.reward is not None


def _checked_tools(tools: object, spec: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(f"environment {spec}: tools is a list of JSON schemas, not {tools!r}")
    try:
        json.dumps(tools)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environment {spec}: tools cannot be written as JSON: {error}") from error
    return tuple(tools)


def _called(
    environment: LoadedEnvironment, name: str, method: Callable[[Conversation], object], conversation: Conversation
) -> object:
    try:
        return method(conversation)
    except Exception as error:  # whatever a user's code raises: the run is saved, and its owner told where
        where = _where(environment, conversation)
        raise EnvironmentReplyError(f"{where}: {name} raised {type(error).__name__}: {error}") from error


def _where(environment: LoadedEnvironment, conversation: Conversation) -> str:
    return (
        f"environment {environment.spec}: {conversation.source}, turn {conversation.turn} ({conversation.trajectory})"
    )


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise EnvironmentReplyError(f"{where} is an object with role and content, not {type(value).__name__}")
    for key in value:
        if key not in _REPLY_KEYS:
            raise EnvironmentReplyError(f"{where}: unknown key {key!r}; there are {', '.join(_REPLY_KEYS)}")
    if value.get("role") not in _REPLY_ROLES:
        raise EnvironmentReplyError(
            f"{where}: role {value.get('role')!r}; an environment speaks as {' or '.join(_REPLY_ROLES)}"
        )
    if not isinstance(value.get("content"), str):
        raise EnvironmentReplyError(f"{where}: content is text, not {type(value.get('content')).__name__}")
    return value
