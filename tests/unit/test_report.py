"""The report says what the run's files say, whatever of them is there, on one page that needs nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from vopd_client.errors import RunDirectoryError
from vopd_client.plots import running_mean
from vopd_client.report import (
    before_and_after,
    comparisons,
    duration,
    facts,
    headline,
    render_page,
    teacher_rows,
    write_report,
)
from vopd_client.run_data import read_run


def metrics(num_steps: int, **overrides: Any) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "loss": 0.1, "kl_nats": 1.5 / step, "advantage_std": 1.0, "grad_norm": 2.0,
            "support_size_mean": 9.0, "left_out_mass_mean": 1e-4, "completion_tokens_mean": 7.0,
            "teacher_wait_s": 1.0, "rollout_s": 3.0, "update_s": 6.0, "step_s": 10.0,
            "teacher_bytes_per_token": 200.0,
        } | overrides
        for step in range(1, num_steps + 1)
    ]  # fmt: skip


def evaluation(step: int, exact_match: float | None, kl_nats: float | None, who: str = "student") -> dict[str, Any]:
    by_kind = {} if exact_match is None else {"capital": exact_match, "past tense": exact_match / 2}
    sample = {"prompt": "2+2?", "completion": f"{who} at {step}", "answer": "4", "correct": step > 0, "kind": "capital"}
    return {
        "step": step, "who": who, "exact_match": exact_match, "exact_match_by_kind": by_kind, "num_prompts": 8,
        "kl_nats": kl_nats, "kl_by_kind": {} if kl_nats is None else {"capital": kl_nats}, "samples": [sample],
    }  # fmt: skip


EVALUATIONS = [
    evaluation(0, 0.0, 1.25),
    evaluation(0, 0.9, None, "teacher"),
    evaluation(5, 0.5, 0.5),
    evaluation(10, 0.8125, 0.125),
]
CONFIG = {"objective": "vopd-rb", "student": "tiny", "teacher_url": ["grpc://a:1", "grpc://b:2"], "steps": 10}


def make_run(
    directory: Path,
    rows: list[dict[str, Any]],
    evaluations: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluations is not None:
        (directory / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


class _Page(HTMLParser):
    """Checks that elements are closed in order, and collects text and whatever a browser would fetch."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in {"src", "href"} and tag != "use"]
        if tag in {"script", "link", "iframe"}:
            self.fetched.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.mark.parametrize(
    ("rows", "evaluations", "config", "summary"),
    [
        (metrics(10), EVALUATIONS, CONFIG, {"train_seconds": 61.0, "teacher_wait_seconds": 6.1}),
        (metrics(4), EVALUATIONS[:2], CONFIG, None),  # cut off before its second evaluation
        (metrics(1), None, None, None),
        (metrics(100), [], CONFIG, None),
        (metrics(3, kl_nats=None, grad_norm=None, teacher_bytes_per_token=None), None, None, None),
        ([{"step": 1}, {"step": 2}], [evaluation(0, None, None)], {}, {}),
    ],
    ids=["complete", "cut off", "one step", "many steps", "values that were not finite", "no values"],
)
def test_whatever_there_is_of_a_run_becomes_a_page_and_a_picture(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    evaluations: list[dict[str, Any]] | None,
    config: dict[str, Any] | None,
    summary: dict[str, Any] | None,
) -> None:
    run_dir = make_run(tmp_path / "run", rows, evaluations, config, summary)
    curves, page = write_report(run_dir)
    assert (curves.name, page.name) == ("curves.png", "report.html")
    assert curves.read_bytes().startswith(b"\x89PNG")
    parsed = _Page(page.read_text("utf-8"))
    assert parsed.open == []
    assert parsed.fetched == []
    assert not re.search(r"url\((?!#)|@import", page.read_text("utf-8"))
    assert "svg" in page.read_text("utf-8")
    assert "nan" not in " ".join(parsed.text).lower()


def test_the_page_names_the_numbers_of_the_run(tmp_path: Path) -> None:
    summary = {"train_seconds": 151.0, "teacher_wait_seconds": 15.1, "teacher_bytes_per_token": 1234.5}
    run = read_run(make_run(tmp_path / "run", metrics(10), EVALUATIONS, CONFIG, summary))
    assert facts(run) == ["10 steps", "objective vopd-rb", "student tiny", "teacher grpc://a:1, grpc://b:2"]
    assert [(figure.value, figure.note) for figure in headline(run)] == [
        ("81.2%", "from 0%; the teacher itself: 90%"),
        ("0.125", "nats per token, from 1.250"),
        ("2 min 31 s", "10% of it waiting for the teacher"),
        ("1,234 B", "per completion token, both ways"),
    ]
    assert [(row.label, row.before, row.after, row.teacher, row.is_part) for row in before_and_after(run)] == [
        ("Exact match", "0%", "81.2%", "90%", False),
        ("capital", "0%", "81.2%", "90%", True),
        ("past tense", "0%", "40.6%", "45%", True),
        ("KL to the teacher, nats per token", "1.250", "0.125", "–", False),
    ]
    (comparison,) = comparisons(run)
    assert comparison.completions == [
        ("before training", "student at 0", False),
        ("after training", "student at 10", True),
        ("the teacher", "teacher at 0", False),
    ]


