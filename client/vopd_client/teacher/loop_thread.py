"""An event loop in a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from vopd_client.errors import TeacherUnavailableError

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines beside the caller. The thread is a daemon: it never keeps a finished program alive."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()  # so that nothing is started on a loop that is about to stop
        self._closing = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Starts `work` and returns at once; cancelling the future cancels it.

        Raises: TeacherUnavailableError after `close`.
        """
        with self._lock:
            if self._closing:
                work.close()
                raise TeacherUnavailableError("the teacher was closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`. An exception in the caller, such as KeyboardInterrupt, cancels it."""
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()

    @property
    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Cancels what still runs and ends the thread; harmless when done before."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            cancelled = asyncio.run_coroutine_threadsafe(_cancel_all_others(), self._loop)
        cancelled.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
