"""The client library and the real server with a bad network in between: cut, restored, and silent for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from fake_engine import fake_logprobs_TV, until
from fake_server import FakeTeacher, fake_teacher
from vopd_client.teacher import grpc_transport
from vopd_client.teacher.client import TeacherClient
from vopd_client.types import SequenceScores, SequenceToScore, TeacherTopK
from vopd_server import grpc_api, lifecycle

NUM_SEQUENCES = 40


class Proxy:
    """Forwards bytes to a port, until it is told otherwise. url: as the client is to know the teacher."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.port is not None
        self._target_port = parts.port
        self._scheme = parts.scheme
        self._writers: list[asyncio.StreamWriter] = []
        self._forwarding: set[asyncio.Task[None]] = set()
        self.num_connections = 0
        self.url = ""

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"{self._scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._forward(source, sink))
            self._forwarding.add(task)
            task.add_done_callback(self._forwarding.discard)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(2**16):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        if not sink.is_closing():
            sink.close()

    def cut(self) -> None:
        """Every connection there is is reset; new ones are forwarded."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def go_silent(self) -> None:
        """What there is stays open, and nothing comes through any more; new connections are forwarded."""
        for task in self._forwarding:
            task.cancel()


@asynccontextmanager
async def proxied(teacher: FakeTeacher, scheme: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(teacher.url if scheme == "grpc" else teacher.server.http_url)
    server = await proxy.start()
    try:
        yield proxy
    finally:
        proxy.go_silent()
        proxy.cut()
        server.close()


def sequences() -> Iterator[SequenceToScore]:
    rng = np.random.default_rng(3)
    for _ in range(NUM_SEQUENCES):
        yield SequenceToScore(rng.integers(0, 300, 12), rng.integers(0, 300, 9), TeacherTopK(4))


def assert_right(asked: SequenceToScore, scores: SequenceScores) -> None:
    expected_TV = fake_logprobs_TV(asked.context_ids, asked.completion_ids)
    np.testing.assert_allclose(scores.sampled_logprobs_T, expected_TV[range(9), asked.completion_ids], atol=1e-5)
    np.testing.assert_allclose(scores.support_logprobs, -np.sort(-expected_TV, axis=1)[:, :4].ravel(), atol=1e-5)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_a_network_that_is_cut_and_restored_costs_no_sequence(scheme: str) -> None:
    async with fake_teacher() as teacher, proxied(teacher, scheme) as proxy:
        teacher.engine.hold()
        async with TeacherClient(proxy.url, window=16) as client, client.open_stream() as stream:
            asked = list(sequences())
            answers = [asyncio.create_task(stream.submit(sequence)) for sequence in asked]
            for _ in range(3):
                before = proxy.num_connections
                await until(lambda: teacher.engine.num_running >= 16)
                proxy.cut()
                await until(lambda: proxy.num_connections > before)  # noqa: B023
            teacher.engine.let_go()
            for sequence, scores in zip(asked, await asyncio.gather(*answers), strict=True):
                assert_right(sequence, scores)
        await until(lambda: teacher.reserved_tokens == 0 and teacher.num_waiting == 0)
        assert teacher.engine.num_running == 0


async def test_a_connection_that_is_silent_for_ever_is_found_by_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pings within seconds here, for the minute or so that they take otherwise."""
    quick = [(name, 1000) for name in ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms")]
    assert {name for name, _ in quick} <= dict(grpc_transport.CHANNEL_OPTIONS).keys() & dict(grpc_api.server_options(1))
    monkeypatch.setattr(grpc_transport, "CHANNEL_OPTIONS", with_options(grpc_transport.CHANNEL_OPTIONS, quick))
    server_options = partial(grpc_api.server_options, min_ping_interval_ms=500)
    monkeypatch.setattr(lifecycle, "server_options", lambda size: with_options(server_options(size), quick))
    async with fake_teacher() as teacher, proxied(teacher, "grpc") as proxy:
        teacher.engine.hold()
        async with TeacherClient(proxy.url, window=16) as client, client.open_stream() as stream:
            asked = list(sequences())
            answers = [asyncio.create_task(stream.submit(sequence)) for sequence in asked]
            await until(lambda: teacher.engine.num_running == 16)
            proxy.go_silent()
            await until(lambda: teacher.engine.num_cancelled == 16)  # the server's end gave them back
            await until(lambda: teacher.engine.num_running == 16)  # and the client sent them again
            teacher.engine.let_go()
            for sequence, scores in zip(asked, await asyncio.gather(*answers), strict=True):
                assert_right(sequence, scores)
        await until(lambda: teacher.reserved_tokens == 0)


def with_options(options: Any, changed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [*((name, value) for name, value in options if name not in dict(changed)), *changed]
