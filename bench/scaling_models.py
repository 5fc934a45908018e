"""Copies of a model that differ in one thing: rows of the vocabulary, or the longest context.

The weights are the model's own, cut or repeated: what they score is nonsense, how long that takes is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
VOCABULARY_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")  # [V, H]; the second only where it is untied


def model_config(model: Path) -> dict[str, Any]:
    """Raises: OSError."""
    config: dict[str, Any] = json.loads((model / CONFIG).read_text())
    return config


def with_vocabulary(model: Path, directory: Path, vocab_size: int) -> Path:
    """`model` with `vocab_size` rows in its embedding and output head, written to `directory`.

    Raises: OSError; KeyError for an architecture that names its embedding otherwise.
    """
    weights = load_file(model / WEIGHTS)
    weights[VOCABULARY_WEIGHTS[0]] = resized_rows(weights[VOCABULARY_WEIGHTS[0]], vocab_size)
    for name in VOCABULARY_WEIGHTS[1:]:
        if name in weights:
            weights[name] = resized_rows(weights[name], vocab_size)
    _copy(model, directory, model_config(model) | {"vocab_size": vocab_size})
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def with_longest_context(model: Path, directory: Path, num_tokens: int) -> Path:
    """`model` that takes sequences of `num_tokens`; its rotary positions go on beyond what it was trained for."""
    _copy(model, directory, model_config(model) | {"max_position_embeddings": num_tokens})
    (directory / WEIGHTS).symlink_to((model / WEIGHTS).resolve())
    return directory


def resized_rows(weight_VH: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The first `num_rows` rows; where there are fewer, from the first again."""
    return weight_VH[torch.arange(num_rows) % len(weight_VH)].contiguous()


def _copy(model: Path, directory: Path, config: dict[str, Any]) -> None:
    """Everything but the weights, which the caller adds."""
    directory.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != CONFIG:
            (directory / path.name).symlink_to(path.resolve())
    (directory / CONFIG).write_text(json.dumps(config, indent=2))
