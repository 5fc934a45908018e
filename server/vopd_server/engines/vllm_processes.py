"""vLLM's processes as the operating system sees them: what signals they hear, and that none is left behind.

EngineCore is a child of this process, its workers are EngineCore's. Only vLLM's environment has psutil for certain,
so this module is imported where vLLM runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import time
from collections.abc import Collection, Iterator
from multiprocessing import resource_tracker
from typing import Any

import psutil  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

_POLL_S = 0.5
# For an EngineCore that is told to end while it loads the model.
LOADING_GRACE_S = 10.0
# For workers whose EngineCore has gone: they notice by themselves, unless they hang or are stopped.
ORPHAN_GRACE_S = 5.0


@contextlib.contextmanager
def interrupts_held_off() -> Iterator[None]:
    """Blocks SIGINT in this thread, and for good in every process that it starts meanwhile.

    A terminal sends Ctrl-C to the whole process group. vLLM's processes would abort what they are running, which
    this process is about to finish. They do set a handler for SIGINT, but inherit the mask and leave it alone.
    """
    # CPython starts it with the first process that it spawns, and takes SIGINT out of the mask when it has.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def running_processes() -> list[psutil.Process]:
    """This process's children and theirs, in so far as multiprocessing has started them: vLLM's, and nobody else's."""
    found = []
    for child in multiprocessing.active_children():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            found += [process, *process.children(recursive=True)]
    return found


def end_remaining(processes: Collection[psutil.Process], *, grace_s: float = ORPHAN_GRACE_S) -> None:
    """Waits for processes that have been told to end, and kills those that have not after `grace_s`."""
    for process in _wait(processes, grace_s):
        logger.warning("vLLM's process %d has not ended within %g s: killed", process.pid, grace_s)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait(processes, grace_s)


def _wait(processes: Collection[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those of `processes` that still run after `timeout_s`, at once when none does."""
    give_up_s = time.monotonic() + timeout_s
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < give_up_s:
        time.sleep(_POLL_S / 5)
    return alive


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not: orphans wait for whoever is process 1 here, and some never look."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def end_launch(launching: asyncio.Future[Any]) -> None:
    """Waits for a launch; one that is not over loses its processes, and so ends soon."""
    clock_s = asyncio.get_running_loop().time
    give_up_s = clock_s() + LOADING_GRACE_S
    seen: set[psutil.Process] = set()
    while not launching.done():
        seen.update(running_processes())
        for child in multiprocessing.active_children():
            child.terminate() if clock_s() < give_up_s else child.kill()
        await asyncio.wait((launching,), timeout=_POLL_S)
    await asyncio.to_thread(end_remaining, seen)
