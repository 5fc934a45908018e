"""Token ids as other protocols send them: a list, or a list of lists, in JSON."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import WithJsonSchema

from vopd_proto.arrays import IntArray
from vopd_server.compat.bodies import told
from vopd_server.errors import InvalidRequestError

_ID: dict[str, Any] = {"type": "integer", "minimum": 0}
_PROMPT: dict[str, Any] = {"type": "array", "items": _ID, "minItems": 2}

# Read by the functions below, which know the vocabulary and name the very entry that is wrong.
Prompt = Annotated[Any, WithJsonSchema(_PROMPT)]
Prompts = Annotated[Any, WithJsonSchema({"anyOf": [_PROMPT, {"type": "array", "items": _PROMPT, "minItems": 1}]})]


def prompts_of(field: str, value: Any, *, vocab_size: int) -> list[IntArray]:
    """A prompt, or several.

    Raises: InvalidRequestError for what is neither, and as `prompt_of`.
    """
    if is_batch(value):
        if not value:
            raise InvalidRequestError(field, "empty; send at least one prompt of token ids")
        return [prompt_of(f"{field}[{index}]", row, vocab_size=vocab_size) for index, row in enumerate(value)]
    return [prompt_of(field, value, vocab_size=vocab_size)]


def is_batch(value: Any) -> bool:
    """Whether `value` holds prompts, rather than the ids of one."""
    return isinstance(value, list) and (not value or isinstance(value[0], (list, str)))


def prompt_of(field: str, value: Any, *, vocab_size: int) -> IntArray:
    """[P] ids, P >= 2.

    Raises: InvalidRequestError for text, for what is no list of ids, for an id that there is none of, and for a prompt
        with nothing to score.
    """
    ids = ids_of(field, value, vocab_size=vocab_size)
    if len(ids) < 2:
        found = "one token" if len(ids) else "empty"
        raise InvalidRequestError(field, f"{found}; a token is scored given those before it: send at least two")
    return ids


def ids_of(field: str, value: Any, *, vocab_size: int, lowest: int = 0) -> IntArray:
    """[N] int64, every one in [lowest, vocab_size).

    Raises: InvalidRequestError.
    """
    if isinstance(value, str):
        raise InvalidRequestError(field, f"{told(value)}: text; this teacher reads token ids")
    if not isinstance(value, list):
        raise InvalidRequestError(field, f"{told(value)}: not a list of token ids")
    for position, token in enumerate(value):
        if type(token) is not int or not lowest <= token < vocab_size:  # `True` is an int, too
            raise InvalidRequestError(f"{field}[{position}]", f"{told(token)} is no id in [{lowest}, {vocab_size})")
    return np.asarray(value, np.int64)
