"""Whether a completion is right: four ways to compare it with a reference answer. No torch.

exact     the same text, once both are normalised
contains  the normalised answer occurs in the normalised completion
regex     the answer is a pattern (Python's `re`) that is found anywhere in the completion; anchor it with ^ and $
math      the expressions mean the same to math-verify (LaTeX, fractions, sets, intervals, percentages, ...)

Normalised: Unicode NFC, runs of white space as one space, none at the ends. Case and punctuation count.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from typing import Any

from vopd_client.config import Verifier

MATH_TIMEOUT_S = 5


def matches(completion_text: str, answer: str, verifier: Verifier) -> bool:
    """Whether `completion_text` gives `answer`, a reference that `check_answer` accepts."""
    match verifier:
        case "exact":
            return normalise(completion_text) == normalise(answer)
        case "contains":
            return normalise(answer) in normalise(completion_text)
        case "regex":
            return re.search(answer, completion_text.strip()) is not None
        case "math":
            return _same_mathematics(completion_text, answer)


def check_answer(answer: str, verifier: Verifier) -> None:
    """Refuses a reference that no completion could ever match.

    Raises: ValueError saying why.
    """
    match verifier:
        case "exact" | "contains":
            if not normalise(answer):
                raise ValueError("empty; every completion would contain it")
        case "regex":
            try:
                re.compile(answer)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        case "math":
            # Beside expressions, math-verify returns the text it took them from.
            if all(isinstance(found, str) for found in _parse_mathematics(_delimited(answer))):
                raise ValueError(f"math-verify finds no expression in {answer!r}")


def normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _same_mathematics(completion_text: str, answer: str) -> bool:
    import math_verify

    return bool(
        math_verify.verify(
            _parse_mathematics(_delimited(answer)),
            _parse_mathematics(completion_text),
            timeout_seconds=_math_timeout_s(),
        )
    )


def _parse_mathematics(text: str) -> list[Any]:
    import math_verify  # brings sympy, a second of import

    return list(math_verify.parse(text, parsing_timeout=_math_timeout_s()))


def _delimited(answer: str) -> str:
    r"""math-verify looks for LaTeX only inside delimiters, and references are often written without: \frac{1}{2}."""
    return answer if "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer else f"${answer}$"


def _math_timeout_s() -> int | None:
    """math-verify keeps its time limit with SIGALRM, which only the main thread can handle; elsewhere there is none."""
    return MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
