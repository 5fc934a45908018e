"""The student as files that others load: the whole model with LoRA merged in, or LoRA's adapters beside their base.

H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from vopd_client.errors import ConfigError
from vopd_client.run_directory import fsync_directory
from vopd_client.sharding import gathered_adapters, gathered_state_dict
from vopd_client.student import LoadedStudent, StudentForTraining

ExportKind = Literal["merged", "adapter"]
ExportDtype = Literal["auto", "float32", "bfloat16"]

CARD_FILE = "README.md"
MAX_SHARD_SIZE = "5GB"  # of one file: a download that breaks off loses no more


def dtype_to_export(setting: ExportDtype, student: LoadedStudent) -> torch.dtype:
    """auto: as the student's own files, so that the result takes the room and runs at the speed of its base."""
    match setting:
        case "auto":
            return student.stored_dtype
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16


def weights_to_export(
    module: StudentForTraining, export: ExportKind, *, is_main_process: bool = True
) -> dict[str, Tensor]:
    """merged: plain transformers' names; adapter: PEFT's names in a state dict. In the module's own dtype.

    Every process of a run calls it, for each may hold a part of the weights; all but the main one get none.

    Raises: ConfigError for adapters of a student without any.
    """
    if export == "merged":
        return gathered_state_dict(module, is_main_process=is_main_process)
    if not isinstance(module.model, PeftModel):
        raise ConfigError("export adapter needs a student with LoRA (lora_rank above 0); this one has none")
    return gathered_adapters(module, is_main_process=is_main_process)


def write_model(
    module: StudentForTraining,
    tokenizer: Any,
    weights: Mapping[str, Tensor],
    directory: Path,
    *,
    export: ExportKind,
    dtype: torch.dtype,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes a directory that transformers and vLLM load, or PEFT and vLLM's LoRA.

    weights: what `weights_to_export` returned for the same `export`.

    The module's weights are not touched: merging in place and back would change them in the last bits.
    """
    if export == "merged":
        model = module.causal_lm
        _save_model(model, _in_dtype(model, weights, dtype), directory, dtype, max_shard_size)
    else:
        adapters = {name: tensor.to("cpu", dtype) for name, tensor in weights.items()}
        # Embeddings are never trained beside LoRA; "auto" would ask a hub about the base's.
        module.model.save_pretrained(directory, state_dict=adapters, save_embedding_layers=False)  # type: ignore[operator]
        (directory / CARD_FILE).unlink(missing_ok=True)  # PEFT's, an empty form
    tokenizer.save_pretrained(directory)


def save_student(
    module: StudentForTraining,
    tokenizer: Any,
    directory: Path,
    *,
    export: ExportKind = "merged",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes a directory that transformers and vLLM load: weights with LoRA merged in, configs, tokenizer, template.

    export: "adapter" writes LoRA's weights alone instead, which PEFT and vLLM load over the base model.
    dtype: of the weights in the files; the module keeps its own.

    Raises: ConfigError for adapters of a student without any.
    """
    weights = weights_to_export(module, export)
    write_model(module, tokenizer, weights, directory, export=export, dtype=dtype, max_shard_size=max_shard_size)


def write_export(
    student: LoadedStudent,
    weights: Mapping[str, Tensor],
    directory: Path,
    *,
    export: ExportKind,
    dtype: torch.dtype,
    card: str,
) -> None:
    """Writes model and card, complete or not at all; what `directory` held before goes once the new one is there."""
    temporary = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_model(student.module, student.tokenizer, weights, temporary, export=export, dtype=dtype)
    (temporary / CARD_FILE).write_text(card, encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    fsync_directory(directory.parent)


def _in_dtype(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """On the CPU. A weight that two layers share stays one tensor; buffers, which are constants, keep their dtype."""
    parameters = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    first_names: dict[int, str] = {}
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name not in parameters:
            converted[name] = tensor
            continue
        first = first_names.setdefault(id(parameters[name]), name)
        converted[name] = converted[first] if first != name else tensor.to("cpu", dtype)
    return converted


def _save_model(
    model: Any, weights: dict[str, Tensor], directory: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Weights, config and generation config.

    The last one as the base had it: saving refuses sampling options without do_sample, which transformers ignores and
    vLLM takes its defaults from.
    """
    generation_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(directory, state_dict=weights, max_shard_size=max_shard_size)
    finally:
        model.generation_config = generation_config
    generation_config.to_json_file(directory / GENERATION_CONFIG_NAME)
    config = copy.deepcopy(model.config)  # whose dtype is the module's
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype
    config.save_pretrained(directory)
