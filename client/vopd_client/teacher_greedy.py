"""The teacher's own greedy answers, through the scoring service alone.

A teacher that only scores can still decode: ask for its most likely id after every token of a draft. As long as the
draft agrees with it, greedy decoding would have written the draft; where it first differs, the teacher's id is the
next token, and the rest of the draft is void. So every request finds at least one token, a good draft all of them,
and what comes out is what greedy decoding gives, whatever the drafts were (up to ties in the last bits of a score).

Axes: C context tokens, T completion tokens.
Source of the idea: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192,
at temperature 0 and with drafts that cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from vopd_client.errors import AlignmentError
from vopd_client.types import SequenceScores, SequenceToScore, Teacher, TeacherTopK
from vopd_proto.arrays import IntArray

_LONGEST_MATCH = 8  # tokens; what follows a longer match is as good a guess as what follows this one


@dataclass(frozen=True, slots=True)
class GreedyCost:
    """What it took: rounds of requests that wait for one another, requests, and tokens that the teacher read."""

    rounds: int
    requests: int
    tokens: int


def greedy_by_scoring(
    teacher: Teacher,
    contexts: Sequence[IntArray],
    drafts: Sequence[Sequence[IntArray]],
    *,
    end_ids: frozenset[int],
    max_new_tokens: int,
    receive: Callable[[Future[SequenceScores]], SequenceScores] = Future.result,
) -> tuple[list[IntArray], GreedyCost]:
    """One completion a context, end token included, in at most `max_new_tokens` rounds.

    Args:
        contexts: [C] each, what the teacher sees, C >= 1.
        drafts: for each context any number of guesses at the completion, the best first; they change the cost only.
        receive: waits for an answer; a caller's own can look up from waiting now and then.

    Raises: what the teacher's futures raise; AlignmentError when an answer does not have one id a row.
    """
    found: list[list[int]] = [[] for _ in contexts]
    open_rows = [row for row in range(len(contexts)) if max_new_tokens > 0]
    rounds = requests = tokens = 0
    while open_rows:
        sent = {
            row: _draft_request(contexts[row], found[row], drafts[row], max_new_tokens=max_new_tokens)
            for row in open_rows
        }
        answers = {row: teacher.submit(request) for row, request in sent.items()}
        for row, answer in answers.items():
            accepted = accept(sent[row].completion_ids, most_likely_ids(receive(answer)), end_ids)
            found[row] += accepted
        rounds += 1
        requests += len(sent)
        tokens += sum(len(request.context_ids) + len(request.completion_ids) for request in sent.values())
        open_rows = [row for row in open_rows if found[row][-1] not in end_ids and len(found[row]) < max_new_tokens]
    return [np.array(ids, np.int64) for ids in found], GreedyCost(rounds, requests, tokens)


def accept(draft_ids: IntArray, best_ids_T: IntArray, end_ids: frozenset[int]) -> list[int]:
    """What greedy decoding writes next, given the teacher's most likely id at every row of a draft.

    Row t speaks for greedy decoding only as long as the draft agreed at all rows before it.
    """
    accepted: list[int] = []
    for drafted, best in zip(draft_ids.tolist(), best_ids_T.tolist(), strict=True):
        accepted.append(best)
        if best != drafted or best in end_ids:
            break
    return accepted


def guess_next(found: Sequence[int], drafts: Sequence[Sequence[int]]) -> list[int]:
    """What follows, in one of the drafts, the longest end of `found` that occurs in it; the earlier draft at a tie."""
    best: tuple[int, list[int]] = (-1, [])
    for draft in drafts:
        if len(found) < len(draft) and list(found) == list(draft[: len(found)]):
            return list(draft[len(found) :])
        for position in range(1, len(draft)):
            length = _common_end(found, draft[:position])
            if length > max(best[0], 0):
                best = (length, list(draft[position:]))
    return best[1]


def most_likely_ids(scores: SequenceScores) -> IntArray:
    """[T] the teacher's first choice at every row of a sequence that asked for one.

    Raises: AlignmentError when a row has none, or more.
    """
    if len(scores.support_ids) != len(scores.counts_T) or (scores.counts_T != 1).any():
        raise AlignmentError(f"asked for the most likely id of a row, got {scores.counts_T.tolist()} ids")
    return scores.support_ids


def _draft_request(
    context_ids: IntArray, found: Sequence[int], drafts: Sequence[IntArray], *, max_new_tokens: int
) -> SequenceToScore:
    """What is found already is context by now; the last token's only use is that its row says what replaces it."""
    guess = guess_next(found, [draft.tolist() for draft in drafts])
    room = max_new_tokens - len(found)
    return SequenceToScore(
        context_ids=np.concatenate([context_ids, np.array(found, np.int64)]),
        completion_ids=np.array([*guess, context_ids[-1]][:room], np.int64),
        support=TeacherTopK(1),
    )


def _common_end(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    while length < min(len(left), len(right), _LONGEST_MATCH) and left[-1 - length] == right[-1 - length]:
        length += 1
    return length
