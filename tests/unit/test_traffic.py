"""Bytes between two looks, whenever they came."""

from __future__ import annotations

from typing import Any

from vopd_client.scoring import Traffic


class CountingTeacher:
    """Has been asked and has answered before."""

    bytes_sent, bytes_received = 100, 1000


def test_what_arrives_after_a_look_is_in_the_next_one() -> None:
    teacher: Any = CountingTeacher()
    traffic = Traffic(teacher)
    teacher.bytes_sent += 5
    assert traffic.since_last_look() == 5  # what was before is nobody's
    teacher.bytes_received += 70  # a late answer
    teacher.bytes_sent += 6
    assert traffic.since_last_look() == 76
    assert traffic.since_last_look() == 0
