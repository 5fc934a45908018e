"""A real `vopd-server serve` in a process of its own, to be killed, stopped and started again by tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from warm_python import WarmProcess, can_be_warm

START_TIMEOUT_S = 240.0
ANNOUNCED = re.compile(
    r"ready at (?P<grpc>grpcs?://\S+?:(?P<port>\d+))"
    r"(, (?P<http>https?://\S+?:\d+))?( \(admin (?P<admin>http://\S+?:\d+)\))?: "
)


class RunningTeacher:
    """A teacher that is ready, or was. As a context manager it is gone at the end."""

    def __init__(self, process: subprocess.Popen[bytes] | WarmProcess, log_path: Path) -> None:
        self._process = process
        self._log_path = log_path
        self.pid = process.pid
        self.url = ""  # gRPC's
        self.port = 0
        self.http_url = ""
        self.admin_url = ""

    def log(self) -> str:
        """Everything it has written so far, to standard output and standard error."""
        return self._log_path.read_text(errors="replace")

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when it has announced its address. Raises: RuntimeError, with the log, when it never will."""
        give_up_s = time.monotonic() + timeout_s
        while not (announced := ANNOUNCED.search(self.log())):
            code = self._process.poll()
            if code is not None:
                raise RuntimeError(f"the teacher ended with {code} before it was ready:\n{self.log()}")
            if time.monotonic() > give_up_s:
                self.kill()
                raise RuntimeError(f"the teacher was not ready within {timeout_s} s:\n{self.log()}")
            time.sleep(0.05)
        self.url, self.port = announced["grpc"], int(announced["port"])
        self.http_url, self.admin_url = announced["http"] or "", announced["admin"] or ""

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def send_group_signal(self, number: signal.Signals) -> None:
        """To the teacher and to every process that it has started, as a terminal does on Ctrl-C."""
        os.killpg(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(timeout_s)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code once it has drained."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, to whatever it has started as well: gone at once, without a word to its clients."""
        self.send_group_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> RunningTeacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
            self.kill()
        self._log_path.unlink(missing_ok=True)


def spawn(command: Sequence[str], env: dict[str, str] | None = None) -> RunningTeacher:
    """Starts `python COMMAND` as a process group and does not wait. `env` is added to this process's own."""
    with tempfile.NamedTemporaryFile(prefix="teacher-", suffix=".log", delete=False) as log_file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log_file,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**os.environ, **(env or {})},
        )
    return RunningTeacher(process, Path(log_file.name))


def spawn_warm(arguments: Sequence[str], env: dict[str, str] | None = None) -> RunningTeacher:
    """The same with `vopd-server ARGUMENTS`, forked from a Python that has imported torch and transformers."""
    with tempfile.NamedTemporaryFile(prefix="teacher-", suffix=".log", delete=False) as log_file:
        process = WarmProcess(
            "vopd_server.main",
            arguments,
            stdout=log_file.fileno(),
            stderr=log_file.fileno(),
            env={**os.environ, **(env or {})},
            own_group=True,
        )
    return RunningTeacher(process, Path(log_file.name))


def start_teacher(
    model_dir: Path | str,
    *flags: str,
    port: int = 0,
    http_port: int = 0,
    env: dict[str, str] | None = None,
    timeout_s: float = START_TIMEOUT_S,
    afresh: bool = False,
) -> RunningTeacher:
    """Serves `model_dir` and returns when the teacher is ready. Port 0: any free one.

    afresh: in a Python that has imported nothing yet, as users start it, five seconds later.

    Raises: RuntimeError, with the teacher's log, when it does not get ready.
    """
    ports = ["--port", str(port), "--http-port", str(http_port), "--admin-port", "0"]
    arguments = ["serve", "--model", str(model_dir), *ports, *flags]
    if afresh or not can_be_warm():
        teacher = spawn(["-m", "vopd_server.main", *arguments], env)
    else:
        teacher = spawn_warm(arguments, env)
    try:
        teacher.wait_until_ready(timeout_s)
    except BaseException:
        teacher.__exit__(None, None, None)
        raise
    return teacher
