"""The prompts of the benchmark's second task are what their generator says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from make_chain_sum import DIRECTORY, INSTRUCTION, solution
from objectives_plan import read_jsonl

QUESTION = re.compile(r"State the final answer to the following arithmetic problem: (\d \+ \d \+ \d) =")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [*read_jsonl(DIRECTORY / "train.jsonl"), *read_jsonl(DIRECTORY / "heldout.jsonl")]


def test_a_solution_takes_one_sum_after_the_other() -> None:
    assert solution("8 + 9 + 2") == "8 + 9 = 17, 17 + 2 = 19"


def test_no_question_is_asked_twice_or_solved_before(rows: list[dict[str, Any]]) -> None:
    asked = [row["teacher_messages"][-1]["content"] for row in rows]
    solved = {message["content"] for row in rows for message in row["teacher_messages"][:-1]}
    assert len(set(asked)) == len(asked) == 96 + 28
    assert not solved & set(asked)


def test_both_sides_are_asked_the_same_and_only_held_out_rows_have_answers(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        (message,) = row["messages"]
        question = row["teacher_messages"][-1]["content"]
        assert message["content"] == f"{question}\n{INSTRUCTION}"
        assert QUESTION.fullmatch(question)
    assert [row for row in rows if "answer" in row] == rows[96:]


def test_answers_and_examples_are_right(rows: list[dict[str, Any]]) -> None:
    solved = rows[0]["teacher_messages"][:-1]
    pairs = [(row["teacher_messages"][-1]["content"], row["answer"]) for row in rows[96:]]
    pairs += [(asked["content"], told["content"]) for asked, told in zip(solved[::2], solved[1::2], strict=True)]
    assert len(pairs) == 28 + 3
    for question, answer in pairs:
        a, b, c = (int(digit) for digit in re.findall(r"\d", question))
        assert answer == f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}"
