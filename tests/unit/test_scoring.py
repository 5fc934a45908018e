"""What the teacher is asked about a rollout, and waiting for its answer."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from vopd_client.errors import TeacherInternalError
from vopd_client.handshake import IdSwap
from vopd_client.interruption import Interrupted, StopRequest
from vopd_client.prompts import Prompt
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.scoring import Request, SentRollout, Waiter, send
from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK

STUDENT_END, TEACHER_END = 7, 3
PROMPT = Prompt(0, "p.jsonl:1", np.array([1, 2]), np.array([STUDENT_END, 1, 2]), None, None, None, "text")
ROLLOUT = Rollout(
    key=RolloutKey(1, 0, 0),
    prompt_ids=PROMPT.student_ids,
    completion_ids=np.array([5, STUDENT_END]),
    behaviour_logprobs_T=np.zeros(2, np.float32),
    support_ids=np.array([5, TEACHER_END, STUDENT_END]),
    support_counts_T=np.array([2, 1]),
    support_mass_T=np.ones(2, np.float32),
    ended=True,
)
SCORES = SequenceScores(np.zeros(2, np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(2, np.int64))


def request(support: Any, swap: tuple[int, int] | None = None) -> Request:
    return Request(support, top_k=4, swap=IdSwap(swap), drop_end_ids=frozenset())


class FakeTeacher:
    """Holds every answer back until a test gives it."""

    waiting_reason = "teacher unavailable: connection refused"

    def __init__(self) -> None:
        self.asked: list[SequenceToScore] = []
        self.future: Future[SequenceScores] = Future()

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        self.asked.append(sequence)
        return self.future


def waiter(teacher: FakeTeacher, stop: StopRequest, told: list[tuple[str, str]]) -> Waiter:
    return Waiter(stop, {"": teacher}, lambda reason, name: told.append((name, reason)))  # type: ignore[dict-item]


def sent(teacher: FakeTeacher) -> SentRollout:
    return send(ROLLOUT, PROMPT, request=request("none"), teacher=teacher)  # type: ignore[arg-type]


def test_the_completion_follows_the_context_that_the_teacher_sees() -> None:
    teacher = FakeTeacher()
    item = sent(teacher)
    assert teacher.asked[0].context_ids is PROMPT.teacher_ids
    assert teacher.asked[0].completion_ids is ROLLOUT.completion_ids
    assert item.num_tokens == 4  # the student's prompt, not the teacher's context


def test_each_kind_of_support_is_asked_for_in_its_own_way() -> None:
    candidates = request("student").of(ROLLOUT, PROMPT).support
    assert isinstance(candidates, Candidates)
    assert candidates.ids.tolist() == [5, TEACHER_END, STUDENT_END]
    assert candidates.counts_T.tolist() == [2, 1]
    assert request("teacher").of(ROLLOUT, PROMPT).support == TeacherTopK(4)
    assert isinstance(request("none").of(ROLLOUT, PROMPT).support, NoSupport)
    assert isinstance(request("vocabulary").of(ROLLOUT, PROMPT).support, HiddenStates)


def test_end_tokens_are_exchanged_in_completion_and_support_and_never_in_the_context() -> None:
    sequence = request("student", swap=(STUDENT_END, TEACHER_END)).of(ROLLOUT, PROMPT)
    assert sequence.completion_ids.tolist() == [5, TEACHER_END]
    assert isinstance(sequence.support, Candidates)
    assert sequence.support.ids.tolist() == [5, STUDENT_END, TEACHER_END]
    assert sequence.context_ids.tolist() == [STUDENT_END, 1, 2]


def test_waiting_tells_why_and_ends_with_the_answer() -> None:
    teacher, told = FakeTeacher(), list[tuple[str, str]]()
    threading.Timer(0.5, teacher.future.set_result, [SCORES]).start()
    waiting = waiter(teacher, StopRequest(), told)
    assert waiting.scores(sent(teacher)) is SCORES
    assert set(told) == {("", teacher.waiting_reason)}
    assert waiting.waited_s > 0


def test_the_teachers_error_is_raised_where_the_answer_is_needed() -> None:
    teacher = FakeTeacher()
    teacher.future.set_exception(TeacherInternalError("out of memory"))
    with pytest.raises(TeacherInternalError, match="out of memory"):
        waiter(teacher, StopRequest(), []).scores(sent(teacher))


def test_someone_who_asks_for_the_end_does_not_wait_for_the_teacher() -> None:
    teacher, stop = FakeTeacher(), StopRequest()
    with stop.postponed():
        stop.ask()
    with pytest.raises(Interrupted):
        waiter(teacher, stop, []).scores(sent(teacher))
    assert not teacher.future.done()
