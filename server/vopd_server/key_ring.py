"""Who is let in: whose call it is, by the API key that came with it. The doorkeepers that `tenancy` describes."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from vopd_server.config import ServerConfig
from vopd_server.errors import ConfigError, UnauthenticatedError
from vopd_server.key_file import MAX_ID_LENGTH, NO_KEYS, KeyFile, hash_secret
from vopd_server.key_storage import create_key_file, read_key_file
from vopd_server.tenancy import OPEN_TENANT, Tenant

logger = logging.getLogger(__name__)

FIRST_TENANT_ID = "default"  # whose key is made together with the file
MAX_KEY_LENGTH = 2 * MAX_ID_LENGTH  # ours are at most 108
NO_KEY = "no API key came with the call: send `authorization: Bearer KEY` (vopd-client: --api-key-file)"
WRONG_KEY = "this API key is not known here, or it was revoked"

TenantCheck = Callable[[Sequence[Tenant]], None]
Signature = tuple[int, int, int]


class OpenDoor:
    """A server without keys: every call is one tenant's, whatever key comes with it."""

    problem = ""
    tenants = (OPEN_TENANT,)

    def authenticate(self, key: str | None) -> Tenant:
        return OPEN_TENANT

    def is_active(self, tenant_id: str) -> bool:
        return tenant_id == OPEN_TENANT.id

    def reload_if_changed(self) -> bool:
        return False


class KeyRing:
    """The keys of a file, which may change while the server runs."""

    def __init__(self, path: Path, check: TenantCheck) -> None:
        """Nobody is let in before `from_file` has read the file."""
        self.path = path
        self.problem = ""
        self._check = check
        self._signature: Signature | None = None
        self._take(NO_KEYS)

    @classmethod
    def from_file(cls, path: Path, check: TenantCheck = lambda tenants: None) -> KeyRing:
        """check: raises ConfigError for tenants that this server cannot have; later ones are refused as well.

        Raises: ConfigError for a file that cannot be read, holds something else, or is refused by `check`.
        """
        ring = cls(path, check)
        ring._signature = _signature(path)  # before reading: what is written in between is found by the next look
        ring._take(ring._read())
        ring._warn_if_empty()
        return ring

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """Those with an active key, as the file orders them."""
        return tuple(self._tenants.values())

    def authenticate(self, key: str | None) -> Tenant:
        """Whose key this is. Neither the error nor the time it takes tells an unknown tenant from a wrong secret.

        Raises: UnauthenticatedError.
        """
        if key is None:
            raise UnauthenticatedError(NO_KEY)
        if len(key) > MAX_KEY_LENGTH or not key.isascii():
            raise UnauthenticatedError(WRONG_KEY)
        tenant_id, _, secret = key.partition(".")
        stored = self._keys.get(tenant_id)
        expected = stored.secret_sha256 if stored is not None else _NOBODYS_SHA256
        is_right = hmac.compare_digest(hash_secret(secret), expected)
        tenant = self._tenants.get(tenant_id)
        if not is_right or tenant is None:
            raise UnauthenticatedError(WRONG_KEY)
        return tenant

    def is_active(self, tenant_id: str) -> bool:
        return tenant_id in self._tenants

    def reload_if_changed(self) -> bool:
        """Takes the file's keys where they are others now; whether they were.

        A file that is broken, missing or refused changes nothing: the keys stay, `problem` says why, and it is tried
        again at every call until it can be read.
        """
        signature = _signature(self.path)
        if signature == self._signature and not self.problem:
            return False
        self._signature = signature
        try:
            file = self._read()
        except ConfigError as error:
            if str(error) != self.problem:
                logger.error("%s; the keys from before stay in force", error)
            self.problem = str(error)
            return False
        if self.problem:
            logger.info("keys file %s can be read again", self.path)
            self.problem = ""
        if file == self._file:
            return False
        before = self._tenants.keys()
        self._take(file)
        after = self._tenants.keys()
        told = {"num_tenants": len(after), "new": sorted(after - before), "gone": sorted(before - after)}
        logger.info("keys file %s has changed", self.path, extra=told)
        self._warn_if_empty()
        return True

    def _read(self) -> KeyFile:
        """Raises: ConfigError."""
        file = read_key_file(self.path)
        try:
            self._check([key.tenant for key in file.active])
        except ConfigError as error:
            raise ConfigError(f"keys file {self.path}: {error}") from error
        return file

    def _take(self, file: KeyFile) -> None:
        self._file = file
        self._keys = {key.id: key for key in file.keys}
        self._tenants = {key.id: key.tenant for key in file.active}

    def _warn_if_empty(self) -> None:
        if not self._tenants:
            logger.warning("keys file %s has no active key: every call is refused", self.path)


def open_doors(config: ServerConfig, check: TenantCheck = lambda tenants: None) -> tuple[KeyRing | OpenDoor, str]:
    """Who is let in by these settings, and what start-up has to say of it: where keys were created; mostly nothing.

    Raises: ConfigError, as `KeyRing.from_file` does, and when the file cannot be created.
    """
    if config.keys_file is None:
        return OpenDoor(), ""
    said = ""
    if config.create_keys_file:
        key_path = create_key_file(config.keys_file, FIRST_TENANT_ID)
        if key_path is not None:
            said = f"created keys file {config.keys_file}; the key of tenant {FIRST_TENANT_ID} is in {key_path}"
            logger.warning(said)
    return KeyRing.from_file(config.keys_file, check), said


def _signature(path: Path) -> Signature | None:
    """Changes whenever the file does; None when it cannot be found."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


_NOBODYS_SHA256 = hash_secret("")
