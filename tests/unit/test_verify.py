"""Each verifier accepts what it should and refuses what comes close."""

from __future__ import annotations

import threading

import pytest

from vopd_client.config import Verifier
from vopd_client.verify import check_answer, matches


@pytest.mark.parametrize(
    ("completion", "answer", "verifier", "expected"),
    [
        ("Answer: Paris", "Answer: Paris", "exact", True),
        ("  Answer:\n Paris \n", "Answer: Paris", "exact", True),
        ("Answer: paris", "Answer: Paris", "exact", False),
        ("Answer: Paris.", "Answer: Paris", "exact", False),
        ("", "Answer: Paris", "exact", False),
        ("Bogota\u0301", "Bogot\u00e1", "exact", True),
        ("The capital is  Addis\nAbaba, of course", "Addis Ababa", "contains", True),
        ("The capital is Addis", "Addis Ababa", "contains", False),
        ("it is 42 apples", r"\b42\b", "regex", True),
        ("it is 421 apples", r"\b42\b", "regex", False),
        (" 42 \n", r"^42$", "regex", True),
        ("x 42", r"^42$", "regex", False),
        (r"So the answer is \boxed{0.5}.", r"\frac{1}{2}", "math", True),
        (r"So the answer is $\frac{2}{4}$.", "1/2", "math", True),
        (r"So the answer is \boxed{0.6}.", r"\frac{1}{2}", "math", False),
        (r"$x = 1 + y$ gives \boxed{y^2+2y+1}", "(y+1)^2", "math", True),
        ("", "42", "math", False),
    ],
)
def test_a_completion_is_right_or_wrong(completion: str, answer: str, verifier: Verifier, expected: bool) -> None:
    assert matches(completion, answer, verifier) is expected


def test_maths_is_compared_outside_the_main_thread_too() -> None:
    # math-verify keeps its time limit with a signal and refuses to run elsewhere.
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(matches(r"\boxed{4}", "2+2", "math")))
    thread.start()
    thread.join()
    assert results == [True]


@pytest.mark.parametrize(
    ("answer", "verifier", "problem"),
    [
        (" \n", "exact", "empty"),
        ("", "contains", "empty"),
        ("(", "regex", "not a regular expression: missing \\), unterminated subpattern at position 0"),
        ("???", "math", "no expression"),
    ],
)
def test_an_answer_that_nothing_could_match_is_refused(answer: str, verifier: Verifier, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_answer(answer, verifier)
