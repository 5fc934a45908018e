"""The servers that `make bench-teacher` plays its workload against: processes on loopback that end with the block.

All see the same model in bfloat16, the same longest sequence and the same two cores.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx2
import psutil

from machine import READY, end_with_parent

Contestant = Literal["stock", "vllm", "transformers", "null"]
CONTESTANTS: tuple[Contestant, ...] = ("stock", "vllm", "transformers", "null")

MAX_CONTEXT_LENGTH = 1023  # tokens; vLLM counts the one that it always generates, too
START_TIMEOUT_S = 900.0  # vLLM compiles, and longer on a busy machine
END_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 5.0
# Of vLLM, stock and ours alike. Its log goes to a file that is read when the start fails only.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class ServerError(RuntimeError):
    """A server that cannot be started, with what it wrote."""


@dataclass(frozen=True)
class Launch:
    """How one is started. ready: finds the address in its log; None: `url` answers GET /health with 200."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: re.Pattern[str] | None = READY
    url: str = ""


@dataclass(frozen=True)
class Server:
    """One that is ready. start_s: seconds until it was."""

    contestant: Contestant
    pid: int
    url: str
    start_s: float


def launch_of(contestant: Contestant, *, model: str, k: int, vllm_python: Path) -> Launch:
    """Raises: ServerError when the environment with vLLM is missing."""
    if contestant in ("stock", "vllm") and not vllm_python.exists():
        raise ServerError(
            f"{vllm_python} is missing: `make test-vllm` or `sh deploy/vllm-env.sh .venv-vllm` sets up the environment "
            "that vLLM runs in"
        )
    ours = ["--model", model, "--port", "0", "--http-port", "None", "--admin-port", "None", "--log-level", "warning"]
    ours += ["--max-context-length", str(MAX_CONTEXT_LENGTH)]
    served = ["-m", "vopd_server.main", "serve", "--dtype", "bfloat16"]
    match contestant:
        case "stock":
            port = free_port()
            command = [str(vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
            command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
            command += ["--max-model-len", str(MAX_CONTEXT_LENGTH + 1), "--max-logprobs", str(k)]
            return Launch(command, VLLM_ENVIRONMENT, ready=None, url=f"http://127.0.0.1:{port}")
        case "vllm":
            return Launch([str(vllm_python), *served, "--engine", "vllm", *ours], VLLM_ENVIRONMENT)
        case "transformers":
            return Launch([sys.executable, *served, "--engine", "transformers", *ours])
        case "null":
            return Launch([sys.executable, str(Path(__file__).with_name("null_teacher.py")), *ours])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(
    contestant: Contestant, launch: Launch, log_path: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Started, ready, and ended with all its processes.

    Raises: ServerError with the end of its log when it ends or is not ready in time.
    """
    began_s = time.monotonic()
    with log_path.open("wb") as log_file:
        # A session of its own: Ctrl-C is the benchmark's to handle, and its processes can be told from ours.
        process = subprocess.Popen(
            launch.command,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**environment, **launch.environment},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        url = _wait_until_ready(contestant, process, launch, log_path, began_s + START_TIMEOUT_S)
        yield Server(contestant, process.pid, url, time.monotonic() - began_s)
    finally:
        end_tree(process)


def _wait_until_ready(
    contestant: Contestant, process: subprocess.Popen[bytes], launch: Launch, log_path: Path, give_up_s: float
) -> str:
    with httpx2.Client(timeout=2.0, trust_env=False) as health:  # one: each reads all the certificates there are
        while not (url := _ready_url(launch, log_path, health)):
            if process.poll() is not None or time.monotonic() > give_up_s:
                state = "is not ready in time" if process.returncode is None else f"ended with {process.returncode}"
                raise ServerError(f"the {contestant} server {state}:\n{log_path.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
    return url


def _ready_url(launch: Launch, log_path: Path, health: httpx2.Client) -> str:
    """Empty while it is not ready."""
    if launch.ready is None:
        return launch.url if _is_healthy(health, launch.url) else ""
    found = launch.ready.search(log_path.read_text(errors="replace"))
    return found[1] if found else ""


def _is_healthy(client: httpx2.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == httpx2.codes.OK
    except httpx2.TransportError:
        return False


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM for the server, which ends its own processes; what is left after a while is killed."""
    tree = tree_of(process.pid)
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
    finally:  # a second Ctrl-C, too
        _, left = psutil.wait_procs(tree, timeout=1.0)
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        psutil.wait_procs(left, timeout=KILL_TIMEOUT_S)


def tree_of(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, itself first; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
