"""A place to train in: tiny models, prompts, teachers and trainers in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from teacher_process import RunningTeacher, start_teacher
from tiny_model import write_tiny_model
from vopd_client.run_directory import read_rows
from warm_python import WarmProcess

STEPS = 24
NUM_PROMPTS = 8
# What a clock measured, and what depends on how requests happened to share messages.
NOT_COMPARED = frozenset(
    {
        *("teacher_wait_s", "rollout_s", "update_s", "step_s", "tokens_per_s", "teacher_bytes_per_token"),
        *("wait_s", "bytes"),  # of one of several teachers
    }
)
PATIENCE_S = 120.0
# Tiny matrices gain nothing from threads, and several processes with two each wait for one another on two cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def start_client(
    arguments: list[str], log_file: BinaryIO, env: dict[str, str], *, afresh: bool
) -> subprocess.Popen[bytes] | WarmProcess:
    module = "vopd_client.cli"
    if afresh:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, env=env)
    stdout = log_file.fileno()
    return WarmProcess(module, arguments, stdout=stdout, stderr=stdout, env=env, own_group=False, draws=False)


class Trainer:
    """`vopd-client train` in a process of its own. afresh: in a new Python; draws its report."""

    def __init__(self, arguments: list[str], log_path: Path, env: dict[str, str], *, afresh: bool) -> None:
        self._log_path = log_path
        env = {**os.environ, **ONE_THREAD, **env}
        with log_path.open("wb") as log_file:
            self.process = start_client(["train", *arguments], log_file, env, afresh=afresh)

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"the trainer ended too early:\n{self.log()}"
            assert time.monotonic() < give_up_s, f"waited {PATIENCE_S} s in vain:\n{self.log()}"
            time.sleep(0.01)


class Workplace:
    """Models, prompts and runs of a test module."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.teacher_dir = write_tiny_model(directory / "teacher", seed=0)
        self.student_dir = write_tiny_model(directory / "student", seed=1)
        self.prompts = directory / "prompts.jsonl"
        self.prompts.write_text("".join(f'{{"prompt": "say {index}:"}}\n' for index in range(NUM_PROMPTS)))

    def teacher(self, *flags: str, port: int = 0, http_port: int = 0) -> RunningTeacher:
        flags = ("--deterministic", "--dtype", "float32", *flags)
        return start_teacher(self.teacher_dir, *flags, port=port, http_port=http_port, env=ONE_THREAD)

    @contextmanager
    def trainer(
        self,
        name: str,
        url: str | dict[str, str],
        *flags: str,
        env: dict[str, str] | None = None,
        afresh: bool = False,
    ) -> Iterator[Trainer]:
        """url: the teacher's, or those of several by their names."""
        settings = {
            "student": self.student_dir,
            "prompts": self.prompts,
            "output_dir": self.directory / "runs",
            "name": name,
            "steps": STEPS,
            "learning_rate": 1e-3,
            "prompts_per_step": 3,
            "rollouts_per_prompt": 2,
            "max_new_tokens": 12,
            "top_k": 8,
            "checkpoint_every": 5,
            "mixed_precision": "no",
            "device": "cpu",
        }
        given = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        if isinstance(url, str):
            given += ["--teacher-url", url]
        else:
            given += [word for teacher, its_url in url.items() for word in ("--teacher", f"{teacher}={its_url}")]
        log_path = self.directory / f"{name}-{time.monotonic_ns()}.log"
        trainer = Trainer([*given, "--deterministic", *flags], log_path, env or {}, afresh=afresh)
        try:
            yield trainer
        finally:
            if trainer.process.poll() is None:
                trainer.process.kill()
                trainer.process.wait()

    def complete(self, name: str, url: str | dict[str, str], *flags: str, afresh: bool = False) -> str:
        """Trains to the end; what was printed."""
        with self.trainer(name, url, *flags, afresh=afresh) as trainer:
            assert trainer.wait() == 0, trainer.log()
            return trainer.log()

    def run(self, name: str) -> Path:
        return self.directory / "runs" / name

    def num_steps(self, name: str) -> int:
        return len(read_rows(self.run(name) / "metrics.jsonl"))

    def metrics(self, name: str) -> list[dict[str, Any]]:
        rows = read_rows(self.run(name) / "metrics.jsonl")
        return [{key: value for key, value in row.items() if key.rsplit("/")[-1] not in NOT_COMPARED} for row in rows]

    def final_weights(self, name: str) -> bytes:
        return (self.run(name) / "model" / "model.safetensors").read_bytes()

    def checkpoint_steps(self, name: str) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.run(name).glob("checkpoints/step-*"))


def assert_same_run(place: Workplace, name: str, other: str) -> None:
    """The same metrics but for what a clock measured, and the same bits."""
    assert place.metrics(name) == place.metrics(other)
    assert place.final_weights(name) == place.final_weights(other)
