"""Which replica scores which sequence: a state machine without tasks, clocks or channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Job:
    """What a sequence costs a replica: its completion's tokens, and its context's unless that is at work there."""

    sequence_id: str
    context_key: bytes
    num_context_tokens: int
    num_completion_tokens: int


@dataclass(slots=True)
class _Load:
    """What one replica has to do."""

    is_up: bool
    jobs: dict[str, Job] = field(default_factory=dict)
    num_users: dict[bytes, int] = field(default_factory=dict)  # jobs of a context, by its key
    tokens: int = 0
    tokens_so_far: int = 0  # of everything that it was ever given

    def cost(self, job: Job) -> int:
        context = 0 if job.context_key in self.num_users else job.num_context_tokens
        return context + job.num_completion_tokens


class Balancer:
    """Hands each sequence to the replica that would be done with it first, were they equally fast.

    A context that is not at work at a replica counts double there: as time, and as work that could be saved. So
    sequences of one context stay together until their completions put the replica ahead of another by more tokens than
    the context has. Since what is unanswered is what counts, a slower replica is given less.
    """

    def __init__(self, num_replicas: int, *, window: int, is_up: bool = False, favourite: int = 0) -> None:
        """window: unanswered sequences of all replicas together, at most; split among those that are up, rounded up.

        favourite: of equally good replicas. Clients that do not know of each other should each have another one.
        """
        self._window = window
        self._favourite = favourite
        self._loads = [_Load(is_up) for _ in range(num_replicas)]

    def choose(self, job: Job) -> int | None:
        """The replica for the sequence that is next in line; None: it waits, since none is up, or that one is full.

        One that is not the best may have room meanwhile: it has more tokens to do than the best one is ahead by.
        """
        up = [index for index, load in enumerate(self._loads) if load.is_up]
        if not up:
            return None
        best = min(up, key=lambda index: self._rank(index, job))
        return best if len(self._loads[best].jobs) < math.ceil(self._window / len(up)) else None

    def _rank(self, index: int, job: Job) -> tuple[int, int, int]:
        load = self._loads[index]
        could_be_saved = load.cost(job) - job.num_completion_tokens
        return (
            load.tokens + load.cost(job) + could_be_saved,
            load.tokens_so_far,
            (index - self._favourite) % len(self._loads),
        )

    def begin(self, replica: int, job: Job) -> None:
        """The replica is to score it."""
        load = self._loads[replica]
        assert job.sequence_id not in load.jobs, "given twice"
        cost = load.cost(job)
        load.tokens += cost
        load.tokens_so_far += cost
        load.jobs[job.sequence_id] = job
        load.num_users[job.context_key] = load.num_users.get(job.context_key, 0) + 1

    def end(self, replica: int, sequence_id: str) -> None:
        """It no longer is: answered, or taken back."""
        load = self._loads[replica]
        job = load.jobs.pop(sequence_id)
        load.tokens -= job.num_completion_tokens
        load.num_users[job.context_key] -= 1
        if not load.num_users[job.context_key]:
            del load.num_users[job.context_key]
            load.tokens -= job.num_context_tokens

    def end_all(self, replica: int) -> None:
        """The connection is gone, and everything with it."""
        for sequence_id in list(self._loads[replica].jobs):
            self.end(replica, sequence_id)

    def set_up(self, replica: int, is_up: bool) -> None:
        """Whether it may be given more."""
        self._loads[replica].is_up = is_up

    def holders(self, sequence_id: str) -> list[int]:
        """The replicas that have it to score."""
        return [index for index, load in enumerate(self._loads) if sequence_id in load.jobs]

    def is_idle(self, replica: int) -> bool:
        """It may be given more, and has nothing to do."""
        return self._loads[replica].is_up and not self._loads[replica].jobs

    def num_outstanding(self, replica: int) -> int:
        return len(self._loads[replica].jobs)

    def num_tokens(self, replica: int) -> int:
        """Of its unanswered completions and of the contexts before them, each context once."""
        return self._loads[replica].tokens
