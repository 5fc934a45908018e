"""Environments at work beside the sampling: a few threads, a time-out, and errors that name the row.

Threads cannot be ended from outside, so one that hangs in a user's code is left behind; it is a daemon and does not
keep the process from ending.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

from vopd_client.environment import Conversation
from vopd_client.errors import EnvironmentReplyError

NUM_THREADS = 8
LOOK_UP_EVERY_S = 0.2  # while waiting: for a signal, and for what is overdue

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Asked(Generic[T, R]):
    """One call of a user's method. subject: what the caller knows it by."""

    subject: T
    method: Callable[[Conversation], R]
    conversation: Conversation
    answer: Future[R] = field(default_factory=Future)
    began_at: float = math.inf  # on the clock of `time.monotonic`; not yet

    def run(self) -> None:
        self.began_at = time.monotonic()
        try:
            self.answer.set_result(self.method(self.conversation))
        except Exception as error:  # noqa: BLE001  (it is raised where the answer is read)
            self.answer.set_exception(error)


class EnvironmentThreads(Generic[T, R]):
    """Calls of an environment's methods; use it with `with`.

    timeout_s: of one call, from when it begins.
    """

    def __init__(self, *, timeout_s: float, num_threads: int = NUM_THREADS) -> None:
        self._timeout_s = timeout_s
        self._asked: list[Asked[T, R]] = []
        self._waiting: queue.SimpleQueue[Asked[T, R] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while not self._waiting.empty():  # what nobody wants any more
            self._waiting.get()
        for _ in self._threads:
            self._waiting.put(None)

    @property
    def num_open(self) -> int:
        """Calls whose answers were not collected yet."""
        return len(self._asked)

    def ask(self, subject: T, method: Callable[[Conversation], R], conversation: Conversation) -> None:
        asked = Asked(subject, method, conversation)
        self._asked.append(asked)
        self._waiting.put(asked)

    def collect(self, *, all_of_them: bool, check: Callable[[], None]) -> list[tuple[T, R]]:
        """Waits until an answer is there, or all are; those that are there, in the order of their asking.

        Args: check: raises when someone asks for the end meanwhile.

        Raises: what the method raised; EnvironmentReplyError for a call that takes too long.
        """
        while True:
            check()
            done = [asked for asked in self._asked if asked.answer.done()]
            for asked in done:
                asked.answer.result()  # an error is not kept waiting for others' answers
            if done and (len(done) == len(self._asked) or not all_of_them):
                self._asked = [asked for asked in self._asked if asked not in done]
                return [(asked.subject, asked.answer.result()) for asked in done]
            open_calls = [asked for asked in self._asked if not asked.answer.done()]
            self._check_overdue(open_calls)
            wait([asked.answer for asked in open_calls], timeout=LOOK_UP_EVERY_S, return_when=FIRST_COMPLETED)

    def _check_overdue(self, open_calls: list[Asked[T, R]]) -> None:
        for asked in open_calls:
            if time.monotonic() - asked.began_at > self._timeout_s:
                conversation = asked.conversation
                raise EnvironmentReplyError(
                    f"the environment has not answered for {self._timeout_s:g} s (environment_timeout_s): "
                    f"{conversation.source}, turn {conversation.turn} ({conversation.trajectory})"
                )

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None:
            asked.run()
