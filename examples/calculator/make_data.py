"""Writes train.jsonl beside this file: `python examples/calculator/make_data.py`.

Both sides are told how to call the calculator. The student sees one solved example before the question, without which
a small model hardly ever calls; the teacher sees three.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NUM_ROWS = 32
SYSTEM = (
    'Work out sums with the calculator. To call it, write only <tool_call>{"name": "calculator", "arguments": '
    '{"expression": "2 * (3 + 4)"}}</tool_call>. When you have its result, write only the answer.'
)
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'


def rows() -> list[dict[str, object]]:
    draw = random.Random(0)
    return [_row(draw.randint(12, 99), draw.randint(12, 99), draw.randint(2, 9)) for _ in range(NUM_ROWS)]


def _row(price: int, fee: int, number: int) -> dict[str, object]:
    system = {"role": "system", "content": SYSTEM}
    solved = [message for example in ((20, 15, 3), (34, 12, 5), (11, 40, 7)) for message in _solved(*example)]
    asked = {"role": "user", "content": _question(price, fee, number)}
    return {
        "messages": [system, *solved[:4], asked],
        "teacher_messages": [system, *solved, asked],
        "answer": str(number * price + fee),
        "verifier": "contains",
    }


def _solved(price: int, fee: int, number: int) -> list[dict[str, str]]:
    result = str(number * price + fee)
    return [
        {"role": "user", "content": _question(price, fee, number)},
        {"role": "assistant", "content": CALL % f"{number} * {price} + {fee}"},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": result},
    ]


def _question(price: int, fee: int, number: int) -> str:
    return f"{number} tickets cost {price} euros each, and the order costs {fee} euros more. How many euros?"


if __name__ == "__main__":
    path = Path(__file__).with_name("train.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
