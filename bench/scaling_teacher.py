"""A teacher process whose memory can be watched: its peak since it was last asked to forget it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from machine import READY, end_with_parent

KIBIBYTE = 2**10
FORGET_PEAK = "5"  # what /proc/PID/clear_refs takes for it


@dataclass(frozen=True)
class WatchedTeacher:
    """A running teacher, on Linux."""

    pid: int
    url: str

    def memory_bytes(self) -> int:
        """Resident now."""
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        """The most that was resident since `forget_peak`, or since the process began."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text(FORGET_PEAK)

    def _status(self, name: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return status_bytes(text, name)


def status_bytes(text: str, name: str) -> int:
    """A size in what /proc/PID/status says. Raises: KeyError when it does not say it."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise KeyError(f"/proc/PID/status has no {name}")
    return int(found[1]) * KIBIBYTE


@contextmanager
def watched_teacher(model: Path, log_path: Path, flags: Sequence[str] = ()) -> Iterator[WatchedTeacher]:
    """Serves `model` in bfloat16 with the transformers engine on a free port of loopback; ends with the block.

    Raises: RuntimeError with what it wrote when it does not start.
    """
    command = [sys.executable, "-m", "vopd_server.main", "serve", "--model", str(model)]
    command += ["--engine", "transformers", "--dtype", "bfloat16", "--log-level", "warning"]
    command += ["--port", "0", "--http-port", "None", "--admin-port", "None", *flags]
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            command, stdout=log_file, stderr=subprocess.STDOUT, process_group=0, preexec_fn=end_with_parent
        )
    try:
        while not (ready := READY.search(log_path.read_text(errors="replace"))):
            if process.poll() is not None:
                raise RuntimeError(f"the teacher did not start:\n{log_path.read_text(errors='replace')}")
            time.sleep(0.1)
        yield WatchedTeacher(process.pid, ready[1])
    finally:
        process.terminate()
        process.wait()
