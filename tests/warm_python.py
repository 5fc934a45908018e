"""Processes that start in a moment: forked from a Python that has imported torch and its like already.

Nothing of ours is imported before the fork, nor anything that holds threads, sockets or locks. The process is one
like any other, with a process group, signals and an exit code of its own; `subprocess` where the start is the point.
What differs is the seed of hashes, which all have from one Python: where runs are compared, one starts afresh.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PRELOADED = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "fastapi",
    "uvicorn",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
)
NUMBER = struct.Struct("<q")
MAX_JOB_BYTES = 1_000_000


def can_be_warm() -> bool:
    """vLLM starts, and looks for, processes of its own: where it is installed, everything starts afresh."""
    return find_spec("vllm") is None


class WarmProcess:
    """What the tests use of `subprocess.Popen`.

    program: a module's name, or a script's path that ends with .py. draws: whether trainings draw their reports,
    which takes longer than to train a tiny model.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        stdout: int,
        stderr: int,
        env: dict[str, str],
        own_group: bool,
        cwd: Path | None = None,
        draws: bool = True,
    ) -> None:
        self._told, telling = os.pipe()
        job = {
            "program": program,
            "arguments": list(arguments),
            "env": env,
            "own_group": own_group,
            "cwd": str(cwd or Path.cwd()),
            "draws": draws,
        }
        try:
            socket.send_fds(template(), [json.dumps(job).encode()], [telling, stdout, stderr])
        finally:
            os.close(telling)
        self.returncode: int | None = None
        self.pid = self._next_number()

    def _next_number(self) -> int:
        told = os.read(self._told, NUMBER.size)
        if len(told) < NUMBER.size:
            raise RuntimeError("the Python that is forked has ended")
        number: int = NUMBER.unpack(told)[0]
        return number

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises: subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._next_number()
            os.close(self._told)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def template() -> socket.socket:
    """The connection to the Python that is forked, one of each test process; it ends with its end of the connection."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_JOB_BYTES)
    with its:
        process = subprocess.Popen(
            [sys.executable, __file__, str(its.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            # No threads; and who asks whether there is a GPU must not start CUDA, which no fork survives.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )

    def end() -> None:
        ours.close()
        process.wait(30)

    atexit.register(end)
    return ours


# ---------------------------------------------------------------- in the Python that is forked


def fork_for_jobs(channel: socket.socket) -> dict:
    """Returns in each process that is forked, with its job; in this one when nobody can ask any more: SystemExit."""
    running: dict[int, tuple[int, int]] = {}  # a descriptor of the process: its id, and where its end is told
    while True:
        ready, _, _ = select.select([channel, *running], [], [])
        for process_fd in set(ready) - {channel}:
            process_id, telling = running.pop(process_fd)
            code = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # nobody waited for it
                os.write(telling, NUMBER.pack(code))
            os.close(process_fd)
            os.close(telling)
        if channel in ready:
            message, fds, _, _ = socket.recv_fds(channel, MAX_JOB_BYTES, 3)
            if not message:
                sys.exit(0)
            telling, stdout, stderr = fds
            process_id = os.fork()
            if process_id == 0:
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                channel.close()
                for fd in [*fds, *running, *(other for _, other in running.values())]:
                    os.close(fd)
                return json.loads(message)
            os.close(stdout)
            os.close(stderr)
            if json.loads(message)["own_group"]:
                os.setpgid(process_id, process_id)  # before anybody can know its id
            running[os.pidfd_open(process_id)] = (process_id, telling)
            os.write(telling, NUMBER.pack(process_id))


def become(job: dict) -> None:
    """What a new Python would do with `-m MODULE ARGUMENTS`, or with `SCRIPT ARGUMENTS`."""
    import numpy as np

    if job["own_group"]:
        os.setpgid(0, 0)  # here as well: whoever comes first
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    time.tzset()
    tempfile.tempdir = None
    np.random.seed()  # which no two processes share
    if not job["draws"]:
        import vopd_client.report

        vopd_client.report.write_report = lambda run_dir: []
    program = job["program"]
    sys.argv = [program, *job["arguments"]]
    if program.endswith(".py"):
        sys.path[0] = os.path.dirname(program)
        runpy.run_path(program, run_name="__main__")
    else:
        sys.path[0] = job["cwd"]
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all: who is forked is told by pytest
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
    gc.collect()
    gc.freeze()
    become(fork_for_jobs(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
