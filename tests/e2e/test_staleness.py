"""Rollouts sampled one update ahead, in real processes over real gRPC: whatever ends a run, it goes on to its bits."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from teacher_process import RunningTeacher
from workplace import STEPS, Workplace, assert_same_run

pytestmark = pytest.mark.e2e

AHEAD = ("--max-staleness", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("staleness"))


@pytest.fixture(scope="module")
def teacher(place: Workplace) -> Iterator[RunningTeacher]:
    with place.teacher() as teacher:
        yield teacher


@pytest.fixture(scope="module")
def undisturbed(place: Workplace, teacher: RunningTeacher) -> str:
    """The name of a run that was left alone, in a Python of its own."""
    place.complete("undisturbed", teacher.url, *AHEAD, afresh=True)
    assert [row["staleness"] for row in place.metrics("undisturbed")] == [0] + [1] * (STEPS - 1)
    return "undisturbed"


def test_a_trainer_that_was_killed_goes_on_with_the_rollouts_that_were_in_flight(
    place: Workplace, teacher: RunningTeacher, undisturbed: str
) -> None:
    with place.trainer("killed", teacher.url, *AHEAD) as trainer:
        trainer.wait_until(lambda: place.num_steps("killed") >= 8)
        trainer.process.kill()
        assert trainer.wait() == -signal.SIGKILL
    assert place.num_steps("killed") < STEPS
    log = place.complete("killed", teacher.url, *AHEAD, "--resume")
    assert "going on after step" in log
    assert "holds no rollouts" not in log
    assert_same_run(place, "killed", undisturbed)
