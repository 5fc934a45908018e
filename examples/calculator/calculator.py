"""A calculator that a student calls between its turns, as <tool_call>{"name": "calculator", ...}</tool_call>.

The demo's model has a chat template without a list of tools, so the rows' system messages say how to call it. For a
model whose template lists tools take `CalculatorWithSchema`, and leave the explanation out of the rows.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

from vopd_client.environment import Conversation
from vopd_client.prompt_rows import Message
from vopd_client.tool_calls import ToolCall, parse_tool_calls

MAX_CHARACTERS = 200  # of an expression
_OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


class Calculator:
    """Replies to every turn that calls it; a turn without a call is the student's answer, and the end."""

    def reply(self, conversation: Conversation) -> Sequence[Message]:
        return [{"role": "tool", "content": answer(call)} for call in parse_tool_calls(conversation.text)]


class CalculatorWithSchema(Calculator):
    tools = (
        {
            "type": "function",
            "function": {
                "name": "calculator",
                "description": "Works out an arithmetic expression of numbers, + - * / and parentheses.",
                "parameters": {
                    "type": "object",
                    "properties": {"expression": {"type": "string"}},
                    "required": ["expression"],
                },
            },
        },
    )


def answer(call: ToolCall) -> str:
    """What the student reads: a number, or what is wrong with its call."""
    if call.problem:
        return f"error: {call.problem}"
    if call.name != "calculator":
        return f"error: there is no tool {call.name!r}, only calculator"
    expression = call.arguments.get("expression")
    if not isinstance(expression, str) or len(expression) > MAX_CHARACTERS:
        return f"error: expression is a text of at most {MAX_CHARACTERS} characters"
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (ArithmeticError, SyntaxError, ValueError) as error:
        return f"error: {error}"
    return f"{value:.10g}"


def _evaluate(node: Any) -> float:
    """Numbers and the four operations, in floating point: nothing here grows without bound or runs other code."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return float(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluate(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluate(left), _evaluate(right))
    raise ValueError("only numbers, + - * / and parentheses")
