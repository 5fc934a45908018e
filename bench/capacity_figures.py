"""What others publish: peaks of GPUs and shapes of models. Nothing here was measured by us."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from capacity_gpu import Accelerator
from capacity_model import TeacherModel
from floors import ModelShape

ACCELERATORS: Mapping[str, Accelerator] = {
    "a100": Accelerator("A100 SXM 80 GB", 312e12, 80e9, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet"),
    "h100": Accelerator("H100 SXM 80 GB", 989e12, 80e9, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h200": Accelerator("H200 SXM 141 GB", 989e12, 141e9, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet"),
}

MODELS: Mapping[str, TeacherModel] = {
    "smollm2-135m": TeacherModel(
        ModelShape(
            num_layers=30,
            hidden_size=576,
            intermediate_size=1536,
            num_heads=9,
            num_key_value_heads=3,
            head_size=64,
            vocab_size=49_152,
        ),
        tied=True,
    ),
    "qwen3-8b": TeacherModel(
        ModelShape(
            num_layers=36,
            hidden_size=4096,
            intermediate_size=12_288,
            num_heads=32,
            num_key_value_heads=8,
            head_size=128,
            vocab_size=151_936,
        ),
        tied=False,
    ),
    "qwen3-32b": TeacherModel(
        ModelShape(
            num_layers=64,
            hidden_size=5120,
            intermediate_size=25_600,
            num_heads=64,
            num_key_value_heads=8,
            head_size=128,
            vocab_size=151_936,
        ),
        tied=False,
    ),
}


def model_of_config(config: Mapping[str, Any]) -> TeacherModel:
    """Of what a dense model's config.json holds.

    Raises: ValueError naming what it does not say; or for a mixture of experts.
    """
    if any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError("a mixture of experts multiplies a token with some of its weights: it is not modelled here")
    try:
        shape = ModelShape.of(SimpleNamespace(**config))
    except AttributeError as error:
        raise ValueError(f"the config does not say {error.name}") from error
    return TeacherModel(shape, tied=bool(config.get("tie_word_embeddings", False)))
