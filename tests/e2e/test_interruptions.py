"""Processes that die: a trainer or a teacher, killed in the middle of a run, costs nothing but time.

Real processes over real gRPC, with a tiny model. Whatever is killed, the run ends with the same metrics and the
same bits as one that was left alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from process_group import process_group
from teacher_process import RunningTeacher
from workplace import STEPS, Workplace, assert_same_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("interruptions"))


@pytest.fixture(scope="module")
def teacher(place: Workplace) -> Iterator[RunningTeacher]:
    with place.teacher() as teacher:
        yield teacher


@pytest.fixture(scope="module")
def undisturbed(place: Workplace, teacher: RunningTeacher) -> str:
    """The name of a run that was left alone, in a Python of its own."""
    place.complete("undisturbed", teacher.url, afresh=True)
    assert [row["step"] for row in place.metrics("undisturbed")] == list(range(1, STEPS + 1))
    return "undisturbed"


def test_a_trainer_that_was_killed_goes_on_to_the_bits_of_the_undisturbed_run(
    place: Workplace, teacher: RunningTeacher, undisturbed: str
) -> None:
    with place.trainer("killed", teacher.url) as trainer:
        trainer.wait_until(lambda: place.num_steps("killed") >= 8)
        trainer.process.kill()
        assert trainer.wait() == -signal.SIGKILL
    assert 5 in place.checkpoint_steps("killed")
    assert place.num_steps("killed") < STEPS
    log = place.complete("killed", teacher.url, "--resume")
    assert "going on after step" in log
    assert_same_run(place, "killed", undisturbed)


def test_a_teacher_that_was_killed_and_comes_back_costs_nothing_but_the_wait(
    place: Workplace, undisturbed: str
) -> None:
    with place.teacher() as first, place.trainer("teacher-restarted", first.url) as trainer:
        trainer.wait_until(lambda: place.num_steps("teacher-restarted") >= 6)
        first.kill()
        trainer.wait_until(lambda: "teacher unavailable" in trainer.log())
        assert place.num_steps("teacher-restarted") < STEPS
        with place.teacher(port=first.port):
            assert trainer.wait() == 0, trainer.log()
    assert_same_run(place, "teacher-restarted", undisturbed)


def test_a_teacher_that_stays_away_ends_the_run_after_saving(
    place: Workplace, teacher: RunningTeacher, undisturbed: str
) -> None:
    with (
        place.teacher() as leaving,
        place.trainer("teacher-gone", leaving.url, "--teacher-timeout-s", "2") as trainer,
    ):
        trainer.wait_until(lambda: place.num_steps("teacher-gone") >= 6)
        leaving.kill()
        assert trainer.wait() == 3, trainer.log()
        assert "the teacher is gone" in trainer.log()
    last_complete = place.num_steps("teacher-gone")
    assert last_complete < STEPS
    assert place.checkpoint_steps("teacher-gone")[-1] == last_complete
    log = place.complete("teacher-gone", teacher.url, "--resume")
    assert f"going on after step {last_complete}" in log
    assert_same_run(place, "teacher-gone", undisturbed)


def test_ctrl_c_saves_the_last_complete_step_and_says_how_to_go_on(place: Workplace, teacher: RunningTeacher) -> None:
    with place.trainer("interrupted", teacher.url) as trainer:
        trainer.wait_until(lambda: place.num_steps("interrupted") >= 3)
        trainer.process.send_signal(signal.SIGINT)
        assert trainer.wait() == 130, trainer.log()
        assert "to go on: the same command with --resume --name interrupted" in trainer.log()
    last_complete = place.num_steps("interrupted")
    assert place.checkpoint_steps("interrupted")[-1] == last_complete
    assert not (place.run("interrupted") / "model").exists()


def test_two_processes_take_the_steps_of_one_stop_together_and_one_can_go_on(
    place: Workplace, teacher: RunningTeacher, undisturbed: str
) -> None:
    main_env, other_env = process_group(2)
    with (
        place.trainer("shared", teacher.url, env=main_env) as main,
        place.trainer("shared", teacher.url, env=other_env) as other,
    ):
        main.wait_until(lambda: place.num_steps("shared") >= 6)
        other.process.send_signal(signal.SIGINT)  # only one of them is asked
        assert main.wait() == 130, main.log()
        assert other.wait() == 130, other.log()
    last_complete = place.num_steps("shared")
    assert place.checkpoint_steps("shared")[-1] == last_complete < STEPS
    # Not the same bits: two processes add gradients up in another order.
    for shared, alone in zip(place.metrics("shared"), place.metrics(undisturbed)[:last_complete], strict=True):
        assert shared == pytest.approx(alone, rel=1e-3, abs=1e-5)
    assert f"going on after step {last_complete}" in place.complete("shared", teacher.url, "--resume")
    assert place.num_steps("shared") == STEPS
