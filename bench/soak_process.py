"""The teacher process of the soak: its keys, its numbers from /proc, and its status page."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from machine import end_with_parent
from vopd_server.key_file import new_key, utc_now, with_key
from vopd_server.key_storage import change_key_file
from vopd_server.tenancy import TenantLimits

READY = re.compile(r"ready at (grpc://\S+), (http://\S+) \(admin (http://[^)]+)\): ")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ProcessSample:
    at_s: float
    memory_bytes: int
    file_descriptors: int
    threads: int
    cpu_s: float


@dataclass
class SoakTeacher:
    """A running teacher. keys and weights: by tenant."""

    pid: int
    url: str
    http_url: str
    admin_url: str
    keys: dict[str, str]
    weights: Mapping[str, float]
    samples: list[ProcessSample] = field(default_factory=list)

    def sample(self, at_s: float) -> ProcessSample:
        proc = Path(f"/proc/{self.pid}")
        told = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        sample = ProcessSample(
            at_s=at_s,
            memory_bytes=int(told["VmRSS"].split()[0]) * 1024,
            file_descriptors=len(list((proc / "fd").iterdir())),
            threads=int(told["Threads"]),
            cpu_s=sum(map(int, ticks)) / TICKS_PER_S,
        )
        self.samples.append(sample)
        return sample

    async def status(self) -> dict[str, Any]:
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
            answer: dict[str, Any] = (await client.get(f"{self.admin_url}/status.json")).json()
            return answer

    async def status_when_idle(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The first status without a call in flight, or the last one when there is none in time."""
        give_up_s = time.monotonic() + timeout_s
        while (status := await self.status())["calls_in_flight"] and time.monotonic() < give_up_s:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        return status


@contextmanager
def soak_teacher(model: str, directory: Path, weights: Mapping[str, float]) -> Iterator[SoakTeacher]:
    """Serves `model` to tenants of these weights, and ends with the block.

    Raises: RuntimeError with what it wrote when it does not start.
    """
    keys_file, log_path = directory / "keys.json", directory / "teacher.log"
    keys = {}
    for tenant_id, weight in weights.items():
        keys[tenant_id], stored = new_key(tenant_id, TenantLimits(weight=weight), created_at=utc_now())
        change_key_file(keys_file, lambda file, stored=stored: with_key(file, stored), create=True)
    command = [sys.executable, "-m", "vopd_server.main", "serve", "--model", model, "--dtype", "bfloat16"]
    command += ["--port", "0", "--http-port", "0", "--admin-port", "0", "--keys-file", str(keys_file)]
    command += ["--log-level", "warning"]
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            command, stdout=log_file, stderr=subprocess.STDOUT, process_group=0, preexec_fn=end_with_parent
        )
    try:
        while not (ready := READY.search(log_path.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"the teacher did not start:\n{log_path.read_text()}")
            time.sleep(0.1)
        yield SoakTeacher(process.pid, ready[1], ready[2], ready[3], keys, weights)
    finally:
        process.terminate()
        process.wait()
