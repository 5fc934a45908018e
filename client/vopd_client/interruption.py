"""Ctrl-C and SIGTERM: stop where nothing is lost.

While nothing is half done the first signal ends the work at once, by an exception. Inside `postponed()` it only
sets a flag, and the work asks at its safe points. A second signal always ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Someone asked for the end. Not an Exception: nothing on the way may swallow it."""


class StopRequest:
    """Whether someone asked for the end, and whether work may be broken off for it right now."""

    def __init__(self) -> None:
        self._requested = False
        self._is_postponed = False

    @property
    def requested(self) -> bool:
        return self._requested

    def check(self) -> None:
        """A safe point: raises Interrupted if someone asked."""
        if self._requested:
            raise Interrupted

    def ask(self) -> None:
        """What the first signal does."""
        self._requested = True
        if not self._is_postponed:
            raise Interrupted

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Inside, a request waits for the next `check`."""
        former, self._is_postponed = self._is_postponed, True
        try:
            yield
        finally:
            self._is_postponed = former

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a request breaks off whatever runs, as do earlier ones: for work that changes nothing."""
        former, self._is_postponed = self._is_postponed, False
        try:
            self.check()
            yield
        finally:
            self._is_postponed = former


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Routes SIGINT and SIGTERM to `request`; the second one gets the system's default, the end of the process.

    Only a main thread can, elsewhere this does nothing. The former handlers come back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # Not print: a handler that runs in the middle of a print must not enter it again.
        os.write(2, f"\n{signal.Signals(number).name}: stopping at a safe point; once more to quit at once\n".encode())
        request.ask()

    former = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
