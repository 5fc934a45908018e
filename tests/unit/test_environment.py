"""Environments are imported and looked at before anything starts, and what they reply is checked."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vopd_client.environment import (
    Conversation,
    LoadedEnvironment,
    check_rows,
    environment_of,
    gives_rewards,
    introduce_environment,
    load_environment,
)
from vopd_client.environment_threads import EnvironmentThreads
from vopd_client.errors import ConfigError, DataError, EnvironmentReplyError
from vopd_client.prompt_rows import parse_row
from vopd_client.train_config import TrainConfig

MODULE = """\
class Good:
    tools = [{"type": "function", "function": {"name": "look"}}]
    def reply(self, conversation): return []
    def reward(self, conversation): return 1
def plain(): return type("Plain", (), {"reply": lambda self, conversation: []})()
class Mute: pass
class Breaks:
    def __init__(self): raise RuntimeError("no database")
class Unwritable(Good): tools = [{"name": {1, 2}}]
class NoList(Good): tools = {"name": "look"}
class NoMethod(Good): reward = 3
"""
TALK = Conversation(
    ({"role": "assistant", "content": "hm"},), 2, "rows.jsonl:7", "4", None, "step 3, prompt 6, rollout 1"
)
WHERE = r"environment m:E: rows.jsonl:7, turn 2 \(step 3, prompt 6, rollout 1\)"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Importable from the working directory alone."""
    (tmp_path / "some_environments.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    load_environment.cache_clear()
    yield "some_environments"
    sys.modules.pop("some_environments", None)
    load_environment.cache_clear()


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(student="s", teacher_url=["grpc://t:1"], prompts="p.jsonl", **settings)


def test_a_class_or_a_function_makes_an_environment_once_a_process(module: str) -> None:
    good = load_environment(f"{module}:Good")
    assert [tool["function"]["name"] for tool in good.tools] == ["look"]
    assert good.checked_reward(TALK) == 1.0
    assert load_environment(f"{module}:Good") is good
    plain = load_environment(f"{module}:plain")
    assert (plain.tools, plain.reward, plain.checked_reply(TALK)) == ((), None, ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Absent", "AttributeError: module 'some_environments' has no attribute 'Absent'"),
        ("Mute", "Mute has no method reply"),
        ("Breaks", "RuntimeError: no database"),
        ("Unwritable", "tools cannot be written as JSON"),
        ("NoList", "tools is a list of JSON schemas"),
        ("NoMethod", "reward is a method"),
    ],
)
def test_what_is_no_environment_is_refused(module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_environment(f"{module}:{name}")
    assert str(raised.value).startswith(f"environment {module}:{name}: ")


@pytest.mark.parametrize("spec", ["module", "module:", ":name"])
def test_a_name_without_module_or_object_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"an environment is named package\.module:name"):
        load_environment(spec)


def test_a_module_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match="No module named 'surely_not_there'"):
        load_environment("surely_not_there:X")


# ---------------------------------------------------------------- settings and rows


def test_turns_without_an_environment_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_turns 3: without an environment nothing replies"):
        config(max_turns=3)


@pytest.mark.parametrize("setting", ["prompt_column", "answer_column"])
def test_columns_of_plain_text_do_not_go_with_an_environment(setting: str) -> None:
    with pytest.raises(ValidationError, match="read plain text, and an environment replies to messages"):
        config(environment="m:E", **{setting: "question"})


def test_rows_of_plain_text_are_refused_by_line(module: str) -> None:
    rows = [
        parse_row({"prompt": "2 + 2?"}, index=0, source="p.jsonl:1", default_verifier="exact"),
        parse_row(
            {"messages": [{"role": "user", "content": "x"}]}, index=1, source="p.jsonl:2", default_verifier="exact"
        ),
    ]
    assert check_rows(config(), rows) == rows
    with pytest.raises(DataError, match=r"p\.jsonl:1: an environment replies to messages, and this row"):
        check_rows(config(environment=f"{module}:Good"), rows)


def test_people_are_told_what_replies(module: str) -> None:
    assert environment_of(config()) is None
    assert introduce_environment(config()) == []
    assert not gives_rewards(config(environment=f"{module}:plain"))
    told = introduce_environment(config(environment=f"{module}:Good", eval_prompts="e.jsonl"))
    assert told == [
        f"environment {module}:Good: up to 8 turns, tools listed in the prompts: look; rewards are its own; "
        "evaluations are of first turns alone"
    ]


# ---------------------------------------------------------------- replies


