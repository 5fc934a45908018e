"""The output head as a safetensors file, for clients that finish hidden states; teacher.proto says its layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vopd_server.engines.head import OutputHead
from vopd_server.errors import ConfigError
from vopd_server.types import HeadFile

# What both a file and the wire have a type for: float64 hidden states would be rounded on the way.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LENGTH_BYTES = 8  # of the header, little-endian, at the start of the file


def head_directory() -> TemporaryDirectory[str]:
    """A directory that only this user can read. Raises: ConfigError where none can be made."""
    try:
        return TemporaryDirectory(prefix="vopd-head-")
    except OSError as error:
        raise ConfigError(f"no directory for the file of the output head: {error}") from error


def write_head_file(head: OutputHead, directory: Path, *, model_dtype: str) -> HeadFile:
    """Writes `head` into `directory`. The same weights make the same bytes.

    model_dtype: of the hidden states, "bfloat16" for instance; the head's must be the same.

    Raises: ConfigError for a head that is more than its weights, or whose weights are no plain floats; when the
        file cannot be written.
    """
    tensors = _plain_tensors(head.linear, model_dtype)
    metadata = {"logit_scale": repr(float(head.scale))}
    if head.softcap is not None:
        metadata["softcap"] = repr(float(head.softcap))
    path = directory / "head.safetensors"
    try:
        save_file(tensors, path, metadata)
        _sort_metadata(path)
        return HeadFile(path=path, sha256=_sha256(path), num_bytes=path.stat().st_size)
    except (OSError, SafetensorError) as error:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        raise ConfigError(f"the output head, {num_bytes} bytes, cannot be written to {directory}: {error}") from error


def _plain_tensors(linear: torch.nn.Module, model_dtype: str) -> dict[str, torch.Tensor]:
    """Weight [V, H] and, where there is one, bias [V]. Raises: ConfigError when `linear` is more than these."""
    if type(linear) is not torch.nn.Linear:
        raise _refusal(f"it is a {type(linear).__module__}.{type(linear).__qualname__}, not a torch.nn.Linear")
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        raise _refusal("hooks, or a forward of its own, have a part in its product")
    tensors = {name: parameter.data for name, parameter in linear.named_parameters(recurse=False)}
    for name, tensor in tensors.items():
        if type(tensor) is not torch.Tensor:  # what is quantised or sharded is a subclass
            raise _refusal(f"its {name} is a {type(tensor).__qualname__}, not a plain tensor")
        if tensor.is_meta:
            raise _refusal(f"its {name} is not in memory (device meta)")
        if tensor.dtype not in _DTYPES:
            raise _refusal(f"its {name} is {_name(tensor.dtype)}; {', '.join(map(_name, _DTYPES))} can be")
        if _name(tensor.dtype) != model_dtype:
            raise _refusal(f"its {name} is {_name(tensor.dtype)} in a model that is {model_dtype}")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"allow_full_vocab: the output head cannot be given away: {reason}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sort_metadata(path: Path) -> None:
    """Puts the metadata into the order of their names, in place: safetensors writes them in a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # As compact as safetensors writes it; a header may end with spaces.
        sorted_header = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(sorted_header) == length
        file.seek(_LENGTH_BYTES)
        file.write(sorted_header)


def _sha256(path: Path) -> str:
    """Of the whole file, of which a block at a time is in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
