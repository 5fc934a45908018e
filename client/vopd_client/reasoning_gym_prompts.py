"""Tasks of reasoning-gym as prompts: reasoning-gym:chain_sum?size=200&seed=1&max_terms=3

Several tasks take turns: reasoning-gym:chain_sum+lcm?size=100&chain_sum.max_terms=3. What follows `?` are parameters,
of all tasks, or of one where its name and a dot come first; values are JSON, or text. Beside the tasks' own there are

size           rows of each task; default 500
seed           default 42; another one gives other rows
system_prompt  how the answer is asked for: a name in reasoning-gym, or none; default: "default", <answer> tags
chat           false: plain text, the system prompt before the question; default true: messages
teacher        the name of the teacher that scores the rows, in a run with several

Source: reasoning-gym, https://github.com/open-thought/reasoning-gym
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vopd_client.errors import DataError
from vopd_client.prompt_rows import PromptRow, RowFormat, parse_row
from vopd_client.reasoning_gym_rows import Made
from vopd_client.reasoning_gym_scores import TaskItem, is_harmless

PREFIX = "reasoning-gym:"
ANY_ANSWER = "(whatever the task accepts)"  # of the few tasks that give no example

# Imported, not run as the main module: what is pickled has the module's name.
_MAKE_ROWS = "from vopd_client.reasoning_gym_rows import main; main()"
_ROW_OPTIONS = {"system_prompt": "default", "chat": True, "teacher": None}
_TASK_DEFAULTS = {"size": 500, "seed": 42}


@dataclass(frozen=True)
class TaskSpec:
    """A specification, taken apart. parameters: of every task in order, size and seed included."""

    parameters: Mapping[str, Mapping[str, Any]]
    system_prompt: str
    chat: bool
    teacher: str | None


def is_task_spec(spec: str) -> bool:
    return spec.startswith(PREFIX)


def load_task_rows(spec: str, row_format: RowFormat) -> list[PromptRow]:
    """The rows of `spec`, the same ones every time and in every process; `kind` is the task's name.

    Raises: DataError naming the task or the parameter, or saying what to install.
    """
    parsed = parse_task_spec(spec)
    made = _make_in_a_process(spec, parsed)
    if made.problem:
        raise DataError(f"{spec}: {made.problem}")
    for task in made.tasks:
        if task.runs_answers and not all(is_harmless(str(entry["answer"])) for entry in task.entries):
            raise DataError(
                f"{spec}: reasoning-gym scores {task.name} by running the answer as Python code, which a completion "
                "must not decide; take another task"
            )
    turns = zip_longest(
        *([(task, place, entry) for place, entry in enumerate(task.entries, start=1)] for task in made.tasks)
    )
    rows: list[PromptRow] = []
    for task, place, entry in (item for turn in turns for item in turn if item is not None):
        source = f"{PREFIX}{task.name}:{place}"
        value = row_format.suffixed(_prompt(parsed, made.system_prompt, entry["question"]), source)
        row = parse_row(value, index=len(rows), source=source, default_verifier="exact")
        item = TaskItem(task.name, json.dumps(parsed.parameters[task.name]), entry, task.runs_answers)
        answer = ANY_ANSWER if entry["answer"] is None else str(entry["answer"])
        rows.append(replace(row, kind=task.name, answer=answer, verifier="reasoning-gym", task_item=item))
    return rows


def parse_task_spec(spec: str) -> TaskSpec:
    """Raises: DataError for what is not `reasoning-gym:task+task?name=value&task.name=value`."""
    names, _, query = spec.removeprefix(PREFIX).partition("?")
    tasks = names.split("+")
    if not all(tasks) or len(set(tasks)) < len(tasks):
        raise DataError(f"{spec}: write {PREFIX}task, or {PREFIX}task+task for several, each of them once")
    options: dict[str, Any] = dict(_ROW_OPTIONS)
    parameters: dict[str, dict[str, Any]] = {task: dict(_TASK_DEFAULTS) for task in tasks}
    of_one: list[tuple[str, str, Any]] = []
    for part in query.split("&") if query else []:
        name, equals, text = part.partition("=")
        if not equals or not name:
            raise DataError(f"{spec}: {part!r} is no parameter: write name=value, joined by &")
        value = _value(unquote(text))
        task, dot, own_name = name.partition(".")
        if dot:
            if task not in parameters:
                raise DataError(f"{spec}: {name}: there is no task {task!r} in it; there are {', '.join(tasks)}")
            of_one.append((task, own_name, value))
        elif name in options:
            options[name] = value
        else:
            for of_task in parameters.values():
                of_task[name] = value
    for task, name, value in of_one:  # what is said of one task goes before what is said of all
        parameters[task][name] = value
    for task, of_task in parameters.items():
        for name, least in (("size", 1), ("seed", 0)):
            if not isinstance(of_task[name], int) or isinstance(of_task[name], bool) or of_task[name] < least:
                raise DataError(f"{spec}: {name} of {task} is a whole number from {least}, not {of_task[name]!r}")
    if not isinstance(options["chat"], bool):
        raise DataError(f"{spec}: chat is true or false, not {options['chat']!r}")
    teacher = options["teacher"]
    return TaskSpec(
        parameters, str(options["system_prompt"]), options["chat"], None if teacher is None else str(teacher)
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _prompt(spec: TaskSpec, system_prompt: str, question: str) -> dict[str, Any]:
    """The row in this project's keys, without an answer."""
    teacher = {} if spec.teacher is None else {"teacher": spec.teacher}
    if not spec.chat:
        return {"prompt": f"{system_prompt}\n\n{question}" if system_prompt else question, **teacher}
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return {"messages": [*system, {"role": "user", "content": question}], **teacher}


def _make_in_a_process(spec: str, parsed: TaskSpec) -> Made:
    """Where Python's hash seed is 0, and what generators print goes nowhere."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise DataError(f"{spec}: reasoning-gym is not installed: pip install 'vopd[tasks]'")
    wanted = {"tasks": list(parsed.parameters.items()), "system_prompt": parsed.system_prompt}
    with tempfile.TemporaryDirectory(prefix="vopd-tasks-") as directory:
        asked, out = Path(directory, "wanted.json"), Path(directory, "rows.pickle")
        asked.write_text(json.dumps(wanted), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", _MAKE_ROWS, str(asked), str(out)],
            env=os.environ | {"PYTHONHASHSEED": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DataError(f"{spec}: reasoning-gym could not make the rows: {last}")
        made = pickle.loads(out.read_bytes())
    assert isinstance(made, Made)
    return made
