"""What a keys file says: who may use the teacher, and how much of it. JSON, for people to read.

    {"version": 1, "keys": [{"id": "alice", "secret_sha256": "…", "created_at": "2026-01-02T12:00:00Z",
                             "revoked_at": null, "weight": 2.0, "tokens_in_flight": null, …}]}

An API key is `id.secret`: the tenant's id and 256 random bits. The file holds the secret's SHA-256 and no more, so
whoever reads it cannot call the teacher.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import secrets
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vopd_server.errors import ConfigError
from vopd_server.tenancy import OPEN_TENANT_ID, Tenant, TenantLimits

VERSION: Final = 1
SECRET_BYTES = 32
SECRET = re.compile(r"[A-Za-z0-9_-]{43}")  # 32 bytes in base64, without padding
MAX_ID_LENGTH = 64
NUM_LISTED = 20  # ids in a message, at most


def _checked_id(value: str) -> str:
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_ID_LENGTH}}}", value):
        raise ValueError(f"must be 1 to {MAX_ID_LENGTH} letters (a-z), digits, '-' or '_'")
    if value == OPEN_TENANT_ID:
        raise ValueError(f"'{OPEN_TENANT_ID}' is everyone, on a server without keys")
    return value


def _checked_utc(value: datetime) -> datetime:
    if value.utcoffset() != timedelta(0):
        raise ValueError("must be a time in UTC, as 2026-01-02T12:00:00Z")
    return value


TenantId = Annotated[str, AfterValidator(_checked_id)]
UtcTime = Annotated[AwareDatetime, AfterValidator(_checked_utc)]
Limit = Annotated[int | None, Field(ge=1)]


class StoredKey(BaseModel):
    """One tenant: what proves its key, and its limits (`TenantLimits` explains them)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: TenantId
    secret_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at: UtcTime
    revoked_at: UtcTime | None = None
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    tokens_in_flight: Limit = None
    tokens_per_minute: Limit = None
    queue_tokens: Limit = None
    max_top_k: Limit = None

    @property
    def is_active(self) -> bool:
        return self.revoked_at is None

    @property
    def limits(self) -> TenantLimits:
        return TenantLimits(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TenantLimits)})

    @property
    def tenant(self) -> Tenant:
        """Its cache salt comes from what outsiders do not know, and stays the same as long as the key does."""
        salt = hashlib.sha256(f"vopd prefix cache {self.id} {self.secret_sha256}".encode()).hexdigest()
        return Tenant(self.id, self.limits, salt)


class KeyFile(BaseModel):
    """The file as a whole; at most one key a tenant."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    keys: tuple[StoredKey, ...]

    @model_validator(mode="after")
    def _one_key_a_tenant(self) -> KeyFile:
        repeated = [tenant_id for tenant_id, count in Counter(key.id for key in self.keys).items() if count > 1]
        if repeated:
            raise ValueError(f"more than one key of {listed(repeated)}")
        return self

    @property
    def active(self) -> tuple[StoredKey, ...]:
        return tuple(key for key in self.keys if key.is_active)

    @property
    def summary(self) -> str:
        """`2 tenants`, or `2 tenants, 1 revoked key`."""
        num_active, num_revoked = len(self.active), len(self.keys) - len(self.active)
        tenants = "1 tenant" if num_active == 1 else f"{num_active} tenants"
        revoked = "1 revoked key" if num_revoked == 1 else f"{num_revoked} revoked keys"
        return f"{tenants}, {revoked}" if num_revoked else tenants


NO_KEYS = KeyFile(version=VERSION, keys=())


def hash_secret(secret: str) -> str:
    """SHA-256 in hex. No salt and no work factor: nobody guesses 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(tenant_id: str, limits: TenantLimits, *, created_at: datetime) -> tuple[str, StoredKey]:
    """The key to hand out, which is kept nowhere, and what is stored of it.

    Raises: ConfigError for an id or a limit that cannot be.
    """
    secret = secrets.token_urlsafe(SECRET_BYTES)
    return f"{tenant_id}.{secret}", stored_key(tenant_id, secret, limits, created_at=created_at)


def stored_key(tenant_id: str, secret: str, limits: TenantLimits, *, created_at: datetime) -> StoredKey:
    """Raises: ConfigError for an id or a limit that cannot be."""
    numbers = dataclasses.asdict(limits)
    try:
        return StoredKey(id=tenant_id, secret_sha256=hash_secret(secret), created_at=created_at, **numbers)
    except ValidationError as error:
        raise ConfigError(f"tenant {tenant_id!r}: {_explained(error).removeprefix('id: ')}") from error


def with_key(file: KeyFile, key: StoredKey) -> KeyFile:
    """`file` with `key` in it, in the place of a revoked one of the same tenant.

    Raises: ConfigError when the tenant has an active key.
    """
    for other in file.active:
        if other.id == key.id:
            raise ConfigError(
                f"tenant {key.id!r} has an active key, created on {other.created_at:%Y-%m-%d}: revoke it first, "
                f"or take an id other than {listed(active.id for active in file.active)}"
            )
    return KeyFile(version=VERSION, keys=(*(other for other in file.keys if other.id != key.id), key))


def with_revoked(file: KeyFile, tenant_id: str, *, revoked_at: datetime) -> KeyFile:
    """`file` with the key of `tenant_id` revoked. Raises: ConfigError when there is none, or it was revoked before."""
    active = listed(key.id for key in file.active) or "none"
    for index, key in enumerate(file.keys):
        if key.id != tenant_id:
            continue
        if key.revoked_at is not None:
            raise ConfigError(
                f"the key of tenant {tenant_id!r} was revoked on {key.revoked_at:%Y-%m-%d}; active: {active}"
            )
        revoked = key.model_copy(update={"revoked_at": revoked_at})
        return KeyFile(version=VERSION, keys=(*file.keys[:index], revoked, *file.keys[index + 1 :]))
    raise ConfigError(f"there is no tenant {tenant_id!r}; active: {active}")


def listed(ids: Iterable[str]) -> str:
    """`'a', 'b'`; of many the first."""
    names = [repr(tenant_id) for tenant_id in ids]
    more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return ", ".join(names[:NUM_LISTED]) + more


def utc_now() -> datetime:
    """In whole seconds, as the file shows it."""
    return datetime.now(UTC).replace(microsecond=0)


def serialise(file: KeyFile) -> str:
    return file.model_dump_json(indent=2) + "\n"


def parse(content: bytes | str) -> KeyFile:
    """Raises: ConfigError saying in a line what is wrong and where; nothing that could be a secret is repeated."""
    try:
        return KeyFile.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(_explained(error)) from None  # the library's own words repeat the file


def _explained(error: ValidationError) -> str:
    """`keys[2].weight: input should be greater than 0 (got -1)`, and how many more there are."""
    details = error.errors(include_url=False)
    first = next((detail for detail in details if detail["loc"] == ("version",)), details[0])
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    words = _words(first["type"], first["msg"], first["input"])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{place}: {words}{more}" if place else f"{words}{more}"


def _words(kind: str, message: str, value: Any) -> str:
    if kind == "json_invalid":
        return f"not JSON: {message.removeprefix('Invalid JSON: ')}"
    if kind == "literal_error":
        return f"must be {VERSION}, the version that is read here"
    if kind == "string_pattern_mismatch":
        return "must be a SHA-256: 64 digits, 0-9 and a-f"
    if kind == "extra_forbidden":
        return "no such field"
    message = message.removeprefix("Value error, ")
    shown = f" (got {value!r})" if isinstance(value, int | float) else ""
    return f"{message[0].lower()}{message[1:]}{shown}"
