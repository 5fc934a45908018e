"""`vopd-client export`: the student of a run's checkpoint as files that others load, without a teacher.

For a run that was interrupted or is still at work; a complete one left the same files in model/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers.utils import logging as transformers_logging

from vopd_client.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from vopd_client.command_config import ExportConfig
from vopd_client.ending import export_model, summarise
from vopd_client.errors import CheckpointError, ConfigError, RunDirectoryError
from vopd_client.export import weights_to_export
from vopd_client.provenance import read_provenance
from vopd_client.run_directory import RunDirectory, check_space, read_rows, read_settings
from vopd_client.student import StudentForTraining, load_student
from vopd_client.train_config import TrainConfig

CHECKPOINT_WEIGHTS = "model.safetensors"


def run_export(export: ExportConfig) -> Path:
    """Writes model and card of a checkpoint's student; returns their directory.

    Raises: RunDirectoryError for a directory that holds no run, or where something is already; CheckpointError
        without a checkpoint that can be read; ConfigError for an adapter of a run without LoRA.
    """
    run = RunDirectory(export.run_dir)
    config = _settings_of_run(run, export)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    checkpoint = _find_checkpoint(run, export.checkpoint)
    target = export.export_dir or run.path / f"{config.export}-{checkpoint.path.name}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunDirectoryError(f"{target} already exists: give another --export-dir")
    student = load_student(
        config.student,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        trust_remote_code=config.trust_remote_code,
        device="cpu",
    )
    load_weights(student.module, checkpoint.path)
    weights = weights_to_export(student.module, config.export)
    summary = summarise(read_rows(run.evals_file), checkpoint.state)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        num_bytes = sum(weight.numel() for weight in weights.values()) * 4
        check_space(target.parent, num_bytes, what="the weights, in float32 at most")
        export_model(student, weights, target, config, read_provenance(run.provenance_file), summary)
    except OSError as error:
        if isinstance(error, RunDirectoryError):
            raise
        raise RunDirectoryError(f"cannot write to {target}: {error.strerror or error}") from error
    return target


def load_weights(module: StudentForTraining, checkpoint: Path) -> None:
    """Raises: CheckpointError when they do not fit the student."""
    try:
        load_model(module, checkpoint / CHECKPOINT_WEIGHTS)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{checkpoint} does not fit the student of its run: {reason}") from error


def _settings_of_run(run: RunDirectory, export: ExportConfig) -> TrainConfig:
    """The settings that the run was started with, but for what the command says about the export."""
    if not run.config_file.is_file():
        raise RunDirectoryError(f"{run.path} holds no run: there is no {run.config_file.name} in it")
    own: dict[str, Any] = {"export": export.export, "export_dtype": export.export_dtype}
    settings = read_settings(run.config_file) | {name: value for name, value in own.items() if value is not None}
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        raise ConfigError(f"the settings in {run.config_file} cannot be exported: {message}") from error


def _find_checkpoint(run: RunDirectory, name: str | None) -> Checkpoint:
    if name is not None:
        path = run.checkpoints / name
        if not path.is_dir():
            there = ", ".join(sorted(path.name for path in run.checkpoints.glob("step-*"))) or "none"
            raise CheckpointError(f"no checkpoint {name} in {run.checkpoints}; there are: {there}")
        return read_checkpoint(path)
    newest = newest_checkpoint(run.checkpoints, tell=_tell)
    if newest is None:
        raise CheckpointError(f"no checkpoint in {run.checkpoints}: the run has not saved one yet")
    return newest


def _tell(message: str) -> None:
    sys.stderr.write(f"{message}\n")
