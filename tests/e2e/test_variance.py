"""`vopd-client variance` as people start it: a teacher in a process of its own, files, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from teacher_process import RunningTeacher
from warm_python import WarmProcess
from workplace import ONE_THREAD, PATIENCE_S, Workplace

pytestmark = pytest.mark.e2e

CLIENT = "vopd_client.cli"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("variance"))


@pytest.fixture(scope="module")
def teacher(place: Workplace) -> Iterator[RunningTeacher]:
    with place.teacher("--allow-full-vocab") as running:
        yield running


def arguments(place: Workplace, *flags: str) -> list[str]:
    return ["variance", "--student", str(place.student_dir), "--prompts", str(place.prompts), "--device", "cpu", *flags]


def environment(place: Workplace) -> dict[str, str]:
    return {**os.environ, **ONE_THREAD, "XDG_CACHE_HOME": str(place.directory / "cache")}


def start(place: Workplace, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", CLIENT, *arguments(place, *flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(place),
    )


def measured(place: Workplace, path: Path, *flags: str) -> tuple[dict, str]:
    """The JSON and what was printed."""
    given = arguments(place, "--max-new-tokens", "8", "--support-sizes", "1,4,32", "--json-file", str(path), *flags)
    printed, complaints = path.with_suffix(".out"), path.with_suffix(".err")
    with printed.open("wb") as out, complaints.open("wb") as err:
        process = WarmProcess(
            CLIENT, given, stdout=out.fileno(), stderr=err.fileno(), env=environment(place), own_group=False
        )
    assert process.wait(PATIENCE_S) == 0, complaints.read_text()
    return json.loads(path.read_text()), printed.read_text()


def values(part: object) -> list[float]:
    """Every number of a tree, in order."""
    if isinstance(part, dict):
        return [value for item in part.values() for value in values(item)]
    if isinstance(part, list):
        return [value for item in part for value in values(item)]
    return [part] if isinstance(part, (int, float)) and not isinstance(part, bool) else []


def test_a_teacher_over_the_wire_and_one_in_this_process_give_the_same_table(
    place: Workplace, teacher: RunningTeacher, tmp_path: Path
):
    picture = tmp_path / "variance.png"
    over_the_wire, printed = measured(
        place, tmp_path / "wire.json", "--teacher-url", teacher.url, "--plot-file", str(picture)
    )
    here, _ = measured(place, tmp_path / "here.json", "--teacher-model", str(place.teacher_dir))
    assert over_the_wire["exact"] is True
    assert here["exact"] is True
    for key in ("kl_nats", "ratios_to_opd", "supports", "adaptive_supports"):
        assert values(over_the_wire[key]) == pytest.approx(values(here[key]), rel=1e-3, abs=1e-9)
    assert over_the_wire["conclusion"] in " ".join(printed.split())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_server_that_keeps_its_head_gives_an_approximate_table(place: Workplace, tmp_path: Path):
    with place.teacher() as running:
        written, printed = measured(place, tmp_path / "v.json", "--teacher-url", running.url)
    assert written["exact"] is False
    assert written["approximation"]["size"] == 259
    assert "approximate: this teacher gives no hidden states" in " ".join(printed.split())


def test_ctrl_c_ends_it_without_a_traceback(place: Workplace, teacher: RunningTeacher):
    process = start(place, "--teacher-url", teacher.url, "--max-new-tokens", "2000", "--support-sizes", "1,4")
    assert process.stdout is not None
    give_up_s = time.monotonic() + PATIENCE_S
    while not (line := process.stdout.readline()).startswith("sampling"):
        assert line, process.communicate()[1]
        assert time.monotonic() < give_up_s
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "SIGINT: stopping" in complaints
    assert "Traceback" not in complaints
