"""A process of vLLM's does not outlive the server, and is left alone where no server has started it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib.metadata import entry_points

import pytest

from vopd_server.engines.vllm_plugin import SERVER_PID_VARIABLE, end_with_the_server

# Says that it watches, then lives as long as its standard input is open.
CHILD = "from vopd_server.engines.vllm_plugin import *; end_with_the_server(); print('watching', flush=True); input()"


def child(told: str | None) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != SERVER_PID_VARIABLE}
    if told is not None:
        environment[SERVER_PID_VARIABLE] = told
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def test_it_ends_when_the_server_is_killed() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server,
        child(str(server.pid)) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"watching\n"
        assert process.poll() is None
        server.kill()
        assert process.wait(30) == 1


def test_it_ends_at_once_when_the_server_has_gone_before() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as server:
        server.wait()
    with child(str(server.pid)) as process:
        assert process.wait(30) == 1


@pytest.mark.parametrize("told", [None, "", "no number"])
def test_it_does_nothing_where_no_server_is_named(told: str | None) -> None:
    with child(told) as process:
        told_back, _ = process.communicate(b"\n", timeout=30)
        assert (told_back, process.returncode) == (b"watching\n", 0)


def test_the_server_does_not_watch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_PID_VARIABLE, str(os.getpid()))
    end_with_the_server()
    assert "vopd-server-watch" not in {thread.name for thread in threading.enumerate()}


def test_vllm_finds_it() -> None:
    (found,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "vopd")
    assert found.load() is end_with_the_server
