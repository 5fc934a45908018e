"""The keys file on the disk. It is replaced as a whole: a reader sees the old file or the new one."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vopd_server.errors import ConfigError
from vopd_server.key_file import NO_KEYS, SECRET, KeyFile, new_key, parse, serialise, stored_key, utc_now, with_key
from vopd_server.tenancy import TenantLimits

OWNER_ONLY = 0o600
ROOT = 0


def read_key_file(path: Path) -> KeyFile:
    """Raises: ConfigError, with the path, for a file that cannot be read or holds something else."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"keys file {path}: {_reason(error, path)}") from error
    except ConfigError as error:
        raise ConfigError(f"keys file {path}: {error}") from error


def change_key_file(path: Path, change: Callable[[KeyFile], KeyFile], *, create: bool = False) -> None:
    """Replaces the file by what `change` makes of it; of two at a time the second one sees what the first one did.

    create: takes a missing file for an empty one.
    Raises: ConfigError, with the path, for what cannot be read, changed or written.
    """
    if not create:
        read_key_file(path)  # before a lock is left beside nothing
    with _locked(path) as target:
        file = NO_KEYS if create and not target.exists() else read_key_file(path)
        try:
            changed = change(file)
        except ConfigError as error:
            raise ConfigError(f"keys file {path}: {error}") from error
        _replace(target, serialise(changed))


def create_key_file(path: Path, tenant_id: str) -> Path | None:
    """Makes the keys file with a key of one tenant, and beside it `TENANT_ID.key`, which holds the key itself.

    Returns the latter; None, and nothing is done, where there is a keys file. A TENANT_ID.key that is there already
    stays: of a start that was cut short, or of whoever prepared it.
    Raises: ConfigError when one of the two cannot be written, or TENANT_ID.key holds something else.
    """
    with _locked(path) as target:
        if target.exists():
            return None
        key_path = path.with_name(f"{tenant_id}.key")
        now = utc_now()
        if key_path.exists():
            stored = stored_key(tenant_id, _secret_in(key_path, tenant_id), TenantLimits(), created_at=now)
        else:
            key, stored = new_key(tenant_id, TenantLimits(), created_at=now)
            _replace(key_path, f"{key}\n")
        _replace(target, serialise(with_key(NO_KEYS, stored)))
        return key_path


def write_key(path: Path, key: str) -> None:
    """Writes a key that is handed out to a new file, for its owner alone. Raises: ConfigError, also if there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{key}\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}: {_reason(error, path)}") from error


def _secret_in(path: Path, tenant_id: str) -> str:
    try:
        found, _, secret = path.read_text(errors="replace").strip().partition(".")
    except OSError as error:
        raise ConfigError(f"{path}: {_reason(error, path)}") from error
    if found != tenant_id or not SECRET.fullmatch(secret):
        raise ConfigError(f"{path} holds no key of tenant {tenant_id!r}: move it away")
    return secret


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Holds the file's lock; gives where the file is, links followed. Raises: ConfigError for every OSError within."""
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, OWNER_ONLY)
        try:
            if os.geteuid() == ROOT and target.exists():  # or the file's owner could not lock it from now on
                os.fchown(lock, target.stat().st_uid, target.stat().st_gid)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield target
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigError(f"keys file {path}: {_reason(error, path)}") from error


def _replace(path: Path, text: str) -> None:
    """Atomically, and on the disk when it returns. A new file is its owner's alone, of an old one owner and mode stay:
    what root changes goes on being read by the server.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            if path.exists():
                _take_over(descriptor, path.stat())
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _take_over(descriptor: int, old: os.stat_result) -> None:
    """Raises: ConfigError where the old file is another user's, and who runs this is not root."""
    us = os.geteuid()
    if us == ROOT:
        os.fchown(descriptor, old.st_uid, old.st_gid)
    elif us != old.st_uid:
        raise ConfigError(f"the keys file is user {old.st_uid}'s, and this is user {us}: only root could keep it so")
    os.fchmod(descriptor, old.st_mode & 0o777)


def _reason(error: OSError, path: Path) -> str:
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    return error.strerror or str(error)
