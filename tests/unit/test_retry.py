"""Backoff, the clock of progress, and what a failure means: no sockets, no real time."""

import random

import grpc
import pytest

from vopd_client.errors import (
    TeacherError,
    TeacherRequestError,
    TeacherUnavailableError,
    TeacherUnsupportedError,
)
from vopd_client.teacher.patience import Patience, Timing
from vopd_client.teacher.retry import (
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    ProgressClock,
    backoff_s,
    retry_delay_s,
)
from vopd_client.teacher.status import ERROR_OF_CODE, RETRYABLE, Failure, failure_of_sequence
from vopd_proto import teacher_pb2 as pb

REFUSED = Failure(
    grpc.StatusCode.UNAVAILABLE,
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:5: Failed to connect to remote host: "
    "connect: Connection refused (111)",
)


class FakeTime:
    """Sleeping advances the clock and takes no time."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds

    def timing(self) -> Timing:
        return Timing(now=lambda: self.now_s, sleep=self.sleep, rng=random.Random(0))


# ---------------------------------------------------------------- backoff


class HighestDraw(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


class LowestDraw(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return a


def test_the_ceiling_of_the_backoff_doubles_until_the_longest():
    ceilings = [backoff_s(attempt, HighestDraw()) for attempt in range(8)]
    assert ceilings[:5] == [FIRST_BACKOFF_S * 2**attempt for attempt in range(5)]
    assert ceilings[5:] == [LONGEST_BACKOFF_S] * 3


def test_the_backoff_is_a_function_of_attempt_and_rng_and_spread_over_the_whole_range():
    assert backoff_s(3, random.Random(7)) == backoff_s(3, random.Random(7))
    rng = random.Random(0)
    delays = [backoff_s(3, rng) for _ in range(1000)]
    assert 0 <= min(delays) < 0.1
    assert 3.9 < max(delays) <= 4.0


def test_a_thousand_failed_attempts_do_not_overflow():
    assert backoff_s(10_000, HighestDraw()) == LONGEST_BACKOFF_S


@pytest.mark.parametrize("attempt", [0, 5, 50])
def test_never_sooner_than_the_server_asked_for(attempt):
    rng = random.Random(attempt)
    delays = [retry_delay_s(attempt, rng, server_delay_s=20.0) for _ in range(200)]
    assert min(delays) >= 20.0
    assert len(set(delays)) > 100  # and not all at once


# ---------------------------------------------------------------- time-out by progress


def test_only_time_with_something_outstanding_counts():
    time = FakeTime()
    clock = ProgressClock(10.0, lambda: time.now_s)
    time.now_s += 1000
    assert not clock.expired
    clock.begin()
    time.now_s += 9
    assert (clock.waited_s, clock.remaining_s, clock.expired) == (9.0, 1.0, False)
    clock.end()
    time.now_s += 1000
    clock.begin()
    assert clock.waited_s == 0.0


def test_any_answer_starts_the_clock_over():
    time = FakeTime()
    clock = ProgressClock(10.0, lambda: time.now_s)
    clock.begin()
    clock.begin()
    time.now_s += 9
    clock.progress()
    clock.end()
    time.now_s += 9
    assert not clock.expired
    time.now_s += 1
    assert clock.expired


async def test_patience_sleeps_between_attempts_and_ends_with_the_last_reason():
    time = FakeTime()
    patience = Patience(60.0, time.timing())
    patience.clock.begin()

    async def fail_for_ever() -> None:
        while True:
            await patience.back_off(REFUSED, None)

    with pytest.raises(TeacherUnavailableError, match="no progress of the teacher for 60 s; last: connection refused"):
        await fail_for_ever()
    assert sum(time.slept_s) == pytest.approx(60.0)
    assert len(time.slept_s) > 6


async def test_another_replica_is_tried_at_once_and_a_full_queue_is_not_escaped_from():
    time = FakeTime()
    patience = Patience(600.0, time.timing())
    patience.clock.begin()
    for _ in range(3):
        await patience.back_off(REFUSED, None, num_replicas=3)
    assert time.slept_s[:2] == [0.0, 0.0]
    assert time.slept_s[2] > 0.0
    patience.progressed()
    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_delay_s=7.0)
    await patience.back_off(full, None, num_replicas=3)
    assert time.slept_s[3] >= 7.0


async def test_the_waiting_reason_says_what_how_long_and_until_when():
    time = FakeTime()

    async def look_around(seconds: float) -> None:
        seen.append(patience.waiting_reason)
        await FakeTime.sleep(time, seconds)

    seen: list[str] = []
    patience = Patience(600.0, Timing(now=lambda: time.now_s, sleep=look_around, rng=LowestDraw()))
    patience.clock.begin()
    time.now_s += 12
    await patience.back_off(Failure(REFUSED.code, REFUSED.message, retry_delay_s=3.0), None)
    assert seen == ["teacher unavailable: connection refused, retrying in 3 s (12 of 600 s)"]
    patience.progressed()
    assert patience.waiting_reason == ""


async def test_what_a_live_teacher_says_of_the_delay_is_told_until_an_answer_comes_and_is_no_progress():
    time = FakeTime()
    patience = Patience(600.0, Timing(now=lambda: time.now_s, sleep=time.sleep, rng=LowestDraw()))
    patience.told("nobody waits yet")
    assert patience.waiting_reason == ""
    patience.clock.begin()
    time.now_s += 12
    patience.told("sequences of tenant a in the queue: 3")
    assert patience.waiting_reason == "teacher busy: sequences of tenant a in the queue: 3 (12 of 600 s)"
    patience.progressed()
    assert patience.waiting_reason == ""


async def test_parts_of_the_work_have_attempts_of_their_own_and_one_time_out():
    time = FakeTime()
    whole = Patience(60.0, time.timing())
    parts = [whole.beside(f"teacher {name}") for name in "ab"]
    whole.clock.begin()
    await parts[0].back_off(REFUSED, None)
    assert parts[0].waiting_reason.startswith("teacher a unavailable: connection refused")
    assert parts[1].waiting_reason == whole.waiting_reason == ""
    time.now_s += 50
    parts[1].progressed()
    time.now_s += 50
    await parts[0].back_off(REFUSED, None)  # the other one's answer counts
    time.now_s += 60
    with pytest.raises(TeacherUnavailableError, match="for 60 s; last: connection refused"):
        await parts[0].back_off(REFUSED, None)


async def test_what_else_may_be_the_reason_is_told_where_there_is_none_of_its_own():
    time, missing = FakeTime(), ["1 of 2 replicas missing"]
    patience = Patience(60.0, time.timing(), also=lambda: missing[0])
    assert patience.waiting_reason == ""
    patience.clock.begin()
    time.now_s += 12
    assert patience.waiting_reason == "1 of 2 replicas missing (12 of 60 s)"
    patience.told("a queue")
    assert patience.waiting_reason == "teacher busy: a queue (12 of 60 s)"
    missing[0] = ""
    patience.progressed()
    assert patience.waiting_reason == ""


async def test_progress_starts_the_backoff_over():
    time = FakeTime()
    patience = Patience(1e9, Timing(now=lambda: time.now_s, sleep=time.sleep, rng=HighestDraw()))
    patience.clock.begin()
    for _ in range(3):
        await patience.back_off(REFUSED, None)
    patience.progressed()
    await patience.back_off(REFUSED, None)
    assert time.slept_s == [0.5, 1.0, 2.0, 0.5]


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_code_has_its_error(code):
    error = Failure(code, "why").to_error()
    assert isinstance(error, TeacherError)
    assert code.name in str(error)
    assert "why" in str(error)
    assert ERROR_OF_CODE.keys() == set(grpc.StatusCode)


def test_only_unavailable_and_resource_exhausted_are_tried_again():
    assert {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED} == RETRYABLE
    assert [code for code in grpc.StatusCode if Failure(code, "").is_retryable] == [
        code for code in grpc.StatusCode if code in RETRYABLE
    ]


def test_a_message_that_is_too_large_is_not_tried_again():
    failure = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (20 vs. 10)")
    assert not failure.is_retryable
    assert isinstance(failure.to_error(), TeacherRequestError)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (REFUSED.message, "connection refused"),
        (
            "failed to connect to all addresses; last error: INTERNAL: ipv4:127.0.0.1:5: Failed parsing HTTP/2 "
            "(Expected SETTINGS frame as the first frame, got frame type 80) (Trying to connect an http1.x server)",
            "HTTP/1.1 is spoken there, not gRPC: write http://",
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:5: Tls handshake failed "
            "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER",
            "Tls handshake failed: no TLS is spoken there; grpc:// and http:// are without",
        ),
        ("", "unavailable"),
        ("draining\nand more", "draining"),
        ("x" * 200, "x" * 119 + "…"),
    ],
)
def test_the_reason_fits_a_line_and_says_what_helps(message, reason):
    assert Failure(grpc.StatusCode.UNAVAILABLE, message).reason == reason


def test_a_failed_sequence_names_its_field_and_keeps_its_delay():
    failure = failure_of_sequence(pb.ScoreFailure(code=3, message="too long", field="completion_ids"))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.message == "completion_ids: too long"
    assert failure.retry_delay_s is None
    assert failure_of_sequence(pb.ScoreFailure(code=8, retry_delay_s=1.5)).retry_delay_s == 1.5
    assert failure_of_sequence(pb.ScoreFailure(code=77)).code is grpc.StatusCode.UNKNOWN


def test_a_failed_precondition_is_something_the_teacher_cannot_do():
    assert isinstance(
        Failure(grpc.StatusCode.FAILED_PRECONDITION, "no hidden states").to_error(), TeacherUnsupportedError
    )
