"""Rollouts sampled one update ahead, in real processes over real gRPC: whatever ends a run, it goes on to its bits."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from process_group import process_group
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
    """The name of a run that was left alone."""
    place.complete("undisturbed", teacher.url, *AHEAD)
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


def test_two_processes_that_stop_leave_their_rollouts_to_one_that_goes_on(
    place: Workplace, teacher: RunningTeacher, undisturbed: str
) -> None:
    main_env, other_env = process_group(2)
    with (
        place.trainer("shared", teacher.url, *AHEAD, env=main_env) as main,
        place.trainer("shared", teacher.url, *AHEAD, env=other_env) as other,
    ):
        main.wait_until(lambda: place.num_steps("shared") >= 6)
        other.process.send_signal(signal.SIGINT)  # only one of them is asked
        assert main.wait() == 130, main.log()
        assert other.wait() == 130, other.log()
    last_complete = place.num_steps("shared")
    assert last_complete < STEPS
    checkpoint = place.run("shared") / "checkpoints" / f"step-{last_complete:06d}"
    assert sorted(path.name for path in checkpoint.glob("rollouts-*")) == [
        f"rollouts-{last_complete + 1:06d}-{rank:05d}.safetensors" for rank in range(2)
    ]
    assert "holds no rollouts" not in place.complete("shared", teacher.url, *AHEAD, "--resume")
    # Not the same bits: two processes add gradients up in another order. The step after the last one that they
    # completed learned from what both of them had in flight.
    assert place.num_steps("shared") == STEPS
    of_both = slice(last_complete + 1)
    for shared, alone in zip(place.metrics("shared")[of_both], place.metrics(undisturbed)[of_both], strict=True):
        assert shared == pytest.approx(alone, rel=1e-3, abs=1e-5)
