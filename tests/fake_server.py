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
        """Tokens admitted and not yet answered."""
        return self.server.service.admission.budget.reserved_tokens

    @property
    def num_waiting(self) -> int:
        """Sequences held back because the budget is taken."""
        return self.server.service.admission.budget.num_waiting


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
        async with connect(server.url, server.http_url) as client:
            yield FakeTeacher(server, engine, client)
    finally:
        await server.close()
