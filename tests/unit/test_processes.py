"""Processes go on together or stop together. `exchange` is what accelerate does between real ones."""

from __future__ import annotations

import pickle

import pytest

from vopd_client.errors import ConfigError, TeacherUnavailableError
from vopd_client.interruption import Interrupted
from vopd_client.lockstep import Lockstep
from vopd_client.processes import Problem, Report, agree, make_accelerator
from vopd_client.train_config import TrainConfig


def among(*others: Report):  # type: ignore[no-untyped-def]
    """An exchange with these other processes, through pickle as in real life."""

    def exchange(mine: list[Report]) -> list[Report]:
        return [*pickle.loads(pickle.dumps(mine)), *others]

    return exchange


def test_sums_add_up_when_nobody_has_a_problem() -> None:
    exchange = among((None, {"loss": 2.0, "num_valid_tokens": 5.0}))
    assert agree(None, {"loss": 1.0, "num_valid_tokens": 3.0}, exchange=exchange) == {
        "loss": 3.0,
        "num_valid_tokens": 8.0,
    }


def test_a_process_without_rollouts_of_one_teacher_has_none_of_its_sums() -> None:
    exchange = among((None, {"loss": 2.0, "teacher/math/loss": 2.0}))
    assert agree(None, {"loss": 1.0, "teacher/code/loss": 1.0}, exchange=exchange) == {
        "loss": 3.0,
        "teacher/code/loss": 1.0,
        "teacher/math/loss": 2.0,
    }


@pytest.mark.parametrize("problem", [Interrupted(), TeacherUnavailableError("gone for 600 s")])
def test_the_problem_of_one_process_stops_the_others(problem: Problem) -> None:
    with pytest.raises(type(problem)) as caught:
        agree(None, {"loss": 1.0}, exchange=among((None, {}), (problem, {})))
    assert str(caught.value) == str(problem)


def test_a_process_reports_its_own_problem_first() -> None:
    mine = TeacherUnavailableError("mine")
    with pytest.raises(TeacherUnavailableError, match="mine"):
        agree(mine, {}, exchange=among((Interrupted(), {})))


@pytest.mark.parametrize(
    ("variable", "what"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_shards_that_accelerate_is_to_make_are_refused_with_what_to_do_instead(
    monkeypatch: pytest.MonkeyPatch, variable: str, what: str
) -> None:
    monkeypatch.setenv(variable, "true")  # as `accelerate launch --use_fsdp` sets it, on CPUs too
    config = TrainConfig(student="student", prompts="prompts.jsonl", teacher_url=["grpc://teacher:1"])
    with pytest.raises(ConfigError, match=f"accelerate's settings ask for {what}.*give --sharding fsdp"):
        make_accelerator(config)


def test_without_shards_a_problem_stays_with_its_process_until_the_end_of_the_step() -> None:
    lockstep = Lockstep(sharded=False)
    with pytest.raises(TeacherUnavailableError, match="mine"), lockstep.alone():
        raise TeacherUnavailableError("mine")
    assert lockstep.rounds([[0, 1], [2]]) == [[0, 1], [2]]
    assert lockstep.rounds([]) == [[]]  # nothing to learn, and still a part in the exchange of gradients
