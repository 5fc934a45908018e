"""What a run tells: durable rows in step order, TensorBoard, lines for people."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vopd_client.errors import RunDirectoryError
from vopd_client.run_directory import RunDirectory, read_rows
from vopd_client.tracking import RunLog, append_row

ROW: dict[str, Any] = {
    "step": 1,
    "loss": 0.5,
    "kl_nats": 1.25,
    "grad_norm": 2.0,
    "tokens_per_s": 10.0,
    "step_s": 2.0,
    "rollout_s": 1.0,
    "update_s": 0.5,
    "teacher_wait_s": 0.5,
}
EVALUATION: dict[str, Any] = {
    "step": 0,
    "who": "student",
    "exact_match": 0.25,
    "exact_match_by_kind": {"capitals": 0.5, "plurals": 0.0},
    "num_prompts": 4,
    "kl_nats": 1.5,
    "kl_by_kind": {},
    "samples": [{"prompt": "2+2?", "completion": "[b]4[/b]", "answer": "4", "correct": True, "kind": "plurals"}],
}


def console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=300), text


def log_of(run: RunDirectory, out: Console, **settings: Any) -> RunLog:
    return RunLog(run, out, **{"total_steps": 4, "last_step": 0, **settings})


def scalars(run: RunDirectory, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.tensorboard)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_metrics_are_rows_scalars_and_lines(tmp_path: Path) -> None:
    run, (out, text) = RunDirectory(tmp_path), console()
    with log_of(run, out) as log:
        for step in (1, 2):
            log.step({**ROW, "step": step})
    assert read_rows(run.metrics_file) == [ROW, {**ROW, "step": 2}]
    assert scalars(run, "train/kl_nats") == [(1, 1.25), (2, 1.25)]
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("step 2/4  KL 1.2500 nats")
    assert "teacher wait 0.50" in lines[1]


def test_a_long_run_prints_a_hundred_lines_and_not_ten_thousand(tmp_path: Path) -> None:
    out, text = console()
    with log_of(RunDirectory(tmp_path), out, total_steps=1000) as log:
        for step in range(1, 31):
            log.step({**ROW, "step": step})
    assert [line.split("/")[0] for line in text.getvalue().splitlines()] == ["step 10", "step 20", "step 30"]


def test_what_is_not_finite_becomes_null_so_that_rows_stay_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"step": 1, "loss": math.nan, "by_kind": {"a": math.inf}, "list": [1.0, -math.inf]})
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "by_kind": {"a": None}, "list": [1.0, None]}


def test_a_row_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"missing/rows\.jsonl: No such file"):
        append_row(tmp_path / "missing" / "rows.jsonl", {"step": 1})


def test_an_evaluation_is_a_row_with_its_samples_and_a_line(tmp_path: Path) -> None:
    run, (out, text) = RunDirectory(tmp_path), console()
    with log_of(run, out) as log:
        log.evaluation(EVALUATION)
    assert read_rows(run.evals_file) == [EVALUATION]
    assert read_rows(run.samples_file) == [{"step": 0, "who": "student", **EVALUATION["samples"][0]}]
    assert scalars(run, "eval_student/exact_match_by_kind/capitals") == [(0, 0.5)]
    assert text.getvalue() == (
        "evaluation after step 0, student:  exact match 25.0% (capitals 50.0%, plurals 0.0%)  KL 1.5000 nats\n"
    )


def test_steps_that_are_taken_again_replace_what_tensorboard_knew_of_them(tmp_path: Path) -> None:
    run, (out, _) = RunDirectory(tmp_path), console()
    with log_of(run, out) as log:
        for step in (1, 2, 3):
            log.step({**ROW, "step": step, "loss": 1.0})
    with log_of(run, out, last_step=1) as log:
        log.step({**ROW, "step": 2, "loss": 7.0})
    assert scalars(run, "train/loss") == [(1, 1.0), (2, 7.0)]


def test_why_the_teacher_is_waited_for_is_a_line_now_and_then_and_not_every_look(tmp_path: Path) -> None:
    out, text = console()
    now_s = 100.0
    with log_of(RunDirectory(tmp_path), out, clock=lambda: now_s) as log:
        log.waiting("", step=3)  # late, but nothing is wrong
        for look in range(80):
            now_s = 100.0 + 0.2 * look
            log.waiting("teacher unavailable: refused", step=3)
    assert text.getvalue().splitlines() == ["step 3: teacher unavailable: refused"] * 2


def test_which_of_several_teachers_is_waited_for_is_said(tmp_path: Path) -> None:
    run, (out, text) = RunDirectory(tmp_path), console()
    with log_of(run, out) as log:
        log.waiting("teacher unavailable: refused", "math", step=3)
        row = {**ROW, "teacher/code/kl_nats": 0.75, "teacher/math/kl_nats": 1.5, "teacher/math/bytes": 12}
        log.step(row)
        log.evaluation({**EVALUATION, "kl_by_teacher": {"code": 1.25}})
    waiting, step, evaluation = text.getvalue().splitlines()
    assert waiting == "step 3: math: teacher unavailable: refused"
    assert "KL 1.2500 nats (code 0.7500, math 1.5000)  loss" in step
    assert evaluation.endswith("KL 1.5000 nats (code 1.2500)")
    assert scalars(run, "train/teacher/math/kl_nats") == [(1, 1.5)]
    assert scalars(run, "eval_student/kl_by_teacher/code") == [(0, 1.25)]
    out, text = console(terminal=True)
    with log_of(run, out) as log:
        log.waiting("", "math", step=3)
    assert "step 3: waiting for math's scores" in text.getvalue()


def test_a_terminal_shows_the_step_the_kl_and_the_reason_for_waiting(tmp_path: Path) -> None:
    out, text = console(terminal=True)
    with log_of(RunDirectory(tmp_path), out) as log:
        log.doing("sampling", step=1)
        log.step(ROW)
        log.waiting("teacher busy: [/tmp/x] 3 s", step=2)  # square brackets are text
    shown = text.getvalue()
    assert "teacher busy: [/tmp/x] 3 s" in shown
    last_frame = shown[shown.rindex("1/4") :]
    assert "KL 1.2500 nats" in last_frame, "the last step's numbers stay while the next one is at work"
    assert "1/4" in shown


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    run, (out, text) = RunDirectory(tmp_path), console()
    with log_of(run, out, enabled=False) as log:
        log.step(ROW)
        log.evaluation(EVALUATION)
        log.waiting("late", step=1)
        log.tell("hello")
    assert list(tmp_path.iterdir()) == []
    assert text.getvalue() == ""