def test_a_run_with_several_teachers_has_a_row_for_each(tmp_path: Path) -> None:
    rows = metrics(3, num_valid_tokens=30, **{"teacher/code/num_valid_tokens": 0, "teacher/math/num_valid_tokens": 30})
    for row in rows:
        row |= {"teacher/math/kl_nats": row["kl_nats"], "teacher/math/wait_s": 0.5, "teacher/math/bytes": 1500}
        row |= {"teacher/code/wait_s": 0.0, "teacher/code/bytes": 0}
    rows[1] |= {"teacher/code/num_valid_tokens": 15, "teacher/math/num_valid_tokens": 15}
    rows[1] |= {"teacher/code/kl_nats": 0.25, "teacher/code/bytes": 300, "teacher/code/wait_s": 2.0}
    by_teacher = {"exact_match_by_teacher": {"code": 0.5, "math": 0.75}, "kl_by_teacher": {"code": 1.0, "math": 1.5}}
    evaluations = [evaluation(0, 0.625, 1.25) | by_teacher, evaluation(3, 0.7, 0.5)]
    config = CONFIG | {"teacher_url": [], "teacher": {"math": ["grpc://a:1"], "code": ["grpc://b:1", "grpc://c:1"]}}
    run = read_run(make_run(tmp_path / "run", rows, evaluations, config))
    assert facts(run)[-1] == "teachers code, math"
    assert [tuple(vars(row).values()) for row in teacher_rows(run)] == [
        ("code", "grpc://b:1, grpc://c:1", "16.7%", "0.250", "0.250", "2.0 s", "20 B"),
        ("math", "grpc://a:1", "83.3%", "1.500", "0.500", "1.5 s", "60 B"),
    ]
    parts = [(row.label, row.before, row.after) for row in before_and_after(run) if row.label.startswith("teacher ")]
    assert parts == [
        ("teacher code", "50%", "–"),
        ("teacher math", "75%", "–"),
        ("teacher code", "1.000", "–"),
        ("teacher math", "1.500", "–"),
    ]
    _, page = write_report(run.path)
    text = page.read_text("utf-8")
    assert "By teacher" in text
    assert "those of teacher code" in text  # a curve's label
    assert "code=grpc://b:1, grpc://c:1, math=grpc://a:1" in text
    assert teacher_rows(read_run(make_run(tmp_path / "one", metrics(2), [], CONFIG))) == []


def test_a_run_that_is_not_finished_says_so_and_claims_no_result(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", metrics(4), EVALUATIONS[:2], CONFIG))
    assert facts(run)[0] == "4 of 10 steps: the run goes on, or was cut off"
    assert [row.after for row in before_and_after(run)] == ["–"] * 4
    figures = {figure.label: figure for figure in headline(run)}
    assert "Exact match, held-out" not in figures
    assert figures["KL to the teacher"].value == "0.375"  # of the last step's rollouts
    assert figures["Training time"].value == "40.0 s"


def test_text_of_the_run_cannot_become_markup(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    row = evaluation(0, 0.5, 0.5)
    row["samples"][0] |= {"prompt": attack, "completion": attack, "answer": attack}
    row["exact_match_by_kind"] = {attack: 0.5, "b": 0.5}
    run_dir = make_run(tmp_path / "run", metrics(2), [row], {"student": attack, "objective": attack})
    _, page = write_report(run_dir)
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert _Page(text).open == []
    assert text.count("&lt;script&gt;") >= 6


def test_the_svg_takes_its_neutral_colours_from_the_page(tmp_path: Path) -> None:
    from vopd_client.plots import GRID, INK, svg

    run = read_run(make_run(tmp_path / "run", metrics(3), EVALUATIONS, CONFIG))
    drawing = svg(run)
    assert drawing == svg(run)
    assert drawing.startswith("<svg")
    assert INK not in drawing
    assert GRID not in drawing
    assert "currentColor" in drawing
    assert drawing in render_page(run, curves_svg=drawing)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "holds no run: there is no metrics.jsonl in it"),
        ({"metrics.jsonl": ""}, "is empty: the run has not finished its first step"),
        ({"metrics.jsonl": '{"step": 1}\nnonsense\n{"step": 3}\n'}, "metrics.jsonl:2"),
        ({"metrics.jsonl": '{"step": 1}\n', "summary.json": "{"}, "summary.json is damaged"),
        ({"metrics.jsonl": '{"step": 1}\n', "config.yaml": "- a list"}, "config.yaml is damaged"),
    ],
)
def test_a_directory_without_a_readable_run_says_what_is_wrong(
    tmp_path: Path, files: dict[str, str], problem: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunDirectoryError, match=re.escape(problem)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_directory_and_an_unwritable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="nowhere is not a directory"):
        write_report(tmp_path / "nowhere")
    run_dir = make_run(tmp_path / "run", metrics(2))
    (run_dir / "report.html").mkdir()
    with pytest.raises(RunDirectoryError, match=r"cannot write the report into .*: Is a directory"):
        write_report(run_dir)


def test_a_running_mean_does_not_lag_and_skips_what_is_missing() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0, 5.0], 1) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert running_mean([0.0, 3.0, math.nan, 9.0, 1.0], 1) == [0.0, 1.5, 6.0, 5.0, 1.0]
    assert math.isnan(running_mean([math.nan], 3)[0])


@pytest.mark.parametrize(
    ("seconds", "shown"), [(4.26, "4.3 s"), (59.9, "1 min 00 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")]
)
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
