"""What a pass costs: time and processor of both sides, bytes on the wire, memory of the server.

Memory is that of all the server's processes, as proportional set sizes (PSS): a page that several of them share counts
once. Linux keeps a peak of the resident size only, so that a process's peak is its PSS after the pass and by how much
its resident size was above what it is then. Nothing is sampled while a pass runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import psutil

from teacher_clients import Pass
from teacher_servers import tree_of

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Figures:
    """Of one pass, or the medians over several. cpu_s: of all the processes of a side; latency: of a sequence."""

    seconds: float
    scored_tokens_per_s: float
    latency_p50_s: float
    latency_p95_s: float
    server_cpu_s: float
    client_cpu_s: float
    bytes_sent_per_token: float
    bytes_received_per_token: float
    peak_memory_mib: float

    @property
    def bytes_per_token(self) -> float:
        """Both ways."""
        return self.bytes_sent_per_token + self.bytes_received_per_token

    def rounded(self) -> dict[str, float]:
        """Four digits of each, for JSON."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def medians(found: Sequence[Figures]) -> Figures:
    return Figures(
        **{field.name: statistics.median(getattr(one, field.name) for one in found) for field in fields(Figures)}
    )


def forget_peaks(pid: int) -> None:
    """Lets Linux count the peaks of these processes from here on (proc(5), clear_refs)."""
    for process in tree_of(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak_memory_mib(pid: int) -> float:
    """Of a process and its descendants, the sum of each one's peak since `forget_peaks`."""
    total = 0
    for process in tree_of(pid):
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            memory = process.memory_full_info()
            total += peak_bytes(Path(f"/proc/{process.pid}/status").read_text(), memory.pss, memory.rss)
    return total / MEBIBYTE


def peak_bytes(status: str, pss_bytes: int, rss_bytes: int) -> int:
    """What a process has now, and what it had more of at its peak, which nobody shares."""
    told = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    peak_rss_bytes = int(told["VmHWM"].split()[0]) * 1024
    return pss_bytes + max(0, peak_rss_bytes - rss_bytes)


def tree_cpu_s(pid: int) -> float:
    """User and system time of a process and of its descendants that live."""
    total = 0.0
    for process in tree_of(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measured(pid: int, play: Callable[[], Pass], times: int = 1) -> tuple[Figures, Pass]:
    """Plays `times` times in a row: means over them, latencies together; and the last pass."""
    forget_peaks(pid)
    server_s, client_s = tree_cpu_s(pid), time.process_time()
    passes = [play() for _ in range(times)]
    server_s, client_s = tree_cpu_s(pid) - server_s, time.process_time() - client_s
    figures = figures_of(passes, server_cpu_s=server_s, client_cpu_s=client_s, memory_mib=peak_memory_mib(pid))
    return figures, passes[-1]


def figures_of(passes: Sequence[Pass], *, server_cpu_s: float, client_cpu_s: float, memory_mib: float) -> Figures:
    """Seconds and processor time are a pass's, on average; latencies are of all passes together."""
    num_tokens = sum(one.num_tokens for one in passes)
    seconds = sum(one.seconds for one in passes)
    latencies_s = np.concatenate([one.latencies_s for one in passes])
    return Figures(
        seconds=seconds / len(passes),
        scored_tokens_per_s=num_tokens / seconds,
        latency_p50_s=float(np.quantile(latencies_s, 0.5)),
        latency_p95_s=float(np.quantile(latencies_s, 0.95)),
        server_cpu_s=server_cpu_s / len(passes),
        client_cpu_s=client_cpu_s / len(passes),
        bytes_sent_per_token=sum(one.bytes_sent for one in passes) / num_tokens,
        bytes_received_per_token=sum(one.bytes_received for one in passes) / num_tokens,
        peak_memory_mib=memory_mib,
    )


def idle_cores(pids: Sequence[int], seconds: float) -> list[float]:
    """Cores that each server keeps busy while nobody asks it anything."""
    before = [tree_cpu_s(pid) for pid in pids]
    time.sleep(seconds)
    return [(tree_cpu_s(pid) - found_s) / seconds for pid, found_s in zip(pids, before, strict=True)]
