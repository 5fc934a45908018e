"""Which step's rollouts are sampled when, and what is in flight between steps. No tasks, no clocks, no tensors.

With max_staleness 0 a step samples its own rollouts and is strictly on-policy. With 1 it samples the rollouts of the
*next* step, from the weights before its own update, so that the teacher scores them while this update computes:

    step 1      step 2      step 3
    sample 1
    sample 2    sample 3    sample 4
    update 1    update 2    update 3

Staleness is counted in updates between the weights that sampled and those that learn: 0 in step 1, 1 in all others.
The last step samples nothing further. Every step is sampled from weights that follow from the number of updates
alone, so a run that is cut off can throw away what it sampled ahead in a step that was not completed, and sample the
same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class InFlight(Generic[T_co]):
    """The rollouts of one step from their sampling to their update; num_updates: of the weights that sampled them."""

    step: int
    num_updates: int
    rollouts: T_co

    @property
    def staleness(self) -> int:
        """Updates between the weights that sampled these rollouts and those that learn from them."""
        return self.step - 1 - self.num_updates

    def map(self, change: Callable[[T_co], U]) -> InFlight[U]:
        """The same with its rollouts in another form."""
        return InFlight(self.step, self.num_updates, change(self.rollouts))


class Pipeline(Generic[T]):
    """What is in flight. Steps count from 1; each is sampled, taken and completed once, in order."""

    def __init__(self, *, max_staleness: int, total_steps: int, in_flight: Iterable[InFlight[T]] = ()) -> None:
        self._max_staleness = max_staleness
        self._total_steps = total_steps
        self._in_flight = {sampled.step: sampled for sampled in in_flight}

    def steps_to_sample(self, step: int) -> list[int]:
        """The steps whose rollouts are sampled before the update of `step`, in this order."""
        last = min(step + self._max_staleness, self._total_steps)
        return [number for number in range(step, last + 1) if number not in self._in_flight]

    def add(self, sampled: InFlight[T]) -> None:
        assert sampled.step not in self._in_flight, f"step {sampled.step} was sampled before"
        assert 0 <= sampled.staleness <= self._max_staleness, sampled
        self._in_flight[sampled.step] = sampled

    def of_step(self, step: int) -> InFlight[T]:
        """What the update of `step` learns from; it stays in flight until `complete`."""
        return self._in_flight[step]

    def complete(self, step: int) -> None:
        """The update of `step` is done: its rollouts are used up."""
        del self._in_flight[step]

    def worth_saving(self, last_step: int) -> list[InFlight[T]]:
        """What a checkpoint of `last_step` must hold: rollouts to come that its weights cannot sample again."""
        return [
            sampled
            for number, sampled in sorted(self._in_flight.items())
            if number > last_step and sampled.num_updates < last_step
        ]
