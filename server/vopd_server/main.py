"""`vopd-server`: the composition root. Nothing but this reads arguments or builds an engine."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence

from vopd_server.check import check
from vopd_server.config import ServerConfig
from vopd_server.engine_choice import make_engine
from vopd_server.errors import TeacherError
from vopd_server.keys_command import run_keys
from vopd_server.lifecycle import serve
from vopd_server.logs import configure_logging
from vopd_server.version import SERVER_VERSION
from vopd_settings import SettingsError, load_settings

ENV_PREFIX = "VOPD_SERVER_"
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. What is wrong with the settings or the model is one line on stderr."""
    parser = argparse.ArgumentParser(prog="vopd-server", description="The teacher of on-policy distillation.")
    parser.add_argument("--version", action="version", version=SERVER_VERSION)
    commands = "; ".join(f"{name}: {about}" for name, (about, _) in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, help=commands)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the command; see vopd-server COMMAND --help")
    arguments = parser.parse_args(argv)
    _, run = COMMANDS[arguments.command]
    try:
        return run(arguments.flags)
    except (SettingsError, TeacherError) as error:
        sys.stderr.write(f"vopd-server: {error}\n")
        return USAGE_ERROR


def run_serve(flags: Sequence[str]) -> int:
    """Serves one model until a signal. Raises: SettingsError, ConfigError, and what the engine raises."""
    config = _settings("serve", flags, "Serves one teacher model over gRPC and HTTP until SIGTERM or SIGINT.")
    configure_logging(config.log_level, config.log_format)
    return asyncio.run(serve(config, make_engine(config), announce=_print_line))


def run_check(flags: Sequence[str]) -> int:
    """Says what `serve` would do with the same settings. Raises: SettingsError."""
    config = _settings("check", flags, "Checks what `serve` would be started with, without loading the model.")
    configure_logging("error", config.log_format)  # what would be warned of is in the summary
    report = check(config)
    for problem in report.problems:
        sys.stderr.write(f"vopd-server: {problem}\n")
    if report.problems:
        return USAGE_ERROR
    _print_line(report.summary())
    return 0


def _settings(command: str, flags: Sequence[str], description: str) -> ServerConfig:
    return load_settings(
        ServerConfig, flags, prog=f"vopd-server {command}", env_prefix=ENV_PREFIX, description=description
    )


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "serve": ("score students' completions over gRPC and HTTP", run_serve),
    "check": ("tell whether serve would start with the same settings", run_check),
    "keys": ("create, list and revoke API keys", run_keys),
}


if __name__ == "__main__":
    sys.exit(main())
