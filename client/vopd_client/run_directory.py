"""The directory of a run: where things lie, whose it is, and whether there is room for it.

Everything that can be wrong with it is found before a model is loaded, except its size, which is known right
after. Rows and settings are replaced atomically: a killed process leaves the old file or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from vopd_client.errors import CheckpointError, ConfigError, RunDirectoryError

# Settings that may change when a run goes on: they say where things are, how long to wait and what to write.
FREE_ON_RESUME = frozenset(
    {
        *("output_dir", "name", "resume", "teacher_url", "api_key_file", "plaintext", "tls_ca_file"),
        *("teacher", "teacher_key_file"),  # whose names and models are pinned in the checkpoint's identity
        *("teacher_timeout_s", "teacher_window", "eval_every", "eval_teacher", "sample_count"),
        *("checkpoint_every", "keep_checkpoints", "trackers", "tracker_project"),
        *("rollouts_url", "rollouts_engine_args", "rollouts_timeout_s", "weight_sync"),
        "sharding",  # another order of additions, as with another number of processes
    }
)
# Settings that change the last bits of the numbers and nothing else.
BITS_ONLY = frozenset({"microbatch_tokens", "rollout_batch_size", "device", "gradient_checkpointing"})

PROBE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where everything of a run lies."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timeline_file(self) -> Path:
        return self.path / "timeline.jsonl"

    @property
    def evals_file(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def provenance_file(self) -> Path:
        return self.path / "provenance.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb_file(self) -> Path:
        """Which run of Weights & Biases this one is."""
        return self.path / "wandb_run.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def begin(self, settings: Mapping[str, Any], *, last_step: int) -> None:
        """Writes the settings, which makes the directory a run's, and drops rows of steps that are taken again."""
        write_atomically(self.config_file, yaml.safe_dump(dict(settings), sort_keys=False))
        for path in (self.metrics_file, self.timeline_file, self.evals_file, self.samples_file):
            drop_rows_after(path, last_step)


def run_path(output_dir: Path, name: str | None, *, objective: str, resume: bool, now: datetime) -> Path:
    """The directory of the run, named after the objective and the time of start unless it has a name.

    Raises: ConfigError when a run without a name is to go on, or the name is not that of one directory.
    """
    if name is None and resume:
        raise ConfigError("--resume needs --name: which run is to go on?")
    name = f"{objective}-{now:%Y%m%d-%H%M%S}" if name is None else name
    if Path(name).name != name or name in {"", ".", ".."}:
        raise ConfigError(f"name {name!r} must be the name of one directory, without slashes")
    return output_dir / name


@contextmanager
def claim_run_directory(path: Path, settings: Mapping[str, Any], *, resume: bool) -> Iterator[RunDirectory]:
    """Makes the directory or takes it over, and keeps other processes out of it until the end.

    It holds a run from `RunDirectory.begin` on, so a start that fails before leaves nothing in the way of the next.

    Raises: RunDirectoryError when it cannot be written, is full, holds a run that is not to go on, or is in use
        by another process; CheckpointError when the settings differ from those the run was started with.
    """
    run = RunDirectory(path)
    check_writable(path)
    with _only_process(path):
        if run.config_file.exists():
            if not resume:
                raise RunDirectoryError(f"{path} already holds a run: give --resume to go on, or another --name")
            check_same_settings(read_settings(run.config_file), settings)
        yield run


def check_writable(path: Path) -> None:
    """Makes the directory and proves that a file in it reaches the disk.

    Raises: RunDirectoryError with the system's reason.
    """
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot write to the run directory {path}: {error.strerror}") from error


def disk_free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def check_space(
    path: Path, needed_bytes: int, *, what: str, free_bytes: Callable[[Path], int] = disk_free_bytes
) -> None:
    """Raises RunDirectoryError when `needed_bytes` (explained by `what`) do not fit where `path` lies."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise RunDirectoryError(
            f"{path} has {free / 1e9:.2f} GB free, and the run needs {needed_bytes / 1e9:.2f} GB: {what}"
        )


def settings_that_matter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make two runs the same run.

    The number of steps is one only where the learning rate depends on it; what changes the last bits only, under
    `deterministic`.
    """
    free = FREE_ON_RESUME
    if settings.get("schedule") == "constant":
        free |= {"steps"}
    if not settings.get("deterministic"):
        free |= BITS_ONLY
    return {name: value for name, value in settings.items() if name not in free}


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A fingerprint of the settings that matter."""
    canonical = json.dumps(settings_that_matter(settings), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Settings that make the run another one, as `name: old -> new`, sorted by name."""
    before, now = settings_that_matter(old), settings_that_matter(new)
    return [
        f"{name}: {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def check_same_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises CheckpointError that names the settings that make the run another one."""
    differing = differing_settings(old, new)
    if differing:
        raise CheckpointError("this run cannot go on with other settings than it started with: " + "; ".join(differing))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if it does not exist. A last line that was cut off does not count.

    Raises: RunDirectoryError for any other line that is not a JSON object with a step.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut off
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(f"{path}:{number}: not a row of this run: {line[:80]!r}") from error
        rows.append(row)
    return rows


def drop_rows_after(path: Path, last_step: int) -> int:
    """Keeps the rows up to `last_step`, atomically; returns how many went."""
    if not path.exists():
        return 0
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    return len(rows) - len(kept)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file: readers and a crash see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Makes renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml. Raises: RunDirectoryError for a damaged file."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise RunDirectoryError(f"{path} is damaged: it does not hold settings")
    return settings


@contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Holds the lock of the directory; the system lets it go when the process ends, however it ends.

    A directory in which no run began is removed at the end.
    """
    lock = path / ".lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryError(f"{path} is in use by another process") from error
        try:
            yield
        finally:
            if [entry.name for entry in path.iterdir()] == [lock.name]:
                lock.unlink()
                path.rmdir()
