"""Who was busy when: the row of a step, which steps are drawn, and the drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vopd_client.report import write_report
from vopd_client.run_data import read_run
from vopd_client.scoring import Flight
from vopd_client.timeline import MAX_SPANS, Timeline, merged, spread
from vopd_client.timeline_plot import choose_window, timeline_svg


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_row_has_the_spans_of_every_lane_in_seconds_from_the_start_of_the_step() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock, wall_clock=lambda: 1_700_000_000.25)
    for lane, seconds in (("sampling", 2.0), ("waiting", 0.5), ("forward", 1.0), ("backward", 2.0), ("waiting", 0.25)):
        with timeline.span(lane):  # type: ignore[arg-type]
            clock.now += seconds
    assert timeline.seconds("waiting") == 0.75
    assert timeline.seconds("optimizer") == 0
    flights = [Flight(101.0, 102.25), Flight(97.5, 99.0)]
    assert timeline.to_row(3, sampled_steps=[4], flights=flights) == {
        "step": 3, "started_at": 1_700_000_000.25, "step_s": 5.75, "sampled_steps": [4],
        "sampling": [[0.0, 2.0]], "waiting": [[2.0, 2.5], [5.5, 5.75]], "forward": [[2.5, 3.5]],
        "backward": [[3.5, 5.5]], "optimizer": [], "num_flights": 2,
        "flights": [[-2.5, -1.0], [1.0, 2.25]],  # one left, and came back, before this step began
    }  # fmt: skip


def test_what_fails_was_busy_until_it_failed() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)

    def fail() -> None:
        with timeline.span("forward"):
            clock.now += 3
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert timeline.seconds("forward") == 3


def test_a_row_stays_small_whatever_the_step_holds() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    for _ in range(5000):
        for lane in ("waiting", "forward", "backward"):
            with timeline.span(lane):  # type: ignore[arg-type]
                clock.now += 0.1234567
    flights = [Flight(100 + index / 7, 150 + index / 3) for index in range(5000)]
    row = timeline.to_row(1, sampled_steps=[1], flights=flights)
    assert row["num_flights"] == 5000
    assert all(len(row[name]) <= MAX_SPANS for name in ("flights", "waiting", "forward", "backward"))
    assert len(json.dumps(row)) < 12_000
    assert row["forward"][0][0] == pytest.approx(0.1235)  # from the first
    assert row["backward"][-1][1] == row["step_s"]  # to the last


def test_few_spans_stay_as_they_are_and_many_are_thinned_evenly() -> None:
    few = [(0.0, 1.0), (2.0, 3.0)]
    assert merged(few, 2) == few
    assert spread(few, 2) == few
    assert merged([], 2) == []
    many = [(float(start), start + 0.5) for start in range(7)]
    assert merged(many, 3) == [(0.0, 2.5), (3.0, 5.5), (6.0, 6.5)]
    assert spread(many, 3) == [many[0], many[3], many[6]]


def test_a_flight_lands_once() -> None:
    flight = Flight(sent_at=1.0)
    flight.land()
    landed_at = flight.answered_at
    flight.land(object())
    assert flight.answered_at == landed_at > 1.0


# ---------------------------------------------------------------- which steps, and their picture


def row(step: int, started_at: float, step_s: float = 4.0, *, staleness: int = 1) -> dict[str, Any]:
    return {
        "step": step, "started_at": started_at, "step_s": step_s, "sampled_steps": [step + staleness],
        "sampling": [[0, 1.5]], "waiting": [[1.5, 2.0]], "forward": [[2.0, 2.5]], "backward": [[2.5, 3.5]],
        "optimizer": [[3.5, 3.9]], "num_flights": 2, "flights": [[-2.0, 0.5], [0.5, 2.0]],
    }  # fmt: skip


def in_a_row(seconds: list[float], *, first: int = 1) -> list[dict[str, Any]]:
    """Steps that follow one another at once."""
    started_at = [1000 + sum(seconds[:index]) for index in range(len(seconds))]
    return [
        row(first + index, start, step_s) for index, (start, step_s) in enumerate(zip(started_at, seconds, strict=True))
    ]


def steps_shown(rows: list[dict[str, Any]]) -> list[int]:
    window = choose_window(rows)
    return [] if window is None else [row["step"] for row in window.shown]


def test_two_consecutive_steps_of_the_usual_length_are_drawn_neither_the_first_nor_the_last() -> None:
    assert steps_shown(in_a_row([90, 80, 4.0, 4.5, 4.5, 4.4, 9.0, 1.0])) == [5, 6]
    assert steps_shown(in_a_row([90, 4.0, 4.0])) == [2, 3]
    assert steps_shown(in_a_row([90, 4.0])) == [1, 2]
    assert steps_shown(in_a_row([90])) == [1]
    assert steps_shown([]) == []


def test_steps_with_an_evaluation_or_an_interruption_between_them_are_no_pair() -> None:
    rows = [*in_a_row([4.0] * 3), row(4, 2000.0)]
    assert steps_shown([rows[1], rows[3]]) == [4]
    assert steps_shown(rows[1:]) == [2, 3]
    again = [row(5, 3000.0), row(6, 2500.0)]  # another machine's clock
    assert steps_shown(again) == [6]


def test_requests_of_the_step_after_those_shown_are_drawn_too() -> None:
    window = choose_window(in_a_row([4.0] * 7))
    assert window is not None
    assert [row["step"] for row in window.shown] == [3, 4]
    assert [row["step"] for row in window.flown] == [3, 4, 5]
    assert window.offset(window.flown[-1]) == window.seconds == 8.0


def make_run(directory: Path, timeline: list[dict[str, Any]] | None) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    (directory / "config.yaml").write_text(yaml.safe_dump({"max_staleness": 1}))
    if timeline is not None:
        (directory / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timeline))
    return directory


@pytest.mark.parametrize("num_steps", [1, 8])
def test_the_report_shows_who_waited_for_whom(tmp_path: Path, num_steps: int) -> None:
    run_dir = make_run(tmp_path / "run", in_a_row([4.0] * num_steps))
    assert [path.name for path in write_report(run_dir)] == ["curves.png", "report.html", "timeline.png"]
    assert (run_dir / "timeline.png").read_bytes().startswith(b"\x89PNG")
    page = (run_dir / "report.html").read_text()
    assert "Who waited for whom" in page
    drawing = timeline_svg(read_run(run_dir))
    assert drawing is not None
    assert drawing in page
    assert drawing == timeline_svg(read_run(run_dir))  # equal runs give equal files


@pytest.mark.parametrize("timeline", [None, []])
def test_a_run_without_a_timeline_has_a_report_without_one(
    tmp_path: Path, timeline: list[dict[str, Any]] | None
) -> None:
    run_dir = make_run(tmp_path / "run", timeline)
    assert [path.name for path in write_report(run_dir)] == ["curves.png", "report.html"]
    assert "Who waited for whom" not in (run_dir / "report.html").read_text()
