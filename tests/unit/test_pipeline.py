"""Which step is sampled when, and what a checkpoint must hold, for every run of a few steps cut off anywhere."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from vopd_client.pipeline import InFlight, Pipeline

Sampled = InFlight[str]


class Run:
    """The trainer's part: samples what it is told to from weights that are named by their number of updates."""

    def __init__(self, *, max_staleness: int, total_steps: int, step: int = 0, saved: Iterable[Sampled] = ()) -> None:
        self.total_steps = total_steps
        self.step = step
        self.pipeline = Pipeline[str](max_staleness=max_staleness, total_steps=total_steps, in_flight=saved)
        self.learned: list[Sampled] = []

    def sample(self, how_many: int | None = None) -> None:
        """What the next step samples, or the first `how_many` of it."""
        for number in self.pipeline.steps_to_sample(self.step + 1)[:how_many]:
            self.pipeline.add(InFlight(number, self.step, f"rollouts of step {number}, weights {self.step}"))

    def update(self) -> None:
        self.learned.append(self.pipeline.of_step(self.step + 1))
        self.step += 1
        self.pipeline.complete(self.step)

    def to_the_end(self) -> list[Sampled]:
        while self.step < self.total_steps:
            self.sample()
            self.update()
        return self.learned


def test_on_policy_every_step_samples_its_own_rollouts_and_nothing_is_ever_worth_saving() -> None:
    run = Run(max_staleness=0, total_steps=4)
    while run.step < 4:
        assert run.pipeline.steps_to_sample(run.step + 1) == [run.step + 1]
        run.sample()
        run.update()
        assert run.pipeline.worth_saving(run.step) == []
    assert [sampled.staleness for sampled in run.learned] == [0, 0, 0, 0]


def test_one_step_ahead_the_first_step_fills_the_pipeline_and_the_last_samples_nothing() -> None:
    run = Run(max_staleness=1, total_steps=4)
    plan = []
    while run.step < 4:
        plan.append(run.pipeline.steps_to_sample(run.step + 1))
        run.sample()
        run.update()
    assert plan == [[1, 2], [3], [4], []]
    assert [(sampled.step, sampled.num_updates, sampled.staleness) for sampled in run.learned] == [
        (1, 0, 0), (2, 0, 1), (3, 1, 1), (4, 2, 1)
    ]  # fmt: skip


def test_a_run_of_one_step_has_nothing_to_sample_ahead() -> None:
    assert Run(max_staleness=1, total_steps=1).pipeline.steps_to_sample(1) == [1]


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("total_steps", range(1, 6))
def test_a_run_that_was_cut_off_anywhere_learns_from_the_rollouts_of_the_undisturbed_one(
    max_staleness: int, total_steps: int
) -> None:
    undisturbed = Run(max_staleness=max_staleness, total_steps=total_steps).to_the_end()
    for complete_steps in range(1, total_steps):
        for sampled_of_the_next in (0, 1, None):
            cut = Run(max_staleness=max_staleness, total_steps=total_steps)
            while cut.step < complete_steps:
                cut.sample()
                cut.update()
            cut.sample(sampled_of_the_next)
            saved = cut.pipeline.worth_saving(cut.step)
            assert len(saved) <= max_staleness
            resumed = Run(max_staleness=max_staleness, total_steps=total_steps, step=cut.step, saved=saved)
            assert cut.learned + resumed.to_the_end() == undisturbed


def test_without_what_was_in_flight_the_pipeline_is_filled_again_from_the_weights_there_are() -> None:
    resumed = Run(max_staleness=1, total_steps=5, step=3)
    assert [(sampled.step, sampled.staleness) for sampled in resumed.to_the_end()] == [(4, 0), (5, 1)]


def test_what_is_sampled_twice_or_is_older_than_allowed_is_a_mistake() -> None:
    run = Run(max_staleness=1, total_steps=5)
    run.sample()
    with pytest.raises(AssertionError, match="step 2 was sampled before"):
        run.pipeline.add(InFlight(2, 0, "again"))
    with pytest.raises(AssertionError, match="step=3"):
        run.pipeline.add(InFlight(3, 0, "two updates old"))
