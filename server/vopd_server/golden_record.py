"""What earlier starts scored on the golden sequence: a JSON file that people can read and replicas can share.

Starts that write wait for one another (a lock file beside it), and readers see the old text or the new one. A start
that finds its entry writes nothing, so a file with every entry may be read-only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from vopd_server.errors import ConfigError

_KEY_DIGITS = 16


class GoldenEntry(BaseModel):
    """One start's scores. The first start of its kind is the one that stays, so that drift cannot creep in.

    sequence: a hash of what was scored, so that another sequence (of a shorter model, of a later version) is another
        entry. logprobs_nats: in the order of `golden.flat_logprobs`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    model: str
    revision: str
    dtype: str
    engine: str
    engine_version: str
    recorded_on: date
    sequence: str
    logprobs_nats: list[float]

    @property
    def key(self) -> str:
        """The same for starts whose scores should agree.

        Without the engine's version: a new one must not change scores either, and is found out here when it does.
        Without the device: kernels of other devices round differently, within the tolerance of the dtype. With the
        engine: two of them differ by nearly that tolerance, and which one runs is a deliberate choice.
        """
        parts = [self.model, self.revision, self.dtype, self.engine, self.sequence]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_DIGITS]


_ENTRIES = TypeAdapter(dict[str, GoldenEntry])


def recall_or_record(path: Path, entry: GoldenEntry) -> GoldenEntry | None:
    """The earlier entry of the same key; None: there was none, and `entry` is in the file now. Blocks on the disk.

    Raises: ConfigError for a file that cannot be read, is damaged or cannot be written.
    """
    earlier = _read(path).get(entry.key)
    if earlier is not None:
        return earlier
    try:
        with _locked(path):
            entries = _read(path)
            if entry.key not in entries:  # a replica may have been faster
                _write(path, {**entries, entry.key: entry})
            return entries.get(entry.key)
    except OSError as error:
        raise ConfigError(f"golden_file {path} cannot be written: {error.strerror or error}") from error


def check_golden_file(path: Path) -> None:
    """What can be said before a model is loaded. Changes nothing.

    Raises: ConfigError for a file that cannot be read or is damaged, and where none can be made.
    """
    _read(path)
    if not path.exists() and not os.access(path.parent, os.W_OK | os.X_OK):
        reason = "not ours to write to" if path.parent.is_dir() else "no such directory"
        raise ConfigError(f"golden_file {path} cannot be written: {path.parent}: {reason}")


def _read(path: Path) -> dict[str, GoldenEntry]:
    try:
        return _ENTRIES.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"golden_file {path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"golden_file {path} is damaged: {f'{where}: ' if where else ''}{first['msg']}; "
            "put it right, or remove it: the next start records anew"
        ) from error


def _write(path: Path, entries: Mapping[str, GoldenEntry]) -> None:
    """Atomically; whoever calls holds the lock, so the temporary name is ours. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(_text(entries))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _text(entries: Mapping[str, GoldenEntry]) -> str:
    """JSON with a line a field: indented all the way down, every number would have its own."""
    blocks = []
    for key, entry in entries.items():
        fields = json.loads(entry.model_dump_json())
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        blocks.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises: OSError."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, and with the process
        yield
