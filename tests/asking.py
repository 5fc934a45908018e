"""What tests ask a scripted teacher, what they expect of it, and how they wait."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from fake_teacher import FakeTeacher, Script, expected_scores
from vopd_client.teacher import TeacherClient
from vopd_client.teacher.patience import Timing
from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK

SUPPORTS = (NoSupport(), TeacherTopK(3), Candidates(np.array([9, 8, 7, 9]), np.array([2, 0, 1, 1])))


def sequence(index: int = 0, *, num_contexts: int = 3) -> SequenceToScore:
    context = np.arange(3) + index % num_contexts
    return SequenceToScore(context, np.arange(4) + index % 900, SUPPORTS[index % 3])


def assert_answers(scores: SequenceScores, asked: SequenceToScore, temperature: float = 1.0) -> None:
    expected = expected_scores(asked, temperature)
    np.testing.assert_array_equal(scores.sampled_logprobs_T, expected.sampled_logprobs_T)
    np.testing.assert_array_equal(scores.support_ids, expected.support_ids)
    np.testing.assert_array_equal(scores.support_logprobs, expected.support_logprobs)
    np.testing.assert_array_equal(scores.counts_T, expected.counts_T)
    assert (scores.hidden_states_TH is None) == (expected.hidden_states_TH is None)
    if scores.hidden_states_TH is not None and expected.hidden_states_TH is not None:
        np.testing.assert_array_equal(scores.hidden_states_TH, expected.hidden_states_TH)


class FakeTime:
    """Sleeping is noted, moves the clock, and takes no time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)

    @property
    def timing(self) -> Timing:
        return Timing(now=lambda: self.now_s, sleep=self.sleep, rng=random.Random(0))


async def until(condition: Any) -> None:
    """Waits for something that another task or process brings about; the test's own time-out bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for happens behind a socket
        await asyncio.sleep(0.01)


@asynccontextmanager
async def connected_to(
    teacher_type: type[FakeTeacher], script: Script | None = None, **settings: Any
) -> AsyncIterator[tuple[FakeTeacher, TeacherClient]]:
    """A scripted teacher and a client of it, whose waiting takes no time unless it is given a `timing`."""
    async with teacher_type(script) as teacher:
        settings.setdefault("timing", FakeTime().timing)
        async with TeacherClient(teacher.url, **settings) as client:
            yield teacher, client
