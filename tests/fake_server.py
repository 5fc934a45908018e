"""The real server on a real socket around a fake engine, in the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fake_engine import FakeEngine
from vopd_server.config import ServerConfig
from vopd_server.lifecycle import TeacherServer
from wire_client import WireClient, connect


@dataclass(frozen=True)
class FakeTeacher:
    """A running server, its engine, and a client that is connected to it."""

    server: TeacherServer
    engine: FakeEngine
    client: WireClient

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def reserved_tokens(self) -> int:
        """Tokens admitted and not yet answered, of all tenants."""
        return sum(queue.reserved_tokens for queue in self.server.service.admission.scheduler.queues.values())

    @property
    def num_waiting(self) -> int:
        """Sequences of streams held back because their tenant is at its bound."""
        return sum(len(queue.held) for queue in self.server.service.admission.scheduler.queues.values())


@asynccontextmanager
async def fake_teacher(engine: FakeEngine | None = None, **settings: Any) -> AsyncIterator[FakeTeacher]:
    """`settings` are those of ServerConfig; no admin listener, which takes a while to end."""
    engine = engine or FakeEngine()
    server = TeacherServer(
        ServerConfig(model="fake", **{"port": 0, "http_port": 0, "admin_port": None, **settings}), engine
    )
    try:
        await server.start()
        await server.load()
        engine.requests.clear()  # those of the golden probe
        async with connect(server.url, server.http_url) as client:
            yield FakeTeacher(server, engine, client)
    finally:
        await server.close()
