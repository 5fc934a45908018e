"""`vopd-server check`: would `serve` start with this configuration? Nothing is loaded, bound or changed.

Settings are checked by `ServerConfig` before anything here. What only the device can tell (whether weights, KV cache
and the largest forward fit its memory) is found out by `serve`, before it says that it is ready.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vopd_server.config import ServerConfig
from vopd_server.engine_choice import EngineName, check_installed, choose_engine
from vopd_server.engines.vllm_arguments import check_engine_args
from vopd_server.errors import ConfigError
from vopd_server.golden_record import check_golden_file
from vopd_server.key_ring import FIRST_TENANT_ID
from vopd_server.key_storage import read_key_file
from vopd_server.lifecycle import check_tenants, tls_files

if TYPE_CHECKING:
    from vopd_server.engines.model_files import ModelFiles

Facts = list[tuple[str, str]]  # label and text

LABEL_WIDTH = 11


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, for a reader, and what `serve` would refuse, a line each."""

    facts: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]

    def summary(self) -> str:
        return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in self.facts)


def check(config: ServerConfig) -> Report:
    """Looks at everything that can be looked at, whatever else is wrong. Imports torch for the model alone."""
    facts: Facts = []
    problems: list[str] = []
    looks: tuple[Callable[[ServerConfig], Facts], ...] = (
        look_at_engine,
        look_at_engine_args,
        look_at_tls,
        look_at_keys,
        look_at_golden_file,
        look_at_model,
        look_at_device,
        look_at_ports,
    )
    for look in looks:
        try:
            facts += look(config)
        except ConfigError as error:
            problems.append(" ".join(str(error).split()))
    return Report(tuple(facts), tuple(problems))


def look_at_engine(config: ServerConfig) -> Facts:
    """Which engine it would be. Raises: ConfigError when it is not installed."""
    engine = choose_engine(config)
    check_installed(engine)
    facts = [("engine", f"{engine} (chosen by auto)" if config.engine == "auto" else engine)]
    return [*facts, ("gives away", "the model's output head, and hidden states")] if config.allow_full_vocab else facts


def look_at_engine_args(config: ServerConfig) -> Facts:
    """Names of vLLM's arguments, where there is a vLLM to ask. Raises: ConfigError for one that cannot be set."""
    if not config.engine_args:
        return []
    if importlib.util.find_spec("vllm") is None:
        check_engine_args(config.engine_args, known=config.engine_args)  # those that are never passed through
        return [("arguments", f"{', '.join(config.engine_args)} (not compared with vLLM's, which is not installed)")]
    from vllm.engine.arg_utils import AsyncEngineArgs

    check_engine_args(config.engine_args, known={field.name for field in dataclasses.fields(AsyncEngineArgs)})
    return [("arguments", ", ".join(f"{name}={value!r}" for name, value in config.engine_args.items()))]


def look_at_tls(config: ServerConfig) -> Facts:
    """Raises: ConfigError when a file cannot be read, or certificate and key are no pair."""
    files = tls_files(config)
    return [("TLS", "off" if files is None else f"on, certificate {files.cert}")]


def look_at_keys(config: ServerConfig) -> Facts:
    """Raises: ConfigError when the file cannot be read, or could not be created."""
    path = config.keys_file
    if path is None:
        return [("keys", "none: one open tenant")]
    if config.create_keys_file and not path.exists():
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"keys file {path}: cannot be created, {path.parent} is missing or not ours to write")
        return [("keys", f"{path}: serve creates it, with a key for the tenant {FIRST_TENANT_ID}")]
    file = read_key_file(path)
    check_tenants(config, [key.tenant for key in file.active])
    return [("keys", f"{path}: {file.summary}")]


def look_at_golden_file(config: ServerConfig) -> Facts:
    """Raises: ConfigError for a file that is broken or cannot be written."""
    if config.golden_file is None:
        return [("probe", "the golden sequence with itself; nothing is kept for later starts")]
    check_golden_file(config.golden_file)
    return [("probe", f"the golden sequence with itself, and with earlier starts in {config.golden_file}")]


def look_at_model(config: ServerConfig) -> Facts:
    """Raises: ConfigError when there is no such model, or its files or numbers cannot be served."""
    looks_like_a_path = config.model.startswith(("/", ".", "~")) or Path(config.model).exists()
    if looks_like_a_path and not Path(config.model).is_dir():
        raise ConfigError(f"model {config.model}: no such directory")
    try:
        from vopd_server.engines.model_files import UnreachableError, look_up, read_directory
    except ModuleNotFoundError as error:
        return [("model", f"{config.model} (not looked at: the package {error.name} is not installed)")]
    if looks_like_a_path:
        files = read_directory(Path(config.model), trust_remote_code=config.trust_remote_code)
    else:
        try:
            files = look_up(config.model, config.revision, trust_remote_code=config.trust_remote_code)
        except UnreachableError:
            return [("model", f"{config.model}: not in the cache, and no hub can be reached from here: not checked")]
    return facts_of_model(config, files)


def facts_of_model(config: ServerConfig, files: ModelFiles) -> Facts:
    """Raises: ConfigError when the model's numbers and the settings do not go together."""
    facts = [
        ("model", f"{config.model} ({files.model_type})"),
        ("vocabulary", f"{files.vocab_size} ids"),
        ("sequences", sequence_length(config, files.max_context_length)),
    ]
    if files.table_bytes is None:
        return [*facts, ("tokenizer", "not fetched")]
    if files.table_bytes > config.max_message_bytes:
        raise ConfigError(
            f"max_message_bytes {config.max_message_bytes} < {files.table_bytes}, the tokenizer's table, "
            "which every client may ask for"
        )
    return [*facts, ("tokenizer", f"{files.num_tokens} tokens, {files.table_bytes} bytes as a message")]


def sequence_length(config: ServerConfig, own: int | None) -> str:
    """The longest sequence that will be admitted, and what bounds it. own: the model's own length.

    Raises: ConfigError when nothing does.
    """
    bounds = [(config.max_tokens_per_request, "max_tokens_per_request")]
    if own is not None and _engine_or_vllm(config) == "vllm":
        bounds.append((own - 1, "the model's own, less the token that vLLM generates"))
    elif own is not None:
        bounds.append((own, "the model's own"))
    if config.max_context_length is not None:
        bounds.append((config.max_context_length, "max_context_length"))
    elif own is None:
        raise ConfigError("the model's config states no maximum length: set max_context_length")
    length, bound = min(bounds)
    return f"up to {length} tokens ({bound})"


def look_at_device(config: ServerConfig) -> Facts:
    """Raises: ConfigError for a device that this machine does not have."""
    memory = ("memory", "found out by serve, which refuses what does not fit")
    if (
        _engine_or_vllm(config) == "vllm"
        or importlib.util.find_spec("torch") is None
        or importlib.util.find_spec("transformers") is None
    ):
        return [memory]
    from vopd_server.engines.loading import choose_device

    return [("device", str(choose_device(config.device))), memory]


def look_at_ports(config: ServerConfig) -> Facts:
    """Where it would listen; whether the ports are free is not tried."""
    ports = (("gRPC", config.host, config.port), ("HTTP", config.host, config.http_port))
    named = [*ports, ("admin", config.admin_host, config.admin_port)]
    return [("listens", ", ".join(f"{name} {host}:{port}" for name, host, port in named if port is not None))]


def _engine_or_vllm(config: ServerConfig) -> EngineName:
    """The engine; vllm where arguments for it rule out every other and it is not there."""
    try:
        return choose_engine(config)
    except ConfigError:
        return "vllm"
