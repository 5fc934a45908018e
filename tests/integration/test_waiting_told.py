"""From the scheduler to what a training's user reads: why the teacher's answer is not there yet."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from fake_engine import until
from fake_server import fake_teacher
from vopd_client.teacher.client import TeacherClient
from vopd_client.types import NoSupport, SequenceToScore
from vopd_server import grpc_stream

SEQUENCE = SequenceToScore(np.arange(10), np.arange(10), NoSupport())


async def test_a_stream_says_for_what_its_sequences_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "TELL_WHY_EVERY_S", 0.05)
    async with fake_teacher(queue_tokens=50, max_tokens_per_request=50) as teacher:
        teacher.engine.hold()
        async with TeacherClient(teacher.url) as client, client.open_stream() as stream:
            asked = [asyncio.create_task(stream.submit(SEQUENCE)) for _ in range(4)]
            await until(lambda: "tokens unanswered" in client.waiting_reason)
            assert client.waiting_reason.startswith("teacher busy: tenant open has 40 of 50 tokens unanswered (")
            teacher.engine.let_go()
            await asyncio.gather(*asked)
            assert client.waiting_reason == ""
