"""The blocking facade of the client against a scripted teacher in a thread: futures, closing, interrupts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from asking import assert_answers, sequence
from fake_teacher import HEAD, TOKENS, FakeTeacher, Script
from vopd_client.errors import (
    TeacherUnavailableError,
)
from vopd_client.teacher import RemoteTeacher
from vopd_client.types import SequenceScores


class TeacherThread:
    """A scripted teacher in a thread of its own, for tests that block."""

    def __init__(self, teacher_type: type[FakeTeacher], script: Script) -> None:
        self.teacher = teacher_type(script)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> FakeTeacher:
        self._thread.start()
        self.call(self.teacher.start())
        return self.teacher

    def __exit__(self, *_exception: object) -> None:
        self.call(self.teacher.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_the_blocking_facade_scores_from_many_threads(teacher_type):
    with (
        TeacherThread(teacher_type, Script()) as server,
        RemoteTeacher.connect([server.url], temperature=0.5) as teacher,
    ):
        futures: dict[int, Future[SequenceScores]] = {}

        def submit(first: int) -> None:
            futures.update({index: teacher.submit(sequence(index)) for index in range(first, first + 50)})

        threads = [threading.Thread(target=submit, args=(first,)) for first in range(0, 200, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, future in futures.items():
            assert_answers(future.result(), sequence(index), 0.5)
        assert len(futures) == 200
        assert teacher.info.model_id == "fake"
        assert teacher.tokenizer()[0] == TOKENS
        [scores] = teacher.score([sequence(7)])
        assert_answers(scores, sequence(7), 0.5)
        assert teacher.bytes_sent > 0
        assert teacher.bytes_received > 0
        assert teacher.waiting_reason == ""


def test_the_blocking_facade_fetches_the_output_head(teacher_type, tmp_path: Path):
    with (
        TeacherThread(teacher_type, Script(head=HEAD)) as server,
        RemoteTeacher.connect(server.url) as teacher,
    ):
        path = teacher.head_file(tmp_path)
        assert path.read_bytes() == HEAD
        assert teacher.head_file(tmp_path) == path
        assert (teacher.head_bytes_received, teacher.bytes_received) == (len(HEAD), 0)


def test_futures_fail_when_the_time_is_up(teacher_type):
    script = Script(answer_nothing=True)
    with TeacherThread(teacher_type, script) as server, RemoteTeacher.connect(server.url, timeout_s=0.2) as teacher:
        futures = [teacher.submit(sequence(index)) for index in range(3)]
        for future in futures:
            with pytest.raises(TeacherUnavailableError, match="no progress"):
                future.result()


def test_closing_the_facade_fails_pending_futures_and_refuses_new_ones(teacher_type):
    with TeacherThread(teacher_type, Script(answer_nothing=True)) as server:
        teacher = RemoteTeacher.connect(server.url)
        futures = [teacher.submit(sequence(index)) for index in range(3)]
        teacher.close()
        teacher.close()
        for future in futures:
            with pytest.raises(TeacherUnavailableError, match="closed"):
                future.result()
        with pytest.raises(TeacherUnavailableError, match="closed"):
            teacher.submit(sequence())


def test_a_cancelled_future_gives_up_its_answer_only(teacher_type):
    with (
        TeacherThread(teacher_type, Script(hold_answers_until=2)) as server,
        RemoteTeacher.connect(server.url) as teacher,
    ):
        given_up = teacher.submit(sequence(0))
        assert given_up.cancel()
        kept = teacher.submit(sequence(1))
        server.script.hold_answers_until = 1
        assert_answers(teacher.submit(sequence(2)).result(), sequence(2))
        assert_answers(kept.result(), sequence(1))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_an_interrupt_while_waiting_for_a_teacher_ends_the_program_quietly(scheme):
    program = (
        "import signal, threading, os\n"
        "from vopd_client.teacher import RemoteTeacher\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        f"    RemoteTeacher.connect('{scheme}://127.0.0.1:1', timeout_s=600)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("interrupted\n", "", 0)


def test_a_program_that_forgets_to_close_its_teacher_ends_quietly(teacher_type):
    with TeacherThread(teacher_type, Script()) as server:
        program = (
            "import numpy as np\n"
            "from vopd_client.teacher import RemoteTeacher\n"
            "from vopd_client.types import SequenceToScore\n"
            f"teacher = RemoteTeacher.connect({server.url!r})\n"
            "teacher.submit(SequenceToScore(np.arange(3), np.arange(3))).result()\n"
            "print('done')\n"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert (ended.stdout, ended.stderr, ended.returncode) == ("done\n", "", 0)


def test_a_loopback_teacher_is_not_asked_through_a_proxy(monkeypatch, teacher_type):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with TeacherThread(teacher_type, Script()) as server, RemoteTeacher.connect(server.url, timeout_s=20) as teacher:
        assert teacher.info.vocab_size > 0
