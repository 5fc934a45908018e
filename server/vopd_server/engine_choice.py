"""From a name in the configuration to an engine. Only here does the server import what runs a model."""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal

from vopd_server.config import ServerConfig, reasons_against_vllm
from vopd_server.engines.base import Engine
from vopd_server.errors import ConfigError

logger = logging.getLogger(__name__)


def choose_engine(config: ServerConfig) -> Literal["transformers", "vllm"]:
    """The engine that `config` names; for auto vLLM where it is installed and can do what is asked for.

    Raises: ConfigError when there are arguments for vLLM and no vLLM.
    """
    if config.engine != "auto":
        return config.engine
    reasons = reasons_against_vllm(config)
    if importlib.util.find_spec("vllm") is None:
        if config.engine_args:
            raise ConfigError("engine_args are vLLM's, which is not installed here")
        return "transformers"
    if reasons:
        logger.info("engine auto is transformers, since vllm %s", reasons[0])
        return "transformers"
    return "vllm"


def make_engine(config: ServerConfig) -> Engine:
    """The engine that `config` asks for, not yet started.

    Raises: ConfigError when what it needs is not installed.
    """
    match choose_engine(config):
        case "transformers":
            return _transformers_engine(config)
        case "vllm":
            return _vllm_engine(config)


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


def _vllm_engine(config: ServerConfig) -> Engine:
    from vopd_server.engines.vllm import VllmEngine  # which imports vLLM itself when it starts

    return VllmEngine(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        max_context_length=config.max_context_length,
        max_top_k=config.max_top_k,
        engine_args=config.engine_args,
        trust_remote_code=config.trust_remote_code,
        hang_timeout_s=config.engine_hang_timeout_s,
    )
