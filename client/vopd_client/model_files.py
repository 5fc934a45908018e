"""Model directories and hub ids: reading them with errors that name the path, and what is read off a model."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from vopd_client.errors import ConfigError

# What transformers raises for a path that is missing, damaged, of another kind, or needs code that is not there.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)

STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The authors' LoRA targets (docs/method.md).
LORA_TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


def load_causal_lm(path: str | Path, *, trust_remote_code: bool) -> Any:
    """A transformers causal LM in float32, complete: no weight is left at its random initial value.

    Raises: ConfigError naming the path.
    """
    _require_directory_where_one_is_meant(path)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except LOADING_ERRORS as exc:
        raise ConfigError(f"cannot load a causal language model from {path}: {_first_line(exc)}") from exc
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"{path} holds an adapter, not a model: merge it into its base model first (merge_and_unload)"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path} is not a complete {type(model).__name__}: {len(missing)} weights are missing, "
            f"the first is {missing[0]}"
        )
    return model


def load_tokenizer(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer beside a model.

    Raises: ConfigError naming the path.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as exc:
        raise ConfigError(f"cannot load a tokenizer from {path}: {_first_line(exc)}") from exc


def stored_dtype(path: str | Path, *, trust_remote_code: bool) -> torch.dtype:
    """The dtype of a model's files, float32, bfloat16 or float16: what its config says, else most of its weights.

    Anything else, a quantised model's say, counts as float32: what the weights are in here.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    configured = config.dtype or config.get_text_config().dtype
    if configured is not None:
        return STORED_DTYPES.get(str(configured).removeprefix("torch."), torch.float32)
    sizes: Counter[str] = Counter()
    if weights_file := _one_weights_file(path):
        with safe_open(weights_file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no mapping)
                entry = weights.get_slice(name)
                sizes[entry.get_dtype()] += math.prod(entry.get_shape())
    [(most_common, _)] = sizes.most_common(1) or [("F32", 0)]
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most_common, torch.float32)


def _one_weights_file(path: str | Path) -> str | None:
    """The safetensors file of a model that is on this disk by now, or the first of several; None for other formats."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        found: str | None = cached_file(path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if found and name.endswith(".json"):
            first = next(iter(json.loads(Path(found).read_text())["weight_map"].values()))
            found = str(Path(found).with_name(first))
        if found:
            return found
    return None


def read_card(path: str | Path) -> str:
    """The card of a model directory or of a hub's model; empty where there is none, or no hub to ask."""
    try:
        found = cached_file(path, "README.md", _raise_exceptions_for_missing_entries=False)
        return Path(found).read_text(encoding="utf-8", errors="replace") if found else ""
    except OSError:
        return ""


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(token_id for token_id in ids if token_id is not None)


def max_input_length(model: Any) -> int:
    """Tokens that the model takes, at most; sys.maxsize where its config sets no limit (state-space models)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if limit is None else int(limit)


def add_lora(model: Any, *, rank: int, alpha: float, dropout: float) -> Any:
    """`model` with LoRA on its attention and feed-forward projections, never on the output layer.

    Where no module has one of the usual names: on every linear layer but the output layer (PEFT's "all-linear").
    """
    present = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    keeps_weights_transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(LORA_TARGETS & present) or "all-linear",
        fan_in_fan_out=keeps_weights_transposed,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def without_peft_wrapper(model: nn.Module) -> Any:
    """The transformers model itself. PEFT puts its layers inside it; the wrapper adds nothing to a forward."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of `model` that carry LoRA, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def merged_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of `model` under the names that they have without LoRA, with LoRA's product added in.

    state: of them, a part of the state dict; None: all.
    """
    layers = lora_layers(model)
    merged: dict[str, Tensor] = {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        layer_name, wrapped, parameter_name = name.rpartition(".base_layer.")
        if not wrapped:
            if not any(name.startswith(f"{layer}.") for layer in layers):
                merged[name] = tensor
        elif parameter_name == "weight":
            layer = layers[layer_name]
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            merged[f"{layer_name}.weight"] = tensor + delta.to(tensor.dtype)
        else:
            merged[f"{layer_name}.{parameter_name}"] = tensor
    return merged


def _require_directory_where_one_is_meant(path: str | Path) -> None:
    """A hub would be asked for a mistyped path otherwise, and answer with something about repository names."""
    text = str(path)
    is_meant_as_path = isinstance(path, Path) or text.startswith(("/", "./", "../", "~")) or text.count("/") > 1
    if is_meant_as_path and not Path(text).is_dir():
        raise ConfigError(f"no model directory {text}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
