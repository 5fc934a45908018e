"""Signals and remains of processes that vLLM would start, with others in their place."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from vopd_server.engines.vllm_processes import end_remaining, interrupts_held_off, running_processes

SAY_MASK = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
# A parent that hears SIGTERM and a child that does not.
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
FAMILY = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {DEAF!r}]); time.sleep(60)"


def is_blocked_in_a_child() -> str:
    return subprocess.run([sys.executable, "-c", SAY_MASK], capture_output=True, text=True, check=True).stdout.strip()


def test_processes_started_meanwhile_do_not_hear_ctrl_c_and_others_do() -> None:
    with interrupts_held_off():
        assert is_blocked_in_a_child() == "True"
        # With its first process multiprocessing starts a tracker, which puts SIGINT back into the mask.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert signal.SIGINT in pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ()))
        assert is_blocked_in_a_child() == "True"
    assert is_blocked_in_a_child() == "False"


def test_children_of_multiprocessing_are_known_and_others_are_not() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        assert [process.pid for process in running_processes()] == [child.pid]
    finally:
        for process in (child, other):
            process.kill()
        child.join()
        other.wait()


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        process = psutil.Process(parent.pid)
        yield [process, *process.children()]
        parent.kill()


def test_what_does_not_end_by_itself_is_killed(family: list[psutil.Process], caplog: pytest.LogCaptureFixture) -> None:
    parent, child = family
    for process in family:
        process.terminate()
    end_remaining(family, grace_s=0.5)
    assert [record.getMessage() for record in caplog.records] == [
        f"vLLM's process {child.pid} has not ended within 0.5 s: killed"
    ]
    for process in (parent, child):
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_nobody_is_waited_for_who_has_gone(family: list[psutil.Process], caplog: pytest.LogCaptureFixture) -> None:
    for process in family:
        process.kill()
    began_s = time.monotonic()
    end_remaining(family, grace_s=30)
    assert time.monotonic() - began_s < 15
    assert not caplog.records
