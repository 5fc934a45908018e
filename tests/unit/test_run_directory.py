"""A run directory that cannot hold the run is found before anything is trained; nothing in it is ever half written."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from vopd_client.errors import CheckpointError, ConfigError, RunDirectoryError
from vopd_client.run_directory import (
    FREE_ON_RESUME,
    RunDirectory,
    check_space,
    check_writable,
    claim_run_directory,
    differing_settings,
    drop_rows_after,
    read_rows,
    run_path,
    settings_hash,
    write_atomically,
)
from vopd_client.train_config import TrainConfig

NOW = datetime(2026, 3, 4, 5, 6, 7)
SETTINGS = TrainConfig(student="s", prompts="p.jsonl", teacher_url=["grpc://host:1"]).model_dump(mode="json")


def test_a_run_without_a_name_is_named_after_objective_and_time(tmp_path: Path) -> None:
    assert run_path(tmp_path, None, objective="vopd", resume=False, now=NOW) == tmp_path / "vopd-20260304-050607"


def test_going_on_needs_the_name_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume needs --name"):
        run_path(tmp_path, None, objective="vopd", resume=True, now=NOW)


@pytest.mark.parametrize("name", ["a/b", "..", "", "."])
def test_a_name_that_leads_out_of_the_output_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="one directory"):
        run_path(tmp_path, name, objective="vopd", resume=False, now=NOW)


def test_a_directory_that_cannot_be_made_is_reported_with_the_systems_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match=r"cannot write to the run directory .*Not a directory"):
        check_writable(tmp_path / "file" / "run")


def test_a_disk_that_is_full_is_found_by_writing_and_not_by_asking(
    tmp_path: Path,
) -> None:
    # A limit on file sizes stands in for a full disk: writes fail after some bytes, as they do there.
    code = (
        "import resource, sys; from pathlib import Path; from vopd_client.run_directory import check_writable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: check_writable(Path(sys.argv[1]))\n"
        "except OSError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert "cannot write to the run directory" in result.stdout
    assert "File too large" in result.stdout
    assert list((tmp_path / "run").iterdir()) == []


def test_too_little_space_is_reported_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"1\.00 GB free, and the run needs 2\.50 GB: 2 checkpoints"):
        check_space(tmp_path, 2_500_000_000, what="2 checkpoints", free_bytes=lambda path: 1_000_000_000)
    check_space(tmp_path, 2_500_000_000, what="2 checkpoints", free_bytes=lambda path: 2_500_000_000)


def test_a_directory_that_holds_a_run_is_not_started_over(tmp_path: Path) -> None:
    with claim_run_directory(tmp_path / "run", SETTINGS, resume=False) as run:
        run.begin(SETTINGS, last_step=0)
    with pytest.raises(RunDirectoryError, match="already holds a run: give --resume"):
        claim_run_directory(tmp_path / "run", SETTINGS, resume=False).__enter__()
    with claim_run_directory(tmp_path / "run", SETTINGS, resume=True) as run:
        assert run.config_file.exists()


def test_a_start_that_fails_leaves_nothing_in_the_way_of_the_next(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="bad prompts"),
        claim_run_directory(tmp_path / "run", SETTINGS, resume=False),
    ):
        raise RuntimeError("bad prompts")
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with (
        claim_run_directory(tmp_path / "run", SETTINGS, resume=False),
        pytest.raises(RunDirectoryError, match="in use by another process"),
    ):
        claim_run_directory(tmp_path / "run", SETTINGS, resume=True).__enter__()


def test_going_on_with_other_settings_names_each_of_them(tmp_path: Path) -> None:
    with claim_run_directory(tmp_path / "run", SETTINGS, resume=False) as run:
        run.begin(SETTINGS, last_step=0)
    with pytest.raises(CheckpointError, match=r"learning_rate: 1e-05 -> 0\.5; top_k: 100 -> 4$"):
        claim_run_directory(tmp_path / "run", {**SETTINGS, "learning_rate": 0.5, "top_k": 4}, resume=True).__enter__()


def test_where_things_are_and_how_long_to_wait_may_change() -> None:
    changed = {**SETTINGS, "teacher_url": ["grpc://other:2"], "teacher_timeout_s": 1.0, "checkpoint_every": 7}
    assert differing_settings(SETTINGS, changed) == []
    assert settings_hash(SETTINGS) == settings_hash(changed)
    assert set(SETTINGS) >= FREE_ON_RESUME


@pytest.mark.parametrize(
    ("settings", "changed", "matters"),
    [
        ({"schedule": "cosine"}, {"steps": 500}, True),
        ({"schedule": "constant"}, {"steps": 500}, False),
        ({"deterministic": False}, {"microbatch_tokens": 7, "rollout_batch_size": 3}, False),
        ({"deterministic": True}, {"microbatch_tokens": 7}, True),
    ],
)
def test_steps_matter_under_cosine_and_batch_shapes_under_deterministic(
    settings: dict[str, Any], changed: dict[str, Any], matters: bool
) -> None:
    old = {**SETTINGS, **settings}
    new = {**old, **changed}
    assert bool(differing_settings(old, new)) is matters
    assert (settings_hash(old) != settings_hash(new)) is matters


def test_a_setting_that_an_older_version_did_not_know_is_named(tmp_path: Path) -> None:
    old = {name: value for name, value in SETTINGS.items() if name != "tail"}
    assert differing_settings(old, SETTINGS) == ["tail: not set -> bucket"]


def test_rows_of_steps_that_are_taken_again_go_and_a_cut_off_line_with_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [row["step"] for row in read_rows(run.metrics_file)] == [1, 2, 3]
    run.begin(SETTINGS, last_step=2)
    assert run.metrics_file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_row_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl:2"):
        drop_rows_after(path, 3)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udcff")
    assert path.read_text() == "old"
