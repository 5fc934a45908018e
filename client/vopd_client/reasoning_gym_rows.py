"""Makes rows of reasoning-gym tasks, in a process of its own with two arguments, WANTED and OUT.

Some generators iterate over sets of text, so that their rows depend on Python's hash seed: the process that calls this
one fixes it (`reasoning_gym_prompts`), and the same specification gives the same rows everywhere.

WANTED is JSON, the tasks and their parameters; OUT is written as a pickle, since entries hold tuples and dates.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
import pickle
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What runs text as Python, sympy's parsers included.
_EVALUATORS = frozenset({"eval", "exec", "parse_expr", "sympify"})
# What generators raise for parameters that their own check lets through.
_GENERATOR_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class MadeTask:
    """Rows of one task. runs_answers: its scoring hands the answer to something that runs it as Python."""

    name: str
    entries: list[dict[str, Any]]
    runs_answers: bool


@dataclass(frozen=True)
class Made:
    """What this process answers: rows and the text of the system prompt, or what is wrong."""

    tasks: tuple[MadeTask, ...] = ()
    system_prompt: str = ""
    problem: str = ""


def make(wanted: Mapping[str, Any]) -> Made:
    """`wanted`: "tasks", a list of [name, parameters with size and seed], and "system_prompt", a name or "none"."""
    from reasoning_gym.utils import SYSTEM_PROMPTS

    name = wanted["system_prompt"]
    if name != "none" and name not in SYSTEM_PROMPTS:
        return Made(problem=_unknown("system_prompt", name, [*SYSTEM_PROMPTS, "none"]))
    made = []
    for task, parameters in wanted["tasks"]:
        try:
            made.append(_make_task(task, parameters))
        except ValueError as error:
            return Made(problem=str(error))
    return Made(tuple(made), SYSTEM_PROMPTS.get(name, "").strip())


def _make_task(task: str, parameters: Mapping[str, Any]) -> MadeTask:
    """Raises: ValueError saying what is wrong with the name or a parameter."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    tasks = sorted(set(DATASETS) - {"composite"})
    if task not in tasks:
        raise ValueError(_unknown("task", task, tasks, shown=False))
    config_type = DATASETS[task][1]
    checked = check_parameters(task, parameters, vars(config_type()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its dependencies: files left open
            dataset = reasoning_gym.create_dataset(task, **checked | {"seed": task_seed(task, checked["seed"])})
            entries = list(dataset)
    except _GENERATOR_ERRORS as error:
        shown = ", ".join(f"{name}={value}" for name, value in parameters.items())
        raise ValueError(f"{task} with {shown}: {type(error).__name__}: {error}") from error
    return MadeTask(task, entries, runs_answers(type(dataset)))


def task_seed(task: str, seed: int) -> int:
    """The seed that reasoning-gym gets, below 2**31.

    Row i of a task with seed s is drawn from s + i there, so that seeds 1 and 2 share nearly all of their rows:
    held-out rows would be training rows. Hashed, seeds are apart.
    """
    return int.from_bytes(hashlib.sha256(f"{task}:{seed}".encode()).digest()[:4], "little") >> 1


def check_parameters(task: str, parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in the types of their defaults. Raises: ValueError naming the parameter."""
    checked = {}
    for name, value in parameters.items():
        if name not in defaults:
            raise ValueError(_unknown(f"parameter of {task}", name, list(defaults)))
        match defaults[name]:
            case bool():
                fits = isinstance(value, bool)
            case int():
                fits = isinstance(value, int) and not isinstance(value, bool)
            case float():
                fits = isinstance(value, int | float) and not isinstance(value, bool)
            case str():
                fits = isinstance(value, str)
            case tuple() | list():
                fits = isinstance(value, list)
                value = type(defaults[name])(value) if fits else value
            case None:
                fits = True
            case _:
                raise ValueError(f"{task}: {name} cannot be set here: it takes no number, text or list")
        if not fits:
            raise ValueError(f"{task}: {name} is like {json.dumps(defaults[name])}, not {value!r}")
        checked[name] = value
    return checked


def _unknown(what: str, name: str, known: Iterable[str], *, shown: bool = True) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    there = f"; there are {', '.join(known)}" if shown else f"; there are {len(known)}"
    return f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else there)


# ---------------------------------------------------------------- what scoring does with an answer


def runs_answers(dataset_type: type) -> bool:
    """Whether `score_answer`, or a method that it calls, hands more than its own entry to something that runs it.

    Read from the source: of published scorers some call eval on the answer, some sympy's parser, which calls eval.
    """
    seen: set[str] = set()
    open_names = ["score_answer"]
    module = inspect.getmodule(dataset_type)
    while open_names:
        name = open_names.pop()
        function = getattr(dataset_type, name, None) or getattr(module, name, None)
        if name in seen or not inspect.isroutine(function):
            continue
        seen.add(name)
        if inspect.getmodule(function) is not module and name != "score_answer":
            continue
        for call in _calls(function):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if called in _EVALUATORS and not _is_own(module, called) and _names(call) - {"entry", "metadata"}:
                return True
            open_names.append(called)
    return False


def _calls(function: Any) -> list[ast.Call]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _is_own(module: Any, name: str) -> bool:
    """A function of the task's own that happens to have the name."""
    return bool(getattr(getattr(module, name, None), "__module__", None) == module.__name__)


def _names(call: ast.Call) -> set[str]:
    return {node.id for value in call.args for node in ast.walk(value) if isinstance(node, ast.Name)}


def main() -> None:
    wanted, out = map(Path, sys.argv[1:])
    out.write_bytes(pickle.dumps(make(json.loads(wanted.read_text("utf-8")))))
