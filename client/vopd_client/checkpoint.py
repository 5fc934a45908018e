"""Checkpoints that are complete or not there.

A checkpoint is written into a temporary sibling, made durable, and renamed; older ones go only after that.
`trainer_state.json` is written last and lists every other file with its size and checksum, so a checkpoint that
was cut off or damaged is recognised and passed over.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from vopd_client.errors import CheckpointError, RunDirectoryError
from vopd_client.run_directory import fsync_directory, write_atomically

STATE_FILE = "trainer_state.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a run has done so far, beside the weights."""

    step: int = 0  # the last complete one
    train_seconds: float = 0.0
    teacher_wait_seconds: float = 0.0
    teacher_bytes: int = 0
    num_valid_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What must be the same for a checkpoint to go on."""

    config_hash: str
    prompts_hash: str
    teacher_model_id: str
    teacher_model_revision: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainerState
    identity: RunIdentity


class StateWriter(Protocol):
    """What saving needs of accelerate's Accelerator."""

    @property
    def is_main_process(self) -> bool: ...

    def wait_for_everyone(self) -> None: ...

    def save_state(self, output_dir: str) -> Any: ...


class StateStorage(StateWriter, Protocol):
    """What going on needs, too."""

    def load_state(self, input_dir: str) -> Any: ...


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(
    checkpoints: Path,
    state: TrainerState,
    identity: RunIdentity,
    *,
    writer: StateWriter,
    keep: int,
    write_own_files: Callable[[Path], None] = lambda directory: None,
) -> Path:
    """Writes the checkpoint of `state.step`, then deletes all but the newest `keep` complete ones.

    write_own_files: writes what each process has of its own into the directory, before it is sealed.

    Every process calls it. Raises: RunDirectoryError when it cannot be written; the older ones are untouched then.
    """
    final = checkpoints / checkpoint_name(state.step)
    temporary = checkpoints / f"{_TEMPORARY}{final.name}"
    try:
        if writer.is_main_process:
            checkpoints.mkdir(exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        writer.wait_for_everyone()
        writer.save_state(str(temporary))
        write_own_files(temporary)
        writer.wait_for_everyone()
        if writer.is_main_process:
            _seal(temporary, state, identity)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            temporary.rename(final)
            fsync_directory(checkpoints)
            _delete_all_but_newest(checkpoints, keep)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunDirectoryError(f"cannot write the checkpoint of step {state.step} to {final}: {error}") from error
    writer.wait_for_everyone()
    return final


def newest_checkpoint(checkpoints: Path, *, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint, None when none was ever written; `tell` hears of each that is passed over.

    Raises: CheckpointError when there are checkpoints and none of them can be read.
    """
    for leftover in sorted(checkpoints.glob(f"{_TEMPORARY}*")):
        tell(f"ignoring {leftover}: it was not finished")
    num_unreadable = 0
    for path in _by_step_descending(checkpoints):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            tell(f"ignoring {error}")
            num_unreadable += 1
    if num_unreadable:  # starting over would drop the metrics, and in the end these checkpoints
        raise CheckpointError(
            f"none of the {num_unreadable} checkpoints in {checkpoints} can be read: move them away to start over"
        )
    return None


def read_checkpoint(path: Path, *, check_contents: bool = True) -> Checkpoint:
    """Reads and checks a checkpoint; without `check_contents` only the sizes of its files.

    Raises: CheckpointError that says what is missing or damaged.
    """
    try:
        stored = json.loads((path / STATE_FILE).read_text())
        if stored["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {stored['format']}, and this version reads format {FORMAT}")
        checkpoint = Checkpoint(path, TrainerState(**stored["state"]), RunIdentity(**stored["identity"]))
        files = {name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in stored["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {STATE_FILE} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {STATE_FILE} is damaged") from error
    for name, (size, checksum) in files.items():
        _check_file(path / name, size, checksum if check_contents else None)
    return checkpoint


def check_identity(checkpoint: Checkpoint, identity: RunIdentity) -> None:
    """Raises CheckpointError when the checkpoint belongs to other settings, prompts, or another teacher."""
    stored, current = dataclasses.asdict(checkpoint.identity), dataclasses.asdict(identity)
    differing = [f"{name}: {stored[name]} -> {current[name]}" for name in stored if stored[name] != current[name]]
    if differing:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: " + "; ".join(differing))


def checkpoint_bytes(num_parameters: int, num_trainable: int, *, bytes_per_parameter: int = 4) -> int:
    """Size of a checkpoint: the weights, and AdamW's two moments of those that are trained."""
    return num_parameters * bytes_per_parameter + 2 * num_trainable * bytes_per_parameter


def _seal(directory: Path, state: TrainerState, identity: RunIdentity) -> None:
    """Makes every file durable and writes the list of them last."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        _fsync_file(path)
        entry = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        files[str(path.relative_to(directory))] = entry
    for subdirectory in (path for path in directory.rglob("*") if path.is_dir()):
        fsync_directory(subdirectory)
    content = {
        "format": FORMAT,
        "state": dataclasses.asdict(state),
        "identity": dataclasses.asdict(identity),
        "files": files,
    }
    write_atomically(directory / STATE_FILE, json.dumps(content, indent=2) + "\n")


def _delete_all_but_newest(checkpoints: Path, keep: int) -> None:
    """Damaged ones do not count as kept: they go once `keep` complete ones are there that are newer."""
    kept = 0
    for path in _by_step_descending(checkpoints):
        if kept >= keep:
            shutil.rmtree(path)
            continue
        try:
            read_checkpoint(path, check_contents=False)
        except CheckpointError:
            continue
        kept += 1


def _by_step_descending(checkpoints: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in checkpoints.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _check_file(path: Path, size: int, checksum: int | None) -> None:
    try:
        actual = path.stat().st_size
        if actual != size:
            raise CheckpointError(f"{path.parent}: {path.name} has {actual} bytes, and {size} were written")
        if checksum is not None and _crc32(path) != checksum:
            raise CheckpointError(f"{path.parent}: the contents of {path.name} are damaged")
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read: {error.strerror}") from error


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
