"""The last box and the letter of a multiple-choice question, in the forms that models write them."""

from __future__ import annotations

import pytest

from vopd_client.extraction import choice_letter, last_boxed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and \boxed{ \frac{a}{b} }", r"\frac{a}{b}"),
        (r"\boxed {x_{1}}", "x_{1}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{see \boxed{3}}}", "3"),
        (r"\boxed{1}, cut off: \boxed{\frac{1}{", "1"),
        (r"\boxed{cut off", None),
        (r"\boxed{}", ""),
        ("no box {at} all", None),
        ("", None),
    ],
)
def test_the_last_complete_box_counts_with_the_braces_inside_it(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # boxes
        (r"Thus \boxed{C}.", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{(c)}", "C"),
        (r"\boxed{\mathrm{(B)}}", "B"),
        (r"\boxed{\textbf{(D)}\ 12}", "D"),
        (r"\boxed{C) 3 eV}", "C"),
        (r"\boxed{C. 3 eV}", "C"),
        (r"\boxed{A} or rather \boxed{B}", "B"),
        (r"The answer is A: \boxed{B}", "B"),
        (r"\boxed{12}. The answer is B.", "B"),
        (r"\boxed{Ca}", None),
        (r"\boxed{A\ldots}", None),
        # statements
        ("The answer is (C).", "C"),
        ("the answer is C because it is heavier", "C"),
        ("The answer is [d]", "D"),
        ("The answer is option C", "C"),
        ("The answer is:\n\n(C) 3 eV", "C"),
        ("The final answer is: $\\text{(C)}$", "C"),
        ("The correct option is **B**", "B"),
        ("Answer: D", "D"),
        ("**Answer:** D", "D"),
        ("**Answer: D**", "D"),
        ("Answer: $C$", "C"),
        ("answer = J", "J"),
        ('{"answer": "C"}', "C"),
        ("{'answer': 'c'}", "C"),
        ("<answer> B </answer>", "B"),
        ("Is the answer is A? No, the answer is B.", "B"),
        ("the answer is not C", None),
        ("The answer is a matter of taste", None),
        ("The answer is A's", None),
        ("final answer: Carbon", None),
        ("The answer is K", None),
        # a line of its own
        ("C", "C"),
        ("(C)", "C"),
        ("We think\n\n**C**\n", "C"),
        ("C\nis what we take", None),
        ("A proton is heavier", None),
        # thoughts
        ("<think>the answer is A</think> I say: the answer is D", "D"),
        ("<think>the answer is A</think> I do not know", None),
        ("", None),
    ],
)
def test_the_letter_that_a_completion_settles_on(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter
