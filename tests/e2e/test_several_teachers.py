"""Two teachers in processes of their own, one student: `vopd-client train --teacher math=... --teacher code=...`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from teacher_process import RunningTeacher, start_teacher
from tiny_model import write_tiny_model
from vopd_client.run_directory import read_rows
from workplace import NUM_PROMPTS, ONE_THREAD, STEPS, Workplace, assert_same_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("several-teachers"))
    rows = [{"prompt": f"say {i}:", "teacher": "code" if i % 4 == 0 else "math"} for i in range(NUM_PROMPTS)]
    place.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tiny_model(place.directory / "code", seed=5, hidden_size=48)
    return place


def code_teacher(place: Workplace, *, port: int = 0) -> RunningTeacher:
    flags = ("--deterministic", "--dtype", "float32")
    return start_teacher(place.directory / "code", *flags, port=port, env=ONE_THREAD)


@pytest.fixture(scope="module")
def teachers(place: Workplace) -> Iterator[dict[str, RunningTeacher]]:
    with ExitStack() as stack:
        yield {"math": stack.enter_context(place.teacher()), "code": stack.enter_context(code_teacher(place))}


@pytest.fixture(scope="module")
def urls(teachers: dict[str, RunningTeacher]) -> dict[str, str]:
    return {name: teacher.url for name, teacher in teachers.items()}


@pytest.fixture(scope="module")
def undisturbed(place: Workplace, urls: dict[str, str]) -> str:
    """The name of a run that was left alone; nothing else needs both teachers alive."""
    place.complete("undisturbed", urls, afresh=True)
    return "undisturbed"


def test_a_run_with_two_teachers_says_of_each_what_it_did(
    place: Workplace, urls: dict[str, str], undisturbed: str
) -> None:
    rows = read_rows(place.run(undisturbed) / "metrics.jsonl")
    assert len(rows) == STEPS
    for name in ("math", "code"):
        asked = [row for row in rows if row[f"teacher/{name}/num_valid_tokens"] > 0]
        assert asked
        assert all(row[f"teacher/{name}/bytes"] > 0 and row[f"teacher/{name}/kl_nats"] > 0 for row in asked)
    idle = [row for row in rows if row["teacher/code/num_valid_tokens"] == 0]  # two of eight prompts are code's
    assert idle
    assert not any("teacher/code/kl_nats" in row for row in idle)
    page = (place.run(undisturbed) / "report.html").read_text()
    assert "By teacher" in page
    assert urls["code"] in page


def test_a_teacher_that_is_killed_is_waited_for_by_name_and_costs_nothing_but_the_wait(
    place: Workplace, teachers: dict[str, RunningTeacher], urls: dict[str, str], undisturbed: str
) -> None:
    with place.trainer("killed", urls) as trainer:
        trainer.wait_until(lambda: place.num_steps("killed") >= 6)
        teachers["code"].kill()
        trainer.wait_until(lambda: "code: teacher unavailable" in trainer.log())
        assert place.num_steps("killed") < STEPS
        with code_teacher(place, port=teachers["code"].port):
            assert trainer.wait() == 0, trainer.log()
    assert "math: teacher unavailable" not in trainer.log()
    assert_same_run(place, "killed", undisturbed)
