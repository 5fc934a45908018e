"""What a task of reasoning-gym thinks of an answer to one of its questions. No torch."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

# Numbers and their arithmetic, lists of them: what may be run as Python. Powers could take for ever.
_HARMLESS = re.compile(r"(?!.*\*\s*\*)(?!.*\d{16})(?:[\d\s+\-*/().,\[\]]|0x[\da-f]{1,16}){0,500}", re.DOTALL)
# What scorers raise for answers of a form that they did not think of: such an answer is wrong.
_SCORER_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class TaskItem:
    """One question of a task, with all that its scoring looks at.

    parameters: of the task, as JSON.
    runs_answers: the scoring runs the answer as Python; it is then asked about harmless ones alone.
    """

    task: str
    parameters: str
    entry: Mapping[str, Any] = field(repr=False)
    runs_answers: bool = False

    def score(self, answer: str | None) -> float:
        """In [0, 1]: 1 is right; some tasks give a part of it for a part of the answer. None: there is no answer."""
        if answer is None or (self.runs_answers and not is_harmless(answer)):
            return 0.0
        try:
            score = float(_dataset(self.task, self.parameters).score_answer(answer, dict(self.entry)))
        except _SCORER_ERRORS:
            return 0.0
        return min(max(score, 0.0), 1.0)


def is_harmless(answer: str) -> bool:
    """Whether running `answer` as Python can do nothing but arithmetic."""
    return _HARMLESS.fullmatch(answer) is not None


@lru_cache(maxsize=256)
def _dataset(task: str, parameters: str) -> Any:
    """The task as it was when the question was made; scoring depends on some parameters."""
    import reasoning_gym

    from vopd_client.reasoning_gym_rows import check_parameters

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies: files left open
        defaults = vars(reasoning_gym.factory.DATASETS[task][1]())
        return reasoning_gym.create_dataset(task, **check_parameters(task, json.loads(parameters), defaults))