def environment(reply: Any = lambda conversation: [], reward: Any = None) -> LoadedEnvironment:
    return LoadedEnvironment("m:E", reply, reward, ())


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (None, "reply returns a list of messages, not NoneType"),
        ("text", "reply returns a list of messages, not str"),
        (["text"], "message 0 is an object with role and content, not str"),
        ([{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}], "message 1: role 'assistant'"),
        ([{"role": "tool", "content": 3}], "message 0: content is text, not int"),
        ([{"role": "tool", "content": "x", "id": 3}], "message 0: unknown key 'id'"),
    ],
)
def test_a_reply_that_is_none_is_refused_with_row_and_turn(reply: Any, message: str) -> None:
    with pytest.raises(EnvironmentReplyError, match=f"{WHERE}: {message}"):
        environment(lambda conversation: reply).checked_reply(TALK)


@pytest.mark.parametrize("reward", [None, "1", float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(reward: Any) -> None:
    with pytest.raises(EnvironmentReplyError, match=f"{WHERE}: reward returns a finite number"):
        environment(reward=lambda conversation: reward).checked_reward(TALK)


def test_an_exception_keeps_its_cause_and_can_go_to_other_processes() -> None:
    def reply(conversation: Conversation) -> list[Any]:
        raise KeyError("sandbox")

    with pytest.raises(EnvironmentReplyError, match=f"{WHERE}: reply raised KeyError: 'sandbox'") as raised:
        environment(reply).checked_reply(TALK)
    assert isinstance(raised.value.__cause__, KeyError)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


# ---------------------------------------------------------------- threads


def never() -> None:
    """Nobody asks for the end."""


def test_a_slow_answer_does_not_hold_up_the_others() -> None:
    release = threading.Event()
    with EnvironmentThreads[str, str](timeout_s=30) as threads:
        threads.ask("slow", lambda conversation: str(release.wait(20)), TALK)
        threads.ask("fast", lambda conversation: "there", TALK)
        assert threads.collect(all_of_them=False, check=never) == [("fast", "there")]
        assert threads.num_open == 1
        release.set()
        assert threads.collect(all_of_them=False, check=never) == [("slow", "True")]


def test_in_rounds_all_answers_come_together_in_the_order_of_asking() -> None:
    with EnvironmentThreads[int, float](timeout_s=30) as threads:
        for number, sleep_s in enumerate([0.15, 0.0, 0.05]):
            threads.ask(number, lambda conversation, sleep_s=sleep_s: time.sleep(sleep_s) or sleep_s, TALK)
        assert threads.collect(all_of_them=True, check=never) == [(0, 0.15), (1, 0.0), (2, 0.05)]


def test_an_answer_that_does_not_come_is_an_error_with_row_and_turn() -> None:
    release = threading.Event()
    with EnvironmentThreads[str, bool](timeout_s=0.05) as threads:
        threads.ask("hangs", lambda conversation: release.wait(20), TALK)
        with pytest.raises(EnvironmentReplyError, match=r"not answered for 0.05 s .*: rows.jsonl:7, turn 2"):
            threads.collect(all_of_them=True, check=never)
    release.set()


def test_waiting_in_the_queue_is_no_delay_of_the_environment() -> None:
    with EnvironmentThreads[int, None](timeout_s=0.3, num_threads=1) as threads:
        for number in range(4):
            threads.ask(number, lambda conversation: time.sleep(0.15), TALK)
        assert len(threads.collect(all_of_them=True, check=never)) == 4


def test_an_error_does_not_wait_for_the_others() -> None:
    release = threading.Event()

    def fail(conversation: Conversation) -> bool:
        raise EnvironmentReplyError("broken")

    with EnvironmentThreads[str, bool](timeout_s=30) as threads:
        threads.ask("slow", lambda conversation: release.wait(20), TALK)
        threads.ask("broken", fail, TALK)
        began = time.monotonic()
        with pytest.raises(EnvironmentReplyError, match="broken"):
            threads.collect(all_of_them=True, check=never)
        assert time.monotonic() - began < 10
    release.set()


def test_someone_who_asks_for_the_end_is_heard_while_a_tool_works() -> None:
    release = threading.Event()

    def stop() -> None:
        raise KeyboardInterrupt

    with EnvironmentThreads[str, bool](timeout_s=30) as threads:
        threads.ask("slow", lambda conversation: release.wait(20), TALK)
        with pytest.raises(KeyboardInterrupt):
            threads.collect(all_of_them=True, check=stop)
    release.set()
