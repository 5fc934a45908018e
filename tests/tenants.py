"""The real server with a keys file, around a fake engine, and clients that have its keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine
from fake_server import FakeTeacher, fake_teacher
from vopd_server.key_file import new_key, utc_now, with_key, with_revoked
from vopd_server.key_storage import change_key_file
from vopd_server.tenancy import TenantLimits
from wire_client import connect


@dataclass(frozen=True)
class SharedTeacher:
    """keys: by tenant."""

    teacher: FakeTeacher
    keys_file: Path
    keys: dict[str, str]

    @property
    def engine(self) -> FakeEngine:
        return self.teacher.engine

    def connect(self, tenant_id: str) -> Any:
        """`async with` a client that sends the tenant's key."""
        return self.connect_with(f"Bearer {self.keys[tenant_id]}")

    def connect_with(self, authorization: str) -> Any:
        server = self.teacher.server
        return connect(server.url, server.http_url, authorization=authorization)

    def add(self, tenant_id: str, limits: TenantLimits) -> None:
        """As `vopd-server keys create` does, and the look at the file that follows within a second."""
        self.keys[tenant_id] = write_key(self.keys_file, tenant_id, limits)
        self.teacher.server.service.refresh_tenants()

    def revoke(self, tenant_id: str) -> None:
        change_key_file(self.keys_file, lambda file: with_revoked(file, tenant_id, revoked_at=utc_now()))
        self.teacher.server.service.refresh_tenants()

    @property
    def sums(self) -> dict[str, tuple[int, int, int, int, int]]:
        """Of each tenant: reserved tokens and bytes, and held, queued and running sequences."""
        return {
            name: (q.reserved_tokens, q.reserved_bytes, len(q.held), len(q.queued), q.num_running)
            for name, q in self.teacher.server.service.admission.scheduler.queues.items()
        }

    @property
    def is_empty(self) -> bool:
        """Every budget is back at zero."""
        scheduler = self.teacher.server.service.admission.scheduler
        return scheduler.window_used == 0 and all(not any(sums) for sums in self.sums.values())


def write_key(keys_file: Path, tenant_id: str, limits: TenantLimits) -> str:
    key, stored = new_key(tenant_id, limits, created_at=utc_now())
    change_key_file(keys_file, lambda file: with_key(file, stored), create=True)
    return key


@asynccontextmanager
async def shared_teacher(
    directory: Path, tenants: Mapping[str, TenantLimits], engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[SharedTeacher]:
    """A running server. `settings` are those of ServerConfig."""
    keys_file = directory / "keys.json"
    keys = {tenant_id: write_key(keys_file, tenant_id, limits) for tenant_id, limits in tenants.items()}
    async with fake_teacher(engine, keys_file=keys_file, **settings) as teacher:
        yield SharedTeacher(teacher, keys_file, keys)
