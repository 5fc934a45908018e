"""Tool calls as models of the Hermes and Qwen families write them: <tool_call>{"name": ..., ...}</tool_call>.

What a student writes is text, and its environment reads it; this is for environments that want this form read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call. problem: why it cannot be carried out, in words for the model; empty: name and arguments are there."""

    name: str
    arguments: Mapping[str, Any]
    problem: str = ""


def parse_tool_calls(text: str) -> list[ToolCall]:
    """All calls in `text`, in order; what cannot be read is among them with its problem, never left out silently.

    A block that is not closed ends where the next one begins, or with the text. Calls in the model's reasoning, up to
    the last </think>, are not made.
    """
    return [_parse(block.strip()) for block in _BLOCK.findall(text.rpartition("</think>")[2])]


def _parse(block: str) -> ToolCall:
    try:
        value = json.loads(block)
    except json.JSONDecodeError as error:
        return ToolCall("", {}, f"the tool call is not JSON: {error.msg} at character {error.pos}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall("", {}, 'a tool call is an object {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some write them as JSON once more
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return ToolCall(value["name"], {}, "the arguments are text that is not JSON")
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], {}, "the arguments are not an object")
    return ToolCall(value["name"], arguments)
