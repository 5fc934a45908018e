"""What a model's files say of it, without its weights: for `vopd-server check`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from vopd_server.answer_codec import pack_tokenizer
from vopd_server.engines.loading import own_length
from vopd_server.engines.tokenizer import tokenizer_info
from vopd_server.errors import ConfigError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """max_context_length: tokens, None where the config states none. table_bytes: of the answer to GetTokenizer.

    num_tokens, table_bytes: None for a hub model, whose tokenizer is not fetched.
    """

    model_type: str
    vocab_size: int
    max_context_length: int | None
    num_tokens: int | None = None
    table_bytes: int | None = None


class UnreachableError(Exception):
    """A hub that cannot be asked from here, and a model that is not in the cache: nothing is known of it."""


def read_directory(directory: Path, *, trust_remote_code: bool) -> ModelFiles:
    """Reads config and tokenizer, and looks for weights. Raises: ConfigError naming the file."""
    config = _model_config(directory / "config.json", str(directory), None, trust_remote_code)
    if not any(file for pattern in _WEIGHTS for file in directory.glob(pattern)):
        raise ConfigError(f"{directory} holds no weights ({', '.join(_WEIGHTS)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    # Every tokenizer has its own way to fail on a damaged file, down to a plain Exception from the Rust library.
    except Exception as error:
        raise ConfigError(f"cannot read the tokenizer in {directory}: {_first_line(error)}") from error
    table = tokenizer_info(tokenizer, None)
    return ModelFiles(
        config.model_type,
        config.vocab_size,
        own_length(config),
        num_tokens=len(table.tokens),
        table_bytes=pack_tokenizer(table).ByteSize(),
    )


def look_up(model: str, revision: str | None, *, trust_remote_code: bool) -> ModelFiles:
    """Reads the config of a hub model from the cache or the hub.

    Raises: ConfigError for a name or a revision that the hub does not have; UnreachableError.
    """
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every one of its attempts, twice
    try:
        path = cached_file(model, "config.json", revision=revision)
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, HFValidationError):
            raise ConfigError(f"model {model!r} is neither a directory nor a hub id") from error
        if isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError):
            raise ConfigError(f"the hub has no model {model!r} for us: {_first_line(error)}") from error
        if cause is None or isinstance(cause, HfHubHTTPError):
            raise ConfigError(f"the hub refuses {model!r}: {_first_line(error)}") from error
        raise UnreachableError(_first_line(error)) from error
    config = _model_config(Path(path), model, revision, trust_remote_code)
    return ModelFiles(config.model_type, config.vocab_size, own_length(config))


def _model_config(path: Path, model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The (text) config in the file `path` of `model`. Raises: ConfigError."""
    try:
        if not isinstance(json.loads(path.read_text()), dict):
            raise ConfigError(f"{path} holds no JSON object")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        text_config = config.get_text_config()
        if not isinstance(getattr(text_config, "vocab_size", None), int):
            raise ConfigError(f"{path}: {config.model_type} is no language model: it states no vocab_size")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or _first_line(error)}") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    return text_config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
