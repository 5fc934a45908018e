"""Forwards and backwards that are exchanges, and what a process does by itself in between.

A sharded model gathers weights in every forward and backward, so all processes must take the same number of them, and
one that meets a problem must not leave the others in the middle. Without shards nothing is exchanged before the last
backward of a step, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate.utils import gather_object

from vopd_client.errors import VopdError
from vopd_client.interruption import Interrupted
from vopd_client.processes import Problem, agree


@dataclass(frozen=True)
class Lockstep:
    """sharded: whether forwards and backwards are exchanges."""

    sharded: bool

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What a process does before the next exchange: a problem in it is raised in every process.

        All processes leave it together. Memory that runs out is not caught: a process that fails inside a forward
        has left an exchange already.
        """
        if not self.sharded:
            yield
            return
        problem: Problem | None = None
        try:
            yield
        except (Interrupted, VopdError) as error:
            problem = error
        agree(problem, {})

    def rounds(self, microbatches: Sequence[list[int]]) -> list[list[int]]:
        """The microbatches behind as many empty ones as it takes to have what the process with the most has; at least
        one in all. The empty ones come first: the teacher has more time for the others."""
        most = max(gather_object([len(microbatches)])) if self.sharded else len(microbatches)
        missing = max(most, 1) - len(microbatches)
        return [*([] for _ in range(missing)), *microbatches]
