"""Weights, tokenizer, device and the revision that names them; every failure is a ConfigError."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from vopd_server.errors import ConfigError

logger = logging.getLogger(__name__)

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SAMPLED_BLOCKS = 256  # a file, besides its first block
_BLOCK_BYTES = 4096
_LENGTH_ATTRIBUTES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A causal LM in evaluation mode on its device."""

    model: Any
    tokenizer: Any
    device: torch.device
    revision: str
    max_context_length: int


def load_model(
    model: str,
    *,
    revision: str | None,
    dtype: DtypeName,
    device: torch.device,
    max_context_length: int | None,
    trust_remote_code: bool,
) -> LoadedModel:
    """Loads a model directory or a hub model.

    dtype: "auto" is the checkpoint's own.
    max_context_length: tokens; the model's own limit where it is lower or this is None.

    Raises: ConfigError when there is no such model, its files are damaged, its code would have to be trusted,
        it does not fit the device, or nothing says how long its contexts may be.
    """
    if not sys.stderr.isatty():  # a progress bar is hundreds of lines of a log file
        transformers_logging.disable_progress_bar()
    try:
        # The commit is resolved once and pins every later read, so that weights and tokenizer are of one revision.
        config_path = cached_file(model, "config.json", revision=revision)
        commit = None if Path(model).is_dir() else extract_commit_hash(config_path, None)
        options = {"revision": commit or revision, "trust_remote_code": trust_remote_code}
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
        )
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        loaded.to(device).eval()
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"cannot load the model {model!r}: {error}") from error
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        device=device,
        revision=commit or directory_revision(Path(model)),
        max_context_length=_bounded_length(max_context_length, loaded.config.get_text_config()),
    )


def choose_device(name: str | None) -> torch.device:
    """The named device, or the accelerator there is, or the CPU.

    Raises: ConfigError for a device that this machine does not have.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not a device: {error}") from error
    num_devices = torch.accelerator.device_count() if accelerator is not None else 0
    is_here = accelerator is not None and device.type == accelerator.type and (device.index or 0) < num_devices
    if device.type != "cpu" and not is_here:
        here = f"cpu and {num_devices} x {accelerator.type}" if accelerator is not None else "cpu only"
        raise ConfigError(f"device {name!r} is not on this machine, which has {here}")
    return device


def directory_revision(directory: Path) -> str:
    """A name for the weights in a directory: "local-" and 16 hex digits.

    A hash over config.json and, for every weights file, its name, its size, its first block (the header of a
    safetensors file) and 256 blocks spread evenly over it. It reads a megabyte a file whatever the file's
    size, is the same for copies of one model on several replicas, and differs after any training that
    moves weights all over the model; it is not proof against someone who alters single weights on purpose.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in directory.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    for path in [directory / "config.json", *files]:
        size_bytes = path.stat().st_size
        digest.update(f"{path.name}\0{size_bytes}\0".encode())
        with path.open("rb") as file:
            for offset in _block_offsets(size_bytes):
                file.seek(offset)
                digest.update(file.read(_BLOCK_BYTES))
    return f"local-{digest.hexdigest()[:16]}"


def _block_offsets(size_bytes: int) -> Iterable[int]:
    stride = max(_BLOCK_BYTES, size_bytes // _SAMPLED_BLOCKS)
    return range(0, size_bytes, stride)


def own_length(config: Any) -> int | None:
    """Tokens of the longest sequence that a model's (text) config states; None: it states none."""
    lengths = (getattr(config, name, None) for name in _LENGTH_ATTRIBUTES)
    return next((length for length in lengths if isinstance(length, int)), None)


def _bounded_length(asked_for: int | None, config: Any) -> int:
    own = own_length(config)
    if own is None and asked_for is None:
        raise ConfigError(f"the {config.model_type} config states no maximum length: set max_context_length")
    if own is None or asked_for is None:
        return asked_for or own or 0
    if asked_for > own:
        logger.warning("max_context_length %d is bounded by the model's own %d", asked_for, own)
    return min(asked_for, own)
