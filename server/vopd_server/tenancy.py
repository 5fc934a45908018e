"""Who shares the teacher: a tenant is one student job or team, and what it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

OPEN_TENANT_ID = "open"


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may take. None: the server's own limit, or no limit where it has none.

    weight: of its share of a busy engine, against the weights of the others that are busy.
    tokens_in_flight: in the engine at a time, at most.
    tokens_per_minute: let into the engine, on average; what comes faster waits.
    queue_tokens: admitted and not yet answered, at most; over it requests are refused and streams held back.
    max_top_k: ids in the support of one position, at most.

    Tokens are context + completion tokens.
    """

    weight: float = 1.0
    tokens_in_flight: int | None = None
    tokens_per_minute: int | None = None
    queue_tokens: int | None = None
    max_top_k: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a call belongs to. cache_salt: keeps the tenant's prefix cache apart from that of others."""

    id: str
    limits: TenantLimits = field(default_factory=TenantLimits)
    cache_salt: str = ""


OPEN_TENANT = Tenant(OPEN_TENANT_ID)
NOBODY = Tenant("")  # before it is known whose call it is, and of calls without a valid key


class Doorkeeper(Protocol):
    """Says whose call it is.

    problem: why the tenants are not those that the operator last asked for; "" while they are.
    """

    @property
    def tenants(self) -> Sequence[Tenant]: ...

    @property
    def problem(self) -> str: ...

    def authenticate(self, key: str | None) -> Tenant:
        """Raises: UnauthenticatedError."""
        ...

    def reload_if_changed(self) -> bool:
        """Looks for other tenants or keys, and tells whether there were any. Cheap where nothing has changed."""
        ...
