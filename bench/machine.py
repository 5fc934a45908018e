"""What benchmarks share: a teacher process of their own, and what machine the figures are from."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

READY = re.compile(r"ready at (grpc://\S+?:\d+): ")


@contextmanager
def teacher_process(model: str, log_path: Path, flags: Sequence[str] = (), *, dtype: str = "bfloat16") -> Iterator[str]:
    """A `vopd-server` on a free port of loopback, ended with the block; gives its address once it is ready.

    Raises: RuntimeError with what it wrote when it does not start.
    """
    command = [sys.executable, "-m", "vopd_server.main", "serve", "--model", model, "--dtype", dtype]
    command += ["--port", "0", "--http-port", "None", "--admin-port", "None", *flags]
    with log_path.open("wb") as log_file:
        # A group of its own: Ctrl-C is the benchmark's to handle, which still has answers to wait for.
        process = subprocess.Popen(
            command, stdout=log_file, stderr=subprocess.STDOUT, process_group=0, preexec_fn=end_with_parent
        )
    try:
        while not (ready := READY.search(log_path.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"the teacher did not start:\n{log_path.read_text()}")
            time.sleep(0.1)
        yield ready[1]
    finally:
        process.terminate()
        process.wait()


def end_with_parent() -> None:
    """A benchmark that is killed cannot end its teacher; Linux then does."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def machine_facts(packages: Sequence[str] = ()) -> dict[str, str | int | None]:
    """Processor, cores, Python, and versions of packages."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
