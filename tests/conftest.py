"""Fixtures that every kind of test shares. No test reaches a model hub."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent


def pytest_collection_finish() -> None:
    """What all tests have imported, 700,000 objects, stays: collections of garbage need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that run in the test's own process set the level of our loggers, for good."""
    ours = logging.getLogger("vopd_server")
    level = ours.level
    yield
    ours.setLevel(level)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a 259-entry tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """SmolLM2-135M-Instruct; `make test` unpacks it before the tests start."""
    directory = Path(os.environ.get("VOPD_DEMO_MODEL", REPOSITORY / ".cache" / "smollm2-135m-instruct"))
    assert (directory / "config.json").exists(), f"no model in {directory}: run `make model`"
    return directory
