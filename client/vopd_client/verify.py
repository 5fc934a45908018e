r"""Whether a completion is right: seven ways to compare it with a reference answer. No torch.

exact       the same text, once both are normalised
contains    the normalised answer occurs in the normalised completion
regex       the answer is a pattern (Python's `re`) that is found anywhere in the completion; anchor it with ^ and $
math        the expressions mean the same to math-verify (LaTeX, fractions, sets, intervals, percentages, ...), wherever
            in the completion it finds one; what it finds may be no more than the question repeated
boxed-math  the same for what the last \boxed{...} of the completion holds; without one the completion is wrong
choice      the letter that the completion settles on, see `extraction.choice_letter`, is the answer's
reasoning-gym
            the row's own task gives the answer, see `extraction.tagged_answer`, its full score, which `TaskItem` does;
            only rows that a task made have it

Normalised: Unicode NFC, runs of white space as one space, none at the ends. Case and punctuation count.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from vopd_client.config import Verifier
from vopd_client.extraction import LETTERS, choice_letter, last_boxed, tagged_answer

MATH_TIMEOUT_S = 5
_ONLY_TASKS = "verifier reasoning-gym is for rows that a task made, prompts reasoning-gym:task; no answer says enough"


@dataclass(frozen=True)
class ExtractedAnswer:
    """What a completion answers, to be compared with other completions of its prompt.

    text: to show people, and what answers without expressions are compared by.
    expressions: as math-verify found them.
    """

    text: str
    expressions: tuple[Any, ...] = field(default=(), repr=False, compare=False)


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
        case "boxed-math":
            boxed = last_boxed(completion_text)
            return boxed is not None and _same_mathematics(_delimited(boxed), answer)
        case "choice":
            return choice_letter(completion_text) == _reference_letter(answer)
        case "reasoning-gym":
            raise ValueError(_ONLY_TASKS)


def extract_answer(completion_text: str, verifier: Verifier) -> ExtractedAnswer | None:
    """What `completion_text` answers by the rules of `verifier`; None when it answers nothing."""
    match verifier:
        case "exact" | "contains" | "regex":
            text = normalise(completion_text)
            return ExtractedAnswer(text) if text else None
        case "math":
            return _extract_mathematics(completion_text)
        case "boxed-math":
            boxed = last_boxed(completion_text)
            return None if not boxed else _extract_mathematics(_delimited(boxed))
        case "choice":
            letter = choice_letter(completion_text)
            return None if letter is None else ExtractedAnswer(letter)
        case "reasoning-gym":
            tagged = tagged_answer(completion_text)
            return ExtractedAnswer(tagged) if tagged else None


def same_answer(first: ExtractedAnswer, other: ExtractedAnswer) -> bool:
    """Whether two completions answer the same: the same text, or expressions that math-verify takes for equal.

    math-verify is asked with `first` as the reference; for relations and sets it is not quite symmetric.
    """
    if first.text == other.text:
        return True
    if not first.expressions or not other.expressions:
        return False
    import math_verify

    return bool(math_verify.verify(list(first.expressions), list(other.expressions), timeout_seconds=_math_timeout_s()))


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
        case "math" | "boxed-math":
            # Beside expressions, math-verify returns the text it took them from.
            if all(isinstance(found, str) for found in _parse_mathematics(_delimited(answer))):
                raise ValueError(f"math-verify finds no expression in {answer!r}")
        case "choice":
            if _reference_letter(answer) is None:
                raise ValueError(f"{answer!r} is not a letter from {LETTERS.replace('-', ' to ')}")
        case "reasoning-gym":
            raise ValueError(_ONLY_TASKS)


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


def _extract_mathematics(text: str) -> ExtractedAnswer | None:
    """What math-verify finds in `text`: expressions, and the text it took them from, which comes last."""
    found = _parse_mathematics(text)
    texts = [item for item in found if isinstance(item, str)]
    if not found:
        return None
    expressions = tuple(item for item in found if not isinstance(item, str))
    return ExtractedAnswer(normalise(texts[-1] if texts else str(found[0])), expressions)


def _parse_mathematics(text: str) -> list[Any]:
    import math_verify  # brings sympy, a second of import

    return list(math_verify.parse(text, parsing_timeout=_math_timeout_s()))


def _delimited(answer: str) -> str:
    r"""math-verify looks for LaTeX only inside delimiters, and references are often written without: \frac{1}{2}."""
    return answer if "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer else f"${answer}$"


def _reference_letter(answer: str) -> str | None:
    """The letter of "C" or "(C)"; None for anything else."""
    found = re.fullmatch(rf"\(?([{LETTERS}])\)?", answer.strip(), re.IGNORECASE)
    return found[1].upper() if found else None


def _math_timeout_s() -> int | None:
    """math-verify keeps its time limit with SIGALRM, which only the main thread can handle; elsewhere there is none."""
    return MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
