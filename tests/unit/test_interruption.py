"""The first signal stops where nothing is lost, the second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from vopd_client.interruption import Interrupted, StopRequest, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_postponed_waits_for_the_next_safe_point(number: signal.Signals) -> None:
    stop, done = StopRequest(), []

    def train() -> None:
        with stop_on_signals(stop), stop.postponed():
            os.kill(os.getpid(), number)
            done.append("the rest of the step")
            stop.check()
            done.append("another step")

    with pytest.raises(Interrupted):
        train()
    assert done == ["the rest of the step"]
    assert stop.requested


def test_a_signal_outside_ends_the_work_at_once() -> None:
    done = []

    def load_models() -> None:
        with stop_on_signals(StopRequest()):
            os.kill(os.getpid(), signal.SIGINT)
            done.append("more work")

    with pytest.raises(Interrupted):
        load_models()
    assert done == []


@pytest.mark.parametrize("asked_before", [True, False])
def test_work_that_changes_nothing_is_broken_off_or_not_begun(asked_before: bool) -> None:
    stop, done = StopRequest(), []

    def evaluate() -> None:
        with stop_on_signals(stop), stop.postponed():
            if asked_before:
                os.kill(os.getpid(), signal.SIGINT)
            with stop.at_once():
                done.append("begun")
                os.kill(os.getpid(), signal.SIGINT)
                done.append("finished")

    with pytest.raises(Interrupted):
        evaluate()
    assert done == ([] if asked_before else ["begun"])


def test_an_interruption_is_not_an_error_that_something_could_handle() -> None:
    assert not issubclass(Interrupted, Exception)


def test_the_former_handlers_come_back() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with stop_on_signals(StopRequest()):
        assert signal.getsignal(signal.SIGTERM) is not former
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal; from vopd_client.interruption import *\n"
        "stop = StopRequest()\n"
        "with stop_on_signals(stop), stop.postponed():\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('second', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGTERM
    assert result.stdout == "first\n"
    assert "SIGINT: stopping at a safe point; once more to quit at once" in result.stderr


def test_another_thread_may_train_without_handlers() -> None:
    entered = threading.Event()

    def train() -> None:
        with stop_on_signals(StopRequest()):
            entered.set()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert entered.is_set()
