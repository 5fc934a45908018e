"""Tests that need the published TRL, which lives in an environment of its own: `make test-trl`.

Where TRL is not installed nothing here is collected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from teacher_process import RunningTeacher, start_teacher
from tiny_model import write_tiny_model

collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["test_*.py"]

# Every twelfth id ends a completion, so that completions have all lengths.
END_IDS = [257, *range(0, 256, 12)]
PROMPTS = ["The capital of France is", "Two", "A word for cold", "Once upon a time", "Red and blue make", "The sun"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            # What TRL and its dependencies warn of is not ours to be strict about.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output layer has rows that no token belongs to."""
    from transformers import GenerationConfig

    directory = write_tiny_model(tmp_path_factory.mktemp("student") / "student", seed=1, vocab_padding=5)
    generation = GenerationConfig.from_pretrained(directory)
    generation.eos_token_id = END_IDS
    generation.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "teacher", seed=2)


@pytest.fixture(scope="session")
def teacher(teacher_dir: Path) -> Iterator[RunningTeacher]:
    """For everything that does not harm it."""
    with start_teacher(teacher_dir, "--allow-full-vocab", env={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The arguments of a trainer of TRL's, model and teacher excepted. Keywords change its configuration."""
    from datasets import Dataset
    from trl import DistillationConfig

    def of(config_type: type[DistillationConfig] = DistillationConfig, **changes: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 16,
            "learning_rate": 1e-3,
        }
        return {
            "args": config_type(**{**defaults, **changes}),
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        }

    return of
