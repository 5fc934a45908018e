"""Writes bench/data/chain_sum/: the task of `make bench-objectives` that has steps to be taken.

    pip install -e '.[tasks]'; python bench/make_chain_sum.py

The questions are those of reasoning-gym's `chain_sum`, three numbers of one digit, additions only. The teacher sees
three solved examples that write the two partial sums, the student sees the question and a line that asks for them;
nobody trains on the answers. Right is a greedy completion of both sums and nothing else.

Why this task. Of the generators whose answers fit in 32 tokens, it is one that SmolLM2-135M-Instruct with solved
examples solves by way of an intermediate result, and neither always nor never; and at 20 tokens it is the shortest.
Right greedy completions of the model with solved examples; zero-shot, with a line that asks for the form, it has
none of any:

    chain_sum, 3 terms, +, two sums, 3 examples   23 of 48    (with 6: 21)    <- this one
    the same and "Answer: N" at the end           34 of 48    26 tokens, a third more time
    products of two digits                        23 of 32    100 questions in all, one token that counts
    letter_counting, 2-3 words                    24 of 32    "1" is right most of the time
    chain_sum, 2 terms                            15 of 32    132 questions, nothing in between
    needle_haystack, 3 statements                 14 of 32    copying
    syllogism                                     11 of 32    below a coin's
    chain_sum, 3 terms, + and -, sums             10 of 32
    number_sequence; simple_equations              4 of 32
    leg_counting; family_relationships             3 of 32
    chain_sum, 3 terms, the result alone           2 of 32
    word_sequence_reversal, 3 words                2 of 32
    spell_backward, 3 letters                      0 of 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "data" / "chain_sum"
SEED, DRAWN = 7, 1500  # of which some 290 are distinct and have no subtraction
NUM_SOLVED, NUM_HELD_OUT, NUM_TRAIN = 3, 28, 96
INSTRUCTION = "Write the two sums."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    train, held_out = rows(questions())
    for name, content in (("train", train), ("heldout", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def questions() -> list[tuple[str, str]]:
    """Distinct questions of additions only, each with its expression, in the order in which they were drawn."""
    import reasoning_gym  # type: ignore[import-untyped]  # here alone: its dependencies need a C compiler

    drawn = reasoning_gym.create_dataset(
        "chain_sum", size=DRAWN, seed=SEED, min_terms=3, max_terms=3, min_digits=1, max_digits=1
    )
    found: dict[str, str] = {}
    for item in drawn:
        expression = item["metadata"]["expression"]
        if "-" not in expression:
            assert solution(expression).endswith(f"= {item['answer']}")
            found.setdefault(item["question"], expression)
    return list(found.items())


def rows(asked: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and held-out rows; the first questions are the solved examples."""
    solved = [
        message
        for question, expression in asked[:NUM_SOLVED]
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": solution(expression)},
        )
    ]

    def prompt(question: str) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}],
            "teacher_messages": [*solved, {"role": "user", "content": question}],
        }

    end_of_held_out = NUM_SOLVED + NUM_HELD_OUT
    held_out = [
        prompt(question) | {"answer": solution(expression), "verifier": "exact"}
        for question, expression in asked[NUM_SOLVED:end_of_held_out]
    ]
    train = [prompt(question) for question, _ in asked[end_of_held_out : end_of_held_out + NUM_TRAIN]]
    return train, held_out


def solution(expression: str) -> str:
    """ "8 + 9 + 2" -> "8 + 9 = 17, 17 + 2 = 19"."""
    first, *others = (int(term) for term in expression.split(" + "))
    total, sums = first, []
    for term in others:
        sums.append(f"{total} + {term} = {total + term}")
        total += term
    return ", ".join(sums)


if __name__ == "__main__":
    main()
