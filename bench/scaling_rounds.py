"""Rounds of sequences over one stream, timed. All of a benchmark's rounds belong to one event loop."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np

from scaling_points import Point, round_of
from vopd_client.teacher import TeacherClient


@dataclass(frozen=True)
class Rounds:
    """What whole rounds took; bytes as they travelled."""

    seconds: float
    num_sequences: int
    bytes_sent: int
    bytes_received: int


async def play(url: str, point: Point, rng: np.random.Generator, least_s: float) -> Rounds:
    """Rounds until they have taken `least_s`, one at least; what makes the ids is not timed.

    A round's sequences are submitted at once, `point.concurrency` of them are outstanding at a time, and the next
    round begins with the last answer, as a trainer's steps do.
    """
    seconds, num_sequences = 0.0, 0
    async with TeacherClient(url, window=point.concurrency, float_type="float16") as client:
        stream = client.open_stream(temperature=1.0)
        sent, received = client.bytes_sent, client.bytes_received
        while not num_sequences or seconds < least_s:
            sequences = list(round_of(point, rng))
            began_s = time.perf_counter()
            await asyncio.gather(*map(stream.submit, sequences))
            seconds += time.perf_counter() - began_s
            num_sequences += len(sequences)
        return Rounds(seconds, num_sequences, client.bytes_sent - sent, client.bytes_received - received)
