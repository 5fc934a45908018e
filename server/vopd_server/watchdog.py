"""A watchdog with a real forward: does an engine that answers nothing still score, and still the same?

An engine can be alive and of no use: a kernel that never returns, a device that forgot what it computes. Both
engines say so themselves when they die (`Engine.wait_until_dead`); this stands beside it. `Watch` decides and
`Watchdog` waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vopd_proto.arrays import Float32Array
from vopd_server.engines.base import Engine
from vopd_server.errors import EngineDeadError
from vopd_server.golden import GoldenReference, difference, golden_logprobs

logger = logging.getLogger(__name__)

# One failure can be another request's doing, as when memory was short for a moment.
_BAD_PROBES_IN_A_ROW = 2


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done now: look again after `wait_s`, send a probe, or give the engine up."""

    kind: Literal["wait", "probe", "hung"]
    wait_s: float = 0.0


class Watch:
    """When to probe, and what a probe says of the engine. No I/O, no tasks; time is handed in.

    interval_s: without any answer, after which a probe is sent; and between a bad probe and the next one, whatever
        was answered in between. hang_timeout_s: without any answer, a probe among them, after which it hangs.
    """

    def __init__(self, *, interval_s: float, hang_timeout_s: float, now_s: float) -> None:
        self._interval_s = interval_s
        self._hang_timeout_s = hang_timeout_s
        self._last_probe_s = now_s  # begun, while one is out, and else ended
        self._is_out = False
        self._num_bad = 0

    def next_step(self, now_s: float, last_answer_s: float) -> Step:
        """last_answer_s: when the engine last answered anyone."""
        if self._is_out:
            # A probe may queue for long behind requests that are answered: that is no hang.
            left_s = max(self._last_probe_s, last_answer_s) + self._hang_timeout_s - now_s
            return Step("wait", left_s) if left_s > 0 else Step("hung")
        quiet_since_s = self._last_probe_s if self._num_bad else max(self._last_probe_s, last_answer_s)
        left_s = quiet_since_s + self._interval_s - now_s
        return Step("wait", left_s) if left_s > 0 else Step("probe")

    def probe_begun(self, now_s: float) -> None:
        self._is_out = True
        self._last_probe_s = now_s

    def probe_ended(self, now_s: float, *, is_good: bool) -> bool:
        """Whether the engine is to be given up."""
        self._is_out = False
        self._last_probe_s = now_s
        self._num_bad = 0 if is_good else self._num_bad + 1
        return self._num_bad >= _BAD_PROBES_IN_A_ROW


class Watchdog:
    """Scores the golden sequence whenever the engine has answered nothing for a while.

    reference: of this start's golden probe.
    interval_s, hang_timeout_s: as of `Watch`. A forward that takes longer than `hang_timeout_s` is a hang to it.
    last_answer_s: when the engine last returned scores to anyone, on `clock`; failures are no answers.
    """

    def __init__(
        self,
        engine: Engine,
        reference: GoldenReference,
        *,
        interval_s: float,
        hang_timeout_s: float,
        last_answer_s: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._reference = reference
        self._interval_s = interval_s
        self._hang_timeout_s = hang_timeout_s
        self._last_answer_s = last_answer_s
        self._clock = clock

    async def wait_until_dead(self) -> EngineDeadError:
        """Returns why the engine is given up: it hangs, or failed or scored differently twice in a row, or died.

        Cancelling it cancels a probe in flight.
        """
        watch = Watch(interval_s=self._interval_s, hang_timeout_s=self._hang_timeout_s, now_s=self._clock())
        while True:
            step = watch.next_step(self._clock(), self._last_answer_s())
            if step.kind == "wait":
                await asyncio.sleep(step.wait_s)
                continue
            reason = await self._probe(watch)
            if reason is not None:
                logger.error("the watchdog gives the engine up: %s", reason)
                return reason

    async def _probe(self, watch: Watch) -> EngineDeadError | None:
        """One probe, and as much patience as `watch` has."""
        watch.probe_begun(self._clock())
        probe = asyncio.create_task(golden_logprobs(self._engine, self._reference.request), name="vopd-watchdog-probe")
        probe.add_done_callback(_retrieve)
        try:
            while not probe.done():
                step = watch.next_step(self._clock(), self._last_answer_s())
                if step.kind == "hung":
                    return EngineDeadError(
                        f"the engine has answered neither a request nor the watchdog's probe for "
                        f"{self._hang_timeout_s:g} s (engine_hang_timeout_s)"
                    )
                await asyncio.wait((probe,), timeout=step.wait_s)
        finally:
            probe.cancel()
        return self._judged(watch, probe)

    def _judged(self, watch: Watch, probe: asyncio.Task[Float32Array]) -> EngineDeadError | None:
        """What a probe that has ended says of the engine."""
        error = asyncio.CancelledError("cancelled by the engine") if probe.cancelled() else probe.exception()
        if isinstance(error, EngineDeadError):
            return error
        if error is not None:
            complaint = f"fails: {error!r}"
        else:
            found = difference(probe.result(), self._reference.logprobs_N)
            tolerance = self._reference.tolerance
            complaint = (
                "" if found.is_within(tolerance) else f"scores differently from the start, by {found} (> {tolerance})"
            )
        is_over = watch.probe_ended(self._clock(), is_good=not complaint)
        if is_over:
            return EngineDeadError(f"the watchdog's probe {complaint}, the second time in a row")
        if complaint:
            logger.warning("the watchdog's probe %s; it will ask again in %g s", complaint, self._interval_s)
        else:
            logger.debug("the watchdog's probe was answered as at the start")
        return None


def _retrieve(probe: asyncio.Task[Float32Array]) -> None:
    """A probe that was given up may still fail: nobody waits for it, and asyncio would complain."""
    if not probe.cancelled():
        probe.exception()
