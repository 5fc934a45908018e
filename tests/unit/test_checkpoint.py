"""A checkpoint is complete or it is not there; older ones go only after the new one is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vopd_client.checkpoint import (
    Checkpoint,
    RunIdentity,
    TrainerState,
    check_identity,
    checkpoint_bytes,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from vopd_client.errors import CheckpointError, RunDirectoryError

IDENTITY = RunIdentity("config", "prompts", "teacher", "revision")


class FakeWriter:
    """Writes two small files, or fails after the first as a full disk makes it."""

    is_main_process = True

    def __init__(self, *, disk_full: bool = False) -> None:
        self._disk_full = disk_full

    def wait_for_everyone(self) -> None:
        pass

    def save_state(self, output_dir: str) -> None:
        (Path(output_dir) / "model.safetensors").write_bytes(b"weights" * 100)
        if self._disk_full:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        (Path(output_dir) / "optimizer.bin").write_bytes(b"moments" * 200)


def save(checkpoints: Path, step: int, *, keep: int = 2, disk_full: bool = False) -> Path:
    state = TrainerState(step=step, train_seconds=1.5 * step)
    return save_checkpoint(checkpoints, state, IDENTITY, writer=FakeWriter(disk_full=disk_full), keep=keep)


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    told: list[str] = []
    return newest_checkpoint(checkpoints, tell=told.append), told


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 20)
    assert path == tmp_path / "checkpoints" / "step-000020"
    assert read_checkpoint(path) == Checkpoint(path, TrainerState(step=20, train_seconds=30.0), IDENTITY)


def test_no_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") == (None, [])


def test_the_newest_are_kept_in_the_order_of_steps_and_not_of_names(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    checkpoint, _ = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state.step == 1_000_000


def test_a_full_disk_leaves_the_older_checkpoints_and_no_half_one(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    with pytest.raises(RunDirectoryError, match=r"checkpoint of step 2 .*failed writing file"):
        save(tmp_path, 2, keep=1, disk_full=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_one_that_was_killed_before_its_rename_is_passed_over_and_said_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / ".tmp-step-000002")
    checkpoint, told = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state.step == 1
    assert told == [f"ignoring {tmp_path}/.tmp-step-000002: it was not finished"]
    save(tmp_path, 2)  # and it is no obstacle to the next try
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def _cut(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weights" * 99)


def _flip(path: Path) -> None:
    (path / "optimizer.bin").write_bytes(b"Moments" + b"moments" * 199)


def _remove(path: Path) -> None:
    (path / "optimizer.bin").unlink()


def _remove_state(path: Path) -> None:
    (path / "trainer_state.json").unlink()


def _cut_state(path: Path) -> None:
    (path / "trainer_state.json").write_text('{"format": 1, "state":')


def _other_format(path: Path) -> None:
    content = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**content, "format": 2}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "model.safetensors has 693 bytes, and 700 were written"),
        (_flip, "the contents of optimizer.bin are damaged"),
        (_remove, "optimizer.bin cannot be read: No such file"),
        (_remove_state, "trainer_state.json is missing"),
        (_cut_state, "trainer_state.json is damaged"),
        (_other_format, "format 2, and this version reads format 1"),
    ],
)
def test_a_damaged_one_is_passed_over_for_the_one_before_it(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    checkpoint, told = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state.step == 1
    assert len(told) == 1
    assert reason in told[0]


def test_starting_over_is_not_an_answer_to_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    _cut(save(tmp_path, 1))
    _other_format(save(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be read"):
        newest(tmp_path)


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2)
    _cut(save(tmp_path, 2, keep=2))
    save(tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002", "step-000003"]
    save(tmp_path, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    _cut(save(tmp_path, 2))
    read_checkpoint(save(tmp_path, 2))


def test_another_teacher_or_other_prompts_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 1))
    check_identity(checkpoint, IDENTITY)
    with pytest.raises(CheckpointError, match=r"teacher_model_revision: revision -> other$"):
        check_identity(checkpoint, RunIdentity("config", "prompts", "teacher", "other"))


def test_the_size_of_a_checkpoint_is_the_weights_and_two_moments_of_what_is_trained() -> None:
    assert checkpoint_bytes(1000, 1000) == 12_000
    assert checkpoint_bytes(1000, 10) == 4_080
