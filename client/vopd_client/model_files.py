"""Model directories and hub ids: reading them with errors that name the path, and what is read off a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from vopd_client.errors import ConfigError

# What transformers raises for a path that is missing, damaged, of another kind, or needs code that is not there.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)

# The authors' LoRA targets (docs/method.md).
LORA_TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})

# Options that a generation config ignores unless it samples.
SAMPLING_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


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
    _make_generation_config_saveable(model, path)
    return model


def load_tokenizer(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer beside a model.

    Raises: ConfigError naming the path.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as exc:
        raise ConfigError(f"cannot load a tokenizer from {path}: {_first_line(exc)}") from exc


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
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model` under the names that they have without LoRA, with LoRA's product added in."""
    layers = lora_layers(model)
    merged: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
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


def _make_generation_config_saveable(model: Any, path: str | Path) -> None:
    """Makes sure at the start of a run that its end can save the model: saving is stricter than loading.

    Sampling options without do_sample, which some models ship and transformers ignores, are dropped.
    """
    config = model.generation_config
    if config.do_sample is not True:
        for option in SAMPLING_OPTIONS:
            setattr(config, option, None)
    try:
        config.validate(strict=True)
    except ValueError as exc:
        raise ConfigError(f"the generation config of {path} cannot be saved again: {exc}") from exc


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
