"""What a completion says and whether it is right; what both kinds of evaluation share. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from vopd_client.extraction import tagged_answer
from vopd_client.prompts import Prompt
from vopd_client.verify import matches
from vopd_proto.arrays import IntArray

NO_KIND = "all"  # what rows without a kind are counted under

_RIGHT = 1.0 - 1e-9  # of a task's score, which may be a quotient


def reward(prompt: Prompt, text: str) -> float:
    """What a completion of a prompt with an answer is worth, in [0, 1]: 1 where it is right.

    In between are only the scores of reasoning-gym's tasks, for a part of the answer or another form of it.
    """
    assert prompt.answer is not None
    assert prompt.verifier is not None, "an answer comes with a verifier"
    if prompt.task_item is None:
        return float(matches(text, prompt.answer, prompt.verifier))
    return prompt.task_item.score(tagged_answer(text))


def is_right(prompt: Prompt, text: str) -> bool:
    """Whether it is worth 1: a part of a score is not right."""
    return reward(prompt, text) >= _RIGHT


def completion_text(tokenizer: Any, completion_ids: IntArray, end_ids: frozenset[int]) -> str:
    """The completion without its end token and without special tokens."""
    ids = completion_ids.tolist()
    if ids and ids[-1] in end_ids:
        ids = ids[:-1]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def kind_of(prompt: Prompt) -> str:
    return prompt.kind or NO_KIND


def teacher_of(prompt: Prompt) -> str:
    """Empty: it has no name, and nothing of its own to say."""
    return prompt.teacher


def spread_over_kinds(kinds: Sequence[str | None], count: int) -> list[int]:
    """Positions of `count` rows, the kinds taking turns, each in its order: the same rows at every evaluation."""
    order = list(dict.fromkeys(kinds))
    seen: dict[str | None, int] = dict.fromkeys(order, 0)
    ranked: list[tuple[int, int, int]] = []  # (how many of its kind came before, its kind, position)
    for position, kind in enumerate(kinds):
        ranked.append((seen[kind], order.index(kind), position))
        seen[kind] += 1
    return [position for _, _, position in sorted(ranked)[:count]]


def questions_hash(questions: Sequence[tuple[str, str]]) -> str:
    """A fingerprint of (prompt as shown to people, answer) of every judged prompt, in order.

    Evaluations of equal fingerprints asked the same, whatever tokenizer and chat template the models have, so that
    their results can be compared prompt by prompt.
    """
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]
