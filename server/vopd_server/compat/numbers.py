"""Numbers and objects as JSON text: answers of millions of numbers are put together from pieces.

One `json.dumps` over all of it would hold the interpreter's lock, and with it the event loop, for seconds.
"""

from __future__ import annotations

import json
import math
from typing import Any

from vopd_server.http_json import FLOAT32_DIGITS

# What vLLM sends for minus infinity, which JSON has no number for.
LEAST_LOGPROB = "-9999.0"


def number(value: float) -> str:
    """The shortest usual decimal that reads back as the same float32, and as no integer."""
    if value == -math.inf:
        return LEAST_LOGPROB
    text = f"{value:.{FLOAT32_DIGITS}g}"
    return text if "." in text or "e" in text else f"{text}.0"


def json_object(fields: dict[str, Any], **written: str) -> str:
    """An object of `fields`, and behind them those whose JSON is written already."""
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    parts += [f'"{name}": {text}' for name, text in written.items()]
    return "{" + ", ".join(parts) + "}"
