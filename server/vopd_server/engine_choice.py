"""From a name in the configuration to an engine. Only here does the server import what runs a model."""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal

from vopd_server.config import ServerConfig, reasons_against_vllm
from vopd_server.engines.base import Engine
from vopd_server.errors import ConfigError

logger = logging.getLogger(__name__)


EngineName = Literal["transformers", "vllm"]


def choose_engine(config: ServerConfig) -> EngineName:
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


def check_installed(engine: EngineName) -> None:
    """Raises: ConfigError naming the package that `engine` lacks here."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine vllm needs the package vllm, in an environment of its own; on a CPU see deploy/vllm-env.sh"
        )
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"engine {engine} needs the package {package}: pip install 'vopd[server]'")


def make_engine(config: ServerConfig) -> Engine:
    """The engine that `config` asks for, not yet started.

    Raises: ConfigError when what it needs is not installed.
    """
    engine = choose_engine(config)
    check_installed(engine)
    match engine:
        case "transformers":
            return _transformers_engine(config)
        case "vllm":
            return _vllm_engine(config)


def _transformers_engine(config: ServerConfig) -> Engine:
    from vopd_server.engines.transformers import TransformersEngine

    return TransformersEngine(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_context_length=config.max_context_length,
        max_request_tokens=config.max_tokens_per_request,
        max_batch_tokens=config.max_batch_tokens,
        context_cache_tokens=config.context_cache_tokens,
        max_top_k=config.max_top_k,
        deterministic=config.deterministic,
        trust_remote_code=config.trust_remote_code,
        allow_full_vocab=config.allow_full_vocab,
    )


def _vllm_engine(config: ServerConfig) -> Engine:
    from vopd_server.engines.vllm import VllmEngine  # which imports vLLM itself when it starts

    return VllmEngine(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        max_context_length=config.max_context_length,
        max_request_tokens=config.max_tokens_per_request,
        max_top_k=config.max_top_k,
        engine_args=config.engine_args,
        trust_remote_code=config.trust_remote_code,
        hang_timeout_s=config.engine_hang_timeout_s,
    )
