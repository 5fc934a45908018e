"""Settings that give each of several teachers a value: `math=grpc://a:1,code=grpc://b:1,grpc://c:1`, or a mapping.

In a flag or a variable, commas separate values as in every other list; a part `name=value` begins the values of a
name, and a part without a name belongs to the one before it.

And JSON objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_settings import NoDecode

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_NAMED_PART = re.compile(r"\s*([^=/\s]*)\s*=(.*)", re.DOTALL)


def split_commas(value: object) -> object:
    """`a,b` is two addresses, in a flag as in a variable."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [part.strip() for item in value for part in str(item).split(",") if part.strip()]
    return value


def split_names(value: object) -> object:
    """The values of every name, as text; anything but text and mappings is left to the type.

    Raises: ValueError for a name that is given twice, and for a value before the first name.
    """
    if isinstance(value, Mapping):
        return {name: split_commas(item) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    values: dict[str, list[str]] = {}
    name = ""
    for part in value.split(","):
        if begins := _NAMED_PART.fullmatch(part):
            name, part = begins.groups()
            if name in values:
                raise ValueError(f"{name} is given twice; give all its values behind one {name}=, separated by commas")
            values[name] = []
        elif not values:
            raise ValueError(f"{part.strip()!r} has no name: write name=value")
        if part.strip():
            values[name].append(part.strip())
    return values


def check_names(values: dict[str, list[str]]) -> dict[str, list[str]]:
    """Raises: ValueError for what is no name, and for a name without a value."""
    for name, of_name in values.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name: a letter, then at most 31 letters, digits, - and _")
        if not of_name:
            raise ValueError(f"{name} has no value: write {name}=value")
    return values


NamedLists = Annotated[dict[str, list[str]], NoDecode, BeforeValidator(split_names), AfterValidator(check_names)]


def read_json_object(value: object) -> object:
    """A JSON object in a flag or a variable; a mapping of a file as it is. Raises: ValueError for other text."""
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at column {error.colno}: {error.msg}") from error
    if not isinstance(read, dict):
        raise ValueError(f"a JSON object, with names and values in braces, and not {value!r}")
    return read


JsonObject = Annotated[dict[str, Any], NoDecode, BeforeValidator(read_json_object)]
