"""One pydantic model, three ways to set it: flags, environment variables, a YAML file.

A field `top_k` is the flag --top-k, the variable PREFIX_TOP_K and the file key top_k. Flags win over the
environment, the environment over the file, the file over the default. Names that do not exist are errors
that suggest the nearest one that does, wherever they stand.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as LibrarySettingsError

S = TypeVar("S", bound=BaseModel)


class SettingsError(ValueError):
    """A setting that is unknown or wrong; the message is ready to print."""


def load_settings(
    settings_type: type[S],
    argv: Sequence[str],
    *,
    prog: str,
    env_prefix: str,
    description: str = "",
    other_settings: Iterable[type[BaseModel]] = (),
) -> S:
    """Reads `settings_type` from flags, environment and the file named by --config, in this order of priority.

    Args:
        argv: the flags alone, without program and subcommand. `--help` prints and exits.
        env_prefix: of every environment variable, for instance "VOPD_CLIENT_".
        other_settings: further models that share the prefix; their variables may be set and are not ours.

    Raises: SettingsError, listing everything that is wrong and where it was set.
    """
    file_path = _config_path(argv, env_prefix)
    from_file = _read_file(file_path, settings_type) if file_path else {}
    _check_environment(settings_type, env_prefix, other_settings)
    loader = _loader_type(settings_type, argv, from_file, prog=prog, env_prefix=env_prefix, description=description)
    try:
        loaded = loader()
    except LibrarySettingsError as error:
        raise SettingsError(_explain_flags(_complaint(error), settings_type)) from error
    except ValidationError as error:
        raise SettingsError(_explain_values(error, argv, from_file, file_path, env_prefix)) from error
    return settings_type.model_validate({name: getattr(loaded, name) for name in settings_type.model_fields})


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print the whole usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise LibrarySettingsError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """Wide enough for our descriptions, which say themselves what "no value" means."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        for no_value in ("(default: None)", "(default factory: list)", "(default factory: dict)"):
            text = text.removesuffix(f" {no_value}")
        return text


def _loader_type(
    settings_type: type[BaseModel],
    argv: Sequence[str],
    from_file: Mapping[str, Any],
    *,
    prog: str,
    env_prefix: str,
    description: str,
) -> type[BaseSettings]:
    """`settings_type` as a pydantic-settings class, with --config beside its own fields."""

    class Loader(settings_type, BaseSettings):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(
            env_prefix=env_prefix,
            extra="forbid",
            cli_prog_name=prog,
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_parse_none_str="None",
            env_parse_none_str="None",
        )

        config: Path | None = Field(None, description="YAML file with any of these settings.")

        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], **_standard: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            parser = _Parser(
                prog=prog,
                usage=f"{prog} [--config FILE] [--some-setting VALUE ...]",
                description=description,
                epilog="Each setting is also a key of the --config file (some_setting) and an environment variable "
                f"({env_prefix}SOME_SETTING). Flags win over the environment, the environment over the file.",
                formatter_class=_HelpFormatter,
                allow_abbrev=False,
            )
            flags: CliSettingsSource[Any] = CliSettingsSource(
                settings_cls, cli_parse_args=list(argv), root_parser=parser, formatter_class=_HelpFormatter
            )
            file = InitSettingsSource(settings_cls, init_kwargs=dict(from_file))
            return flags, EnvSettingsSource(settings_cls), file

    Loader.__doc__ = description
    return Loader


def _config_path(argv: Sequence[str], env_prefix: str) -> Path | None:
    """Where --config or PREFIX_CONFIG points, before anything else is parsed."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get(f"{env_prefix}CONFIG"))
    try:
        path = parser.parse_known_args(list(argv))[0].config
    except LibrarySettingsError as error:
        raise SettingsError(_complaint(error)) from error
    return Path(path) if path else None


def _read_file(path: Path, settings_type: type[BaseModel]) -> dict[str, Any]:
    """The keys of a YAML file, all of which exist."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: holds a {type(content).__name__}; it must hold keys and values")
    unknown = [str(key) for key in content if key not in settings_type.model_fields]
    if unknown:
        raise SettingsError("\n".join(f"{path}: {_unknown('key', key, settings_type.model_fields)}" for key in unknown))
    return content


def _check_environment(
    settings_type: type[BaseModel], env_prefix: str, other_settings: Iterable[type[BaseModel]]
) -> None:
    """Refuses a variable with our prefix that no settings of ours know."""
    known = {"config"}.union(*(model.model_fields for model in (settings_type, *other_settings)))
    names = {f"{env_prefix}{name.upper()}" for name in known}
    unknown = sorted(name for name in os.environ if name.startswith(env_prefix) and name not in names)
    if unknown:
        raise SettingsError("\n".join(_unknown("environment variable", name, names) for name in unknown))


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`unknown key 'topk'; did you mean 'top_k'?`"""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"unknown {what} {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _complaint(error: LibrarySettingsError) -> str:
    """`argument --steps: expected one argument` without the words that name the parser."""
    return str(error).removeprefix("error parsing CLI: ").removeprefix("argument ")


def _explain_flags(message: str, settings_type: type[BaseModel]) -> str:
    """Turns the parser's complaint into ours where it is about names."""
    _, found, rest = message.partition("unrecognized arguments: ")
    if not found:
        return message
    words = [word.split("=")[0] for word in rest.split() if word.startswith("-")] or [rest.split()[0]]
    known = [_flag(name) for name in (*settings_type.model_fields, "config", "help")]
    return "\n".join(_unknown("flag" if word.startswith("-") else "argument", word, known) for word in words)


def _explain_values(
    error: ValidationError,
    argv: Sequence[str],
    from_file: Mapping[str, Any],
    file_path: Path | None,
    env_prefix: str,
) -> str:
    """One line a wrong value: where it was set, what is wrong with it."""
    given_flags = {word.split("=")[0] for word in argv}
    lines = []
    for detail in error.errors():
        problem = detail["msg"].removeprefix("Value error, ")
        if not detail["loc"]:
            lines.append(problem)
            continue
        field = str(detail["loc"][0])
        variable = f"{env_prefix}{field.upper()}"
        if detail["type"] == "missing":
            lines.append(f"{_flag(field)} is required (or {field} in the --config file, or {variable})")
            continue
        if _flag(field) in given_flags:
            origin = _flag(field)
        elif variable in os.environ:
            origin = variable
        elif field in from_file:
            origin = f"{file_path}: {field}"
        else:
            origin = field
        lines.append(f"{origin}: {problem[0].lower()}{problem[1:]} (got {detail['input']!r})")
    return "\n".join(lines)
