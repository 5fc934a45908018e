"""variance.json: the table of `vopd-client variance` at the start of every task, where all objectives begin."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from machine import machine_facts
from objectives_plan import TASKS, Task, digest
from vopd_client.command_config import VarianceConfig
from vopd_client.run_directory import write_atomically

SEED = 1
PACKAGES = ("torch", "transformers", "vopd")


@dataclass(frozen=True)
class Variances:
    """The file, and what fills it."""

    path: Path
    model: str
    work: Path  # with `data`, as `write_data` wrote it

    def missing(self, names: Collection[str]) -> list[Task]:
        """The tasks of these names that the file does not hold under today's settings."""
        known = self._known()
        return [
            task
            for task in TASKS
            if task.name in names and known.get(task.name, {}).get("settings") != self._settings(task)
        ]

    def measure(self, task: Task, teacher_url: str, console: Console) -> None:
        """Adds a task's table. Raises: VopdError; Interrupted when a signal asks for the end."""
        from vopd_client.variance_command import run_variance  # brings torch

        table = self.work / f"variance-{task.name}.json"
        run_variance(self._config(task, teacher_url, table), console=console)
        report = json.loads(table.read_text("utf-8"))
        del report["settings"]  # where things lay; what matters of them is in ours
        entry = {"about": task.about, "settings": self._settings(task), "report": report}
        table.unlink()
        content = {"machine": machine_facts(PACKAGES), "tasks": self._known() | {task.name: entry}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")

    def _known(self) -> dict[str, Any]:
        tasks: dict[str, Any] = json.loads(self.path.read_text("utf-8"))["tasks"] if self.path.exists() else {}
        return tasks

    def _prompts(self, task: Task) -> Path:
        return self.work / "data" / task.name / "train.jsonl"

    def _config(self, task: Task, teacher_url: str, json_file: Path) -> VarianceConfig:
        return VarianceConfig.model_validate(
            {
                "student": self.model,
                "teacher_url": [teacher_url],
                "head_cache": self.work / "heads",
                "prompts": str(self._prompts(task)),
                "max_new_tokens": task.settings["max_new_tokens"],
                "json_file": json_file,
                "seed": SEED,
                "device": "cpu",
            }
        )

    def _settings(self, task: Task) -> dict[str, Any]:
        """What the table depends on; the prompts by what is in them."""
        elsewhere = {"teacher_url", "head_cache", "prompts", "json_file"}
        settings = self._config(task, "-", Path()).model_dump(mode="json", exclude=elsewhere)
        return settings | {"prompts": digest(self._prompts(task))}
