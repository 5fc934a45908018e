"""The teacher process of the soak: its keys, what /proc says of it, and its admin listener."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from machine import end_with_parent
from vopd_server.key_file import NO_KEYS, new_key, serialise, utc_now, with_key
from vopd_server.tenancy import TenantLimits

READY = re.compile(r"ready at (grpc://\S+), (http://\S+) \(admin (http://[^)]+)\): ")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class ProcessSample:
    """at_s: since the soak began. cpu_s: user and system, since the process began."""

    at_s: float
    memory_mib: float
    descriptors: int
    threads: int
    cpu_s: float


def sample_process(pid: int, at_s: float) -> ProcessSample:
    """What Linux knows of a process; of no other system."""
    proc = Path(f"/proc/{pid}")
    told = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
    return ProcessSample(
        at_s=round(at_s, 2),
        memory_mib=round(int(told["VmRSS"].split()[0]) * 1024 / MEBIBYTE, 2),
        descriptors=len(os.listdir(proc / "fd")),
        threads=int(told["Threads"]),
        cpu_s=sum(map(int, ticks)) / TICKS_PER_S,
    )


@dataclass(frozen=True)
class SoakTeacher:
    """A running teacher. keys: by tenant. log_path: what it has written."""

    pid: int
    url: str
    http_url: str
    admin_url: str
    keys: Mapping[str, str]
    log_path: Path

    async def status(self) -> dict[str, Any]:
        """/status.json of the moment."""
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            answer: dict[str, Any] = (await client.get(f"{self.admin_url}/status.json")).json()
            return answer

    async def rejections_of_strangers(self) -> dict[str, int]:
        """Calls without a valid key, which are no tenant's, by code."""
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            text = (await client.get(f"{self.admin_url}/metrics")).text
        found = re.findall(r'^vopd_rejections_total\{code="(\w+)",tenant=""\} ([\d.e+]+)$', text, re.MULTILINE)
        return {code: int(float(count)) for code, count in found}

    def errors_logged(self) -> list[str]:
        """Lines of the log that say error, or begin a traceback."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return [line for line in lines if " error " in line.lower()[:60] or line.startswith("Traceback")]


@contextmanager
def soak_teacher(
    model: str, directory: Path, limits: Mapping[str, TenantLimits], flags: Sequence[str]
) -> Iterator[SoakTeacher]:
    """Serves `model` in bfloat16 to these tenants on free ports of loopback, and ends with the block.

    Raises: RuntimeError with what it wrote when it does not start.
    """
    file, keys = NO_KEYS, {}
    for tenant_id, of_tenant in limits.items():
        keys[tenant_id], stored = new_key(tenant_id, of_tenant, created_at=utc_now())
        file = with_key(file, stored)
    keys_path, log_path = directory / "keys.json", directory / "teacher.log"
    keys_path.write_text(serialise(file))
    command = [sys.executable, "-m", "vopd_server.main", "serve", "--model", model, "--engine", "transformers"]
    command += ["--dtype", "bfloat16", "--port", "0", "--http-port", "0", "--admin-port", "0"]
    command += ["--keys-file", str(keys_path), "--log-level", "warning", *flags]
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            command, stdout=log_file, stderr=subprocess.STDOUT, process_group=0, preexec_fn=end_with_parent
        )
    try:
        while not (ready := READY.search(log_path.read_text().replace("\n", " "))):
            if process.poll() is not None:
                raise RuntimeError(f"the teacher did not start:\n{log_path.read_text()}")
            time.sleep(0.1)
        yield SoakTeacher(process.pid, ready[1], ready[2], ready[3], keys, log_path)
    finally:
        process.terminate()
        process.wait()
