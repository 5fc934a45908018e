"""Tool calls are read out of a student's text; what cannot be read says what is wrong with it."""

from __future__ import annotations

import pytest

from vopd_client.tool_calls import ToolCall, parse_tool_calls

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
ADD = ToolCall("add", {"a": 1, "b": [2]})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        (CALL, [ADD]),
        (f"first {CALL} then {CALL} and so on", [ADD, ADD]),
        (CALL.removesuffix("</tool_call>"), [ADD]),  # cut off by the end token
        (CALL.removesuffix("</tool_call>") + CALL, [ADD, ADD]),
        ('<tool_call>{"name": "now"}</tool_call>', [ToolCall("now", {})]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [ToolCall("add", {"a": 1})]),
        (f"<think>shall I {CALL}?</think>no", []),
        (f"<think>yes</think>{CALL}", [ADD]),
    ],
)
def test_every_call_is_read_in_order(text: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text) == calls


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("{", "the tool call is not JSON: Expecting property name enclosed in double quotes at character 1"),
        ("", "the tool call is not JSON: Expecting value at character 0"),
        ("[1]", 'a tool call is an object {"name": ..., "arguments": {...}}'),
        ('{"arguments": {}}', 'a tool call is an object {"name": ..., "arguments": {...}}'),
        ('{"name": "add", "arguments": [1]}', "the arguments are not an object"),
        ('{"name": "add", "arguments": "{"}', "the arguments are text that is not JSON"),
    ],
)
def test_a_call_that_cannot_be_read_is_there_with_its_problem(block: str, problem: str) -> None:
    [call] = parse_tool_calls(f"<tool_call>{block}</tool_call>")
    assert call.problem == problem
