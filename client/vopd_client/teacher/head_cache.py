"""Output heads on disk, each in a file named by the SHA-256 of what it holds. Knows nothing of connections.

A download writes a file of its own, which takes its name in one step once it is whole and what was announced: other
processes may download the same at the same time, and a killed one leaves nothing that counts.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vopd_client.errors import ConfigError, HandshakeError

# A download that nobody has written to for so long is dead: a live one is given up on long before.
STALE_AFTER_S = 3600.0
_UNFINISHED = ".part"


def default_cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """`vopd/heads` in $XDG_CACHE_HOME, or in ~/.cache where that is unset or not absolute.

    Raises: ConfigError for a user without a home directory.
    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path("~/.cache").expanduser()
        except RuntimeError as error:
            raise ConfigError(f"no directory to keep the teacher's output head in: {error}") from error
    return base / "vopd" / "heads"


class HeadCache:
    """The heads in one directory, which is made with the first of them."""

    def __init__(self, directory: Path | None = None) -> None:
        """directory: None is `default_cache_dir`. Raises: ConfigError."""
        self._directory = directory or default_cache_dir()

    def find(self, sha256: str) -> Path | None:
        """The file with this head, read through and compared with its name; None: absent or damaged.

        A damaged file stays until a good one takes its name: deleting it could hit another process's good one.

        Raises: ConfigError when it cannot be read; HandshakeError as `receive`.
        """
        path = self._path(sha256)
        try:
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read the teacher's output head in {path}: {error.strerror}") from error
        return path if actual == sha256 else None

    @contextmanager
    def receive(self, sha256: str) -> Iterator[IncomingHead]:
        """A head to be written within the block; what `keep` was not called for is deleted at its end.

        Raises: ConfigError for a directory that cannot be written to; HandshakeError for a name that is no SHA-256.
        """
        path = self._path(sha256)
        part = path.with_name(f"{sha256}.{uuid.uuid4().hex}{_UNFINISHED}")
        with _disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            file = part.open("xb")
        try:
            yield IncomingHead(file, path)
        finally:
            with suppress(OSError):  # what cannot be deleted now is stale some day
                part.unlink(missing_ok=True)
            with suppress(OSError):  # what a full disk does not take is not missed
                file.close()

    def _path(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a file's name, and somebody else made it up
            raise HandshakeError(f"the teacher says that its output head has the SHA-256 {sha256!r}, which is none")
        return self._directory / f"{sha256}.safetensors"

    def _remove_stale(self) -> None:
        """Downloads whose process was killed."""
        for part in self._directory.glob(f"*{_UNFINISHED}"):
            with suppress(OSError):  # finished meanwhile, or another user's
                if time.time() - part.stat().st_mtime > STALE_AFTER_S:
                    part.unlink()


class IncomingHead:
    """A head on its way to the disk, hashed as it comes. `num_bytes`: how much has come."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """file: new and empty. path: what it is to become, named by the SHA-256 to expect."""
        self._file = file
        self._path = path
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        """Raises: ConfigError when the disk is full."""
        with _disk_errors(self._path.parent):
            self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def keep(self) -> Path:
        """Makes it the file of its head. A power cut may still lose some of it, which `find` would notice.

        Raises: HandshakeError when it is another than announced; ConfigError when the disk is full.
        """
        actual, announced = self._hash.hexdigest(), self._path.stem
        if actual != announced:
            raise HandshakeError(
                f"the teacher's output head came with SHA-256 {actual} instead of the announced {announced} "
                f"({self.num_bytes} bytes)"
            )
        with _disk_errors(self._path.parent):
            self._file.close()
            os.replace(self._file.name, self._path)
        return self._path


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot keep the teacher's output head in {directory}: {error.strerror or error}") from error
