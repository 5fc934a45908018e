"""Whole training runs in a directory of their own, of tiny models, against a teacher in this process."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from fake_local_teacher import FakeLocalTeacher
from vopd_client.run_directory import RunDirectory, read_rows
from vopd_client.train_config import TrainConfig
from vopd_client.training_run import run_training

NUM_PROMPTS = 6
ROLLOUTS_A_STEP = 4
TIMES = frozenset({"teacher_wait_s", "rollout_s", "update_s", "step_s", "tokens_per_s", "wait_s"})


@dataclass
class Runs:
    """Runs in a directory of their own, of models that exist once a module."""

    models: Path
    output_dir: Path
    told: str = ""

    def config(self, **settings: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "student": str(self.models / "student"),
            "prompts": str(self.models / "prompts.jsonl"),
            "teacher_url": ["grpc://nowhere:1"],
            "output_dir": self.output_dir,
            "name": "run",
            "steps": 4,
            "learning_rate": 1e-3,
            "prompts_per_step": ROLLOUTS_A_STEP // 2,
            "rollouts_per_prompt": 2,
            "max_new_tokens": 8,
            "top_k": 16,
            "checkpoint_every": 2,
            "mixed_precision": "no",
            "device": "cpu",
        }
        return TrainConfig(**{**defaults, **settings})

    def train(self, teacher: FakeLocalTeacher | None = None, **settings: Any) -> int:
        text = io.StringIO()
        console = Console(file=text, width=300)
        teacher = teacher or FakeLocalTeacher(self.models / "teacher")
        try:
            return run_training(self.config(**settings), console=console, connect=lambda config, device: teacher)
        finally:
            self.told = text.getvalue()
            assert teacher.closed or "connecting to the teacher" not in self.told

    def directory(self, name: str = "run") -> RunDirectory:
        return RunDirectory(self.output_dir / name)

    def metrics(self, name: str = "run") -> list[dict[str, Any]]:
        """The rows without what a clock measured."""
        rows = read_rows(self.directory(name).metrics_file)
        return [{key: value for key, value in row.items() if key.rsplit("/")[-1] not in TIMES} for row in rows]

    def weights(self, name: str = "run") -> dict[str, torch.Tensor]:
        return load_file(self.directory(name).model / "model.safetensors")

    def checkpoints(self, name: str = "run") -> list[str]:
        return sorted(path.name for path in self.directory(name).checkpoints.iterdir())


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)
