"""Whole runs on prompts that are streamed: the same bits after an interruption, and a bad row that costs no step."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fake_local_teacher import FakeLocalTeacher
from training_runs import ROLLOUTS_A_STEP, Runs, same_bits
from vopd_client.errors import CheckpointError, DataError
from vopd_client.prompts import Prompt, PromptRow
from vopd_client.training_run import EXIT_INTERRUPTED

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")

STREAM: dict[str, Any] = {"stream_prompts": True, "shuffle_buffer": 3, "deterministic": True}


def write_rows(path: Path, num_rows: int = 9) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"say {index}:"}) + "\n" for index in range(num_rows)))
    return path


def without_traffic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is in flight is sent once more."""
    return [{name: value for name, value in row.items() if name != "teacher_bytes_per_token"} for row in rows]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_streamed_run_that_was_interrupted_ends_in_the_same_bits(
    runs: Runs, tmp_path: Path, max_staleness: int
) -> None:
    settings = {**STREAM, "prompts": str(write_rows(tmp_path / "rows.jsonl")), "max_staleness": max_staleness}
    settings |= {"steps": 6, "checkpoint_every": 2}
    runs.train(name="whole", **settings)

    def interrupt(number: int) -> None:
        if number == 4 * ROLLOUTS_A_STEP + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = FakeLocalTeacher(runs.models / "teacher", on_submit=interrupt)
    assert runs.train(stopped, name="cut", **settings) == EXIT_INTERRUPTED
    last = max(row["step"] for row in runs.metrics("cut"))
    assert 0 < last < 6
    assert (runs.directory("cut").checkpoints / f"step-{last:06d}" / "prompt_stream.json").exists()
    assert runs.train(name="cut", resume=True, **settings) == 0
    assert without_traffic(runs.metrics("cut")) == without_traffic(runs.metrics("whole"))
    assert same_bits(runs.weights("cut"), runs.weights("whole"))


def test_a_whole_run_holds_the_rows_of_its_steps_and_none_of_its_beginning(runs: Runs, tmp_path: Path) -> None:
    held: list[tuple[int, int]] = []

    def count(number: int) -> None:
        things = gc.get_objects()
        rows = {thing.source for thing in things if type(thing) is PromptRow}
        prompts = {thing.source for thing in things if type(thing) is Prompt}
        held.append(tuple(sum(str(tmp_path) in source for source in sources) for sources in (rows, prompts)))

    settings = {**STREAM, "prompts": str(write_rows(tmp_path / "rows.jsonl", 60)), "shuffle_buffer": 40, "steps": 2}
    runs.train(FakeLocalTeacher(runs.models / "teacher", on_submit=count), **settings)
    assert len(held) == 2 * ROLLOUTS_A_STEP
    assert max(num_rows for num_rows, _ in held) == 0  # parsed rows are prompts or gone
    assert max(num_prompts for _, num_prompts in held) <= 4  # of this step, and of the one before


def test_the_start_says_that_prompts_are_a_stream_and_another_order_is_another_run(runs: Runs, tmp_path: Path) -> None:
    settings = {**STREAM, "prompts": str(write_rows(tmp_path / "rows.jsonl")), "steps": 1, "schedule": "constant"}
    runs.train(**settings)
    assert "a stream that begins with 3 prompts, 0 held out" in runs.told
    with pytest.raises(CheckpointError, match="shuffle_buffer: 3 -> 4"):
        runs.train(resume=True, **{**settings, "steps": 2, "shuffle_buffer": 4})


@pytest.mark.parametrize(
    ("bad_line", "message"),
    [
        ('{"prompt": 1}', "prompt must be text, not a number"),
        (json.dumps({"prompt": "x" * 100}), "prompt 100 tokens > max_prompt_tokens 50"),
    ],
)
def test_a_bad_row_of_a_stream_stops_the_run_after_saving_and_can_be_put_right(
    runs: Runs, tmp_path: Path, bad_line: str, message: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 7)  # three steps and a half of two prompts
    good = path.read_text()
    path.write_text(good + bad_line + "\n" + '{"prompt": "last"}\n')
    settings = {**STREAM, "prompts": str(path), "steps": 5, "max_prompt_tokens": 50, "shuffle_buffer": 1}
    with pytest.raises(DataError) as raised:
        runs.train(**settings)
    assert str(raised.value) == f"{path}:8: {message}"
    assert [row["step"] for row in runs.metrics()] == [1, 2, 3]
    assert runs.checkpoints()[-1] == "step-000003"

    path.write_text(good + '{"prompt": "right"}\n{"prompt": "last"}\n')
    assert runs.train(resume=True, **settings) == 0
    assert [row["step"] for row in runs.metrics()] == [1, 2, 3, 4, 5]


def test_a_bad_row_within_the_first_buffer_is_found_before_the_student_is_loaded(runs: Runs, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 2)
    path.write_text(path.read_text() + '{"promt": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:3: unknown key 'promt'"):
        runs.train(**{**STREAM, "prompts": str(path), "student": "nowhere"})


def test_a_task_reward_asks_every_row_of_a_stream_for_an_answer(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {index}:", "answer": str(index)} for index in range(3)] + [{"prompt": "say"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**STREAM, "prompts": str(path), "task_reward_weight": 0.5, "shuffle_buffer": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl:4: no answer, and task_reward_weight 0\.5 needs one"):
        runs.train(**settings)
    assert [row["step"] for row in runs.metrics()] == [1]
    with pytest.raises(DataError, match=r"rows\.jsonl:4: no answer"):  # now in the first buffer
        runs.train(**{**settings, "name": "other", "shuffle_buffer": 4, "student": "nowhere"})
