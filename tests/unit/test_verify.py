"""Each verifier accepts what it should and refuses what comes close."""

from __future__ import annotations

import threading

import pytest

from vopd_client.config import Verifier
from vopd_client.verify import check_answer, extract_answer, matches, same_answer


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
        (r"So the answer is \boxed{0.5}.", r"\frac{1}{2}", "boxed-math", True),
        (r"Not \boxed{3}, but \boxed{\frac{\sqrt{4}}{4}}", r"\frac{1}{2}", "boxed-math", True),
        (r"First \boxed{0.5}, then \boxed{3}", "0.5", "boxed-math", False),
        ("So the answer is 0.5.", "0.5", "boxed-math", False),
        (r"So the answer is \boxed{0.5", "0.5", "boxed-math", False),
        (r"\boxed{}", "0.5", "boxed-math", False),
        (r"Thus \boxed{C}", "C", "choice", True),
        ("The answer is (b).", "(B)", "choice", True),
        ("The answer is B.", "C", "choice", False),
        ("I cannot say.", "C", "choice", False),
    ],
)
def test_a_completion_is_right_or_wrong(completion: str, answer: str, verifier: Verifier, expected: bool) -> None:
    assert matches(completion, answer, verifier) is expected


@pytest.mark.parametrize(
    ("completion", "verifier", "text"),
    [
        ("  Answer:\n Paris \n", "exact", "Answer: Paris"),
        ("a  b", "contains", "a b"),
        (" 42 \n", "regex", "42"),
        (" \n", "exact", None),
        (r"Hence \boxed{\frac{1}{2}}.", "math", r"\frac{1}{2}"),
        ("The answer is 42", "math", "42"),
        ("", "math", None),
        (r"Hence \boxed{\frac{1}{2}}.", "boxed-math", r"\frac{1}{2}"),
        ("The answer is 42", "boxed-math", None),
        (r"\boxed{ }", "boxed-math", None),
        ("Answer: (c)", "choice", "C"),
        ("It is carbon.", "choice", None),
    ],
)
def test_what_a_completion_answers_is_extracted(completion: str, verifier: Verifier, text: str | None) -> None:
    found = extract_answer(completion, verifier)
    assert (None if found is None else found.text) == text


@pytest.mark.parametrize(
    ("first", "other", "verifier", "expected"),
    [
        (r"\boxed{0.5}", r"so \boxed{\frac{2}{4}}", "math", True),
        (r"\boxed{0.5}", r"\boxed{0.6}", "math", False),
        (r"\boxed{(x+1)^2}", r"\boxed{x^2+2x+1}", "boxed-math", True),
        (r"\boxed{\text{even}}", r"\boxed{\text{odd}}", "boxed-math", False),
        ("Paris", " Paris ", "exact", True),
        ("0.5", "1/2", "exact", False),
        ("Answer: B", r"\boxed{b}", "choice", True),
        ("Answer: B", "Answer: C", "choice", False),
    ],
)
def test_answers_are_grouped_by_what_the_verifier_takes_for_equal(
    first: str, other: str, verifier: Verifier, expected: bool
) -> None:
    answers = [extract_answer(text, verifier) for text in (first, other)]
    assert answers[0] is not None
    assert answers[1] is not None
    assert same_answer(answers[0], answers[1]) is expected


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
        ("???", "boxed-math", "no expression"),
        ("Paris", "choice", "'Paris' is not a letter from A to J"),
        ("K", "choice", "not a letter"),
    ],
)
def test_an_answer_that_nothing_could_match_is_refused(answer: str, verifier: Verifier, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_answer(answer, verifier)
