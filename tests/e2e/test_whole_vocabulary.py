"""Objectives over the whole vocabulary with a teacher in another process: hidden states, and its head in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from teacher_process import RunningTeacher
from workplace import Workplace, assert_same_run

pytestmark = pytest.mark.e2e

STEPS = ("--steps", "6")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("whole-vocabulary"))


@pytest.fixture(scope="module")
def teacher(place: Workplace) -> Iterator[RunningTeacher]:
    with place.teacher("--allow-full-vocab") as teacher:
        yield teacher


@pytest.fixture(scope="module")
def cache(place: Workplace) -> tuple[str, str]:
    return ("--head-cache", str(place.directory / "heads"))


@pytest.mark.parametrize("objective", ["full-kl", "vopd-full"])
def test_a_teacher_far_away_teaches_what_one_in_the_same_process_does(
    place: Workplace, teacher: RunningTeacher, cache: tuple[str, str], objective: str
) -> None:
    """In float32, over both transports: the same hidden states, the same head, the same bits."""
    choices = (*STEPS, "--objective", objective, *cache)
    place.complete(f"{objective}-grpc", teacher.url, *choices)
    place.complete(f"{objective}-http", teacher.http_url, *choices, afresh=objective == "full-kl")
    assert_same_run(place, f"{objective}-grpc", f"{objective}-http")
    local = ("--teacher-url", "", "--teacher-model", str(place.teacher_dir))
    place.complete(f"{objective}-local", "", *local, *choices)
    for remote, here in zip(place.metrics(f"{objective}-grpc"), place.metrics(f"{objective}-local"), strict=True):
        for name, value in here.items():
            assert remote[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_the_head_is_fetched_once_and_read_from_the_cache_from_then_on(
    place: Workplace, teacher: RunningTeacher, tmp_path: Path
) -> None:
    cache, fetches = tmp_path / "heads", []
    for name in ("first", "second"):
        before = teacher.log().count("GetHead")
        place.complete(name, teacher.url, *STEPS, "--objective", "full-kl", "--head-cache", str(cache))
        fetches.append(teacher.log().count("GetHead") - before)
    assert fetches == [1, 0]
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    assert_same_run(place, "first", "second")


def test_a_teacher_that_keeps_its_head_says_so_before_the_run_starts(place: Workplace) -> None:
    with place.teacher() as teacher, place.trainer("refused", teacher.url, "--objective", "vopd-full") as trainer:
        assert trainer.wait() == 2
        assert "needs the teacher's whole distribution" in trainer.log()
        assert "--allow-full-vocab" in trainer.log()
