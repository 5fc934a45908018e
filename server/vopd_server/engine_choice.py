"""From a name in the configuration to an engine. Only here does the server import what runs a model."""

from __future__ import annotations

from vopd_server.config import ServerConfig
from vopd_server.engines.base import Engine
from vopd_server.errors import ConfigError


def make_engine(config: ServerConfig) -> Engine:
    """The engine that `config` asks for, not yet started.

    Raises: ConfigError when what it needs is not installed.
    """
    match config.engine:
        case "auto" | "transformers":
            return _transformers_engine(config)


def _transformers_engine(config: ServerConfig) -> Engine:
    try:
        from vopd_server.engines.transformers import TransformersEngine
    except ModuleNotFoundError as error:
        raise ConfigError(f"engine transformers needs the package {error.name}: pip install 'vopd[server]'") from error
    return TransformersEngine(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_context_length=config.max_context_length,
        max_batch_tokens=config.max_batch_tokens,
        deterministic=config.deterministic,
        trust_remote_code=config.trust_remote_code,
    )
