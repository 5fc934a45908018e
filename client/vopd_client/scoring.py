"""From a rollout to its teacher and back: what is asked, in whose labels, and waiting for it in the open."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

from vopd_client.alignment import SupportOwner
from vopd_client.errors import VopdError
from vopd_client.handshake import IdSwap
from vopd_client.interruption import StopRequest
from vopd_client.render import Prompt
from vopd_client.rollouts.base import Rollout
from vopd_client.types import (
    Candidates,
    HiddenStates,
    NoSupport,
    SequenceScores,
    SequenceToScore,
    Support,
    Teacher,
    TeacherTopK,
)

LOOK_UP_EVERY_S = 0.2  # while waiting: for a signal, and for what the teacher's client says


@dataclass(frozen=True, slots=True)
class Request:
    """What this run asks a teacher about every rollout.

    support: whose ids the support is; "none": sampled log-probabilities alone; "vocabulary": hidden states.
    swap: the student's end token and the teacher's, exchanged on the way out and back.
    drop_end_ids: end tokens whose rows stay out of the loss.
    """

    support: SupportOwner
    top_k: int
    swap: IdSwap
    drop_end_ids: frozenset[int]

    def of(self, rollout: Rollout, prompt: Prompt) -> SequenceToScore:
        """One rollout after the context that the teacher sees, in the teacher's labels."""
        sequence = SequenceToScore(
            prompt.teacher_ids, rollout.completion_ids, self._support(rollout), rollout.is_sampled_T
        )
        return self.swap.to_teacher(sequence)

    def _support(self, rollout: Rollout) -> Support:
        match self.support:
            case "student":
                return Candidates(rollout.support_ids, rollout.support_counts_T)
            case "teacher":
                return TeacherTopK(self.top_k)
            case "vocabulary":
                return HiddenStates()
            case "none":
                return NoSupport()


@dataclass(slots=True, eq=False)
class Flight:
    """When a request left and when its answer was there, on the clock of `time.perf_counter`; NaN: not yet."""

    sent_at: float = field(default_factory=time.perf_counter)
    answered_at: float = math.nan

    def land(self, _answer: object = None) -> None:
        """The answer is there. It lands once; later calls change nothing."""
        if math.isnan(self.answered_at):
            self.answered_at = time.perf_counter()


@dataclass(frozen=True, slots=True, eq=False)
class SentRollout:
    """A rollout that the teacher is scoring; answer None: it is masked, and no teacher was asked."""

    rollout: Rollout
    prompt: Prompt
    answer: Future[SequenceScores] | None
    flight: Flight = field(default_factory=Flight)

    @property
    def is_masked(self) -> bool:
        """Whether it stays out of the loss."""
        return self.answer is None

    @property
    def num_tokens(self) -> int:
        """Of prompt and completion, as the student reads them."""
        return len(self.rollout.prompt_ids) + len(self.rollout.completion_ids)


@contextmanager
def about_teacher(name: str) -> Iterator[None]:
    """What goes wrong in here says which teacher it is about, unless the teacher has no name."""
    try:
        yield
    except VopdError as error:
        if not name:
            raise
        raise type(error)(f"teacher {name}: {error}") from error


def send(rollout: Rollout, prompt: Prompt, *, request: Request, teacher: Teacher) -> SentRollout:
    """Asks the teacher at once; the answer comes later."""
    flight = Flight()
    answer = teacher.submit(request.of(rollout, prompt))
    answer.add_done_callback(flight.land)  # on the thread that brings it, whatever this one is at
    return SentRollout(rollout, prompt, answer, flight)


class Traffic:
    """Bytes to and from the teacher, from one look to the next: answers come at any time, and none is left out."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._seen = self._total

    @property
    def _total(self) -> int:
        return self._teacher.bytes_sent + self._teacher.bytes_received

    def since_last_look(self) -> int:
        before, self._seen = self._seen, self._total
        return self._seen - before


@dataclass(slots=True)
class Waiter:
    """Waits for answers, and adds up for how long.

    teachers: by name, as prompts name them.
    tell_why: hears what the teacher's client says of the delay, and the teacher's name, again and again while it lasts.
    """

    stop: StopRequest
    teachers: Mapping[str, Teacher]
    tell_why: Callable[[str, str], None]
    waited_s_by_teacher: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.waited_s_by_teacher = dict.fromkeys(self.teachers, 0.0)

    @property
    def waited_s(self) -> float:
        return sum(self.waited_s_by_teacher.values())

    def scores(self, sent: SentRollout) -> SequenceScores:
        """The answer to a rollout, in the teacher's labels. Raises: as `answer`."""
        assert sent.answer is not None, "nobody was asked about a masked rollout"
        scores = self.answer(sent.prompt.teacher, sent.answer)
        sent.flight.land()  # those who wait are woken before the callback runs
        return scores

    def answer(self, name: str, answer: Future[SequenceScores]) -> SequenceScores:
        """One answer of the teacher of this name.

        Raises: Interrupted when someone asks for the end meanwhile, and the TeacherError of the answer.
        """
        began = time.perf_counter()
        try:
            with about_teacher(name):
                while not wait([answer], timeout=LOOK_UP_EVERY_S).done:
                    self.stop.check()
                    self.tell_why(self.teachers[name].waiting_reason, name)
                return answer.result()
        finally:
            self.waited_s_by_teacher[name] += time.perf_counter() - began
