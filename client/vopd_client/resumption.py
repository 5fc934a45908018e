"""Going on from a checkpoint: which one, whether it is of this run, what was in flight, and room for the next ones."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from vopd_client.checkpoint import (
    RunIdentity,
    StateStorage,
    TrainerState,
    check_identity,
    checkpoint_bytes,
    checkpoint_name,
    newest_checkpoint,
)
from vopd_client.errors import CheckpointError, ConfigError
from vopd_client.pipeline import InFlight
from vopd_client.prompt_source import PromptSource
from vopd_client.rollout_files import read_rollouts, rollout_bytes, share_of
from vopd_client.rollouts.base import Rollout
from vopd_client.run_directory import RunDirectory, check_space
from vopd_client.schedule import draws_of_process
from vopd_client.teaching import Tell
from vopd_client.train_config import TrainConfig


def check_room(config: TrainConfig, directory: RunDirectory, module: nn.Module) -> None:
    """Raises RunDirectoryError when the checkpoints and the final model will not fit on the disk."""
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    one_checkpoint = checkpoint_bytes(num_parameters, num_trained)
    written = 1 if config.checkpoint_every == 0 else -(-config.steps // config.checkpoint_every)
    there = len(list(directory.checkpoints.glob("step-*")))
    at_once = min(config.keep_checkpoints + 1, written)  # an old one goes only after the new one is complete
    new_ones = max(1, at_once - there)
    if config.max_staleness > 0:
        one_checkpoint += rollout_bytes(
            num_rollouts=config.prompts_per_step * config.rollouts_per_prompt,
            max_new_tokens=config.max_new_tokens,
            max_support=config.top_k,
        )
    check_space(
        directory.path,
        new_ones * one_checkpoint + 4 * num_parameters,
        what=f"{new_ones} more checkpoints of {one_checkpoint / 1e9:.2f} GB and the final model",
    )


def go_back_to_checkpoint(
    config: TrainConfig, storage: StateStorage, directory: RunDirectory, identity: RunIdentity, tell: Tell
) -> TrainerState:
    """Loads the newest complete checkpoint if the run is to go on.

    Raises: CheckpointError when it is of another run, or does not fit this model.
    """
    if not config.resume:
        return TrainerState()
    checkpoint = newest_checkpoint(directory.checkpoints, tell=tell)
    if checkpoint is None:
        tell(f"no checkpoint in {directory.checkpoints}: starting from step 0")
        return TrainerState()
    check_identity(checkpoint, identity)
    if checkpoint.state.step > config.steps:
        raise ConfigError(f"{checkpoint.path} is beyond steps {config.steps}")
    try:
        storage.load_state(str(checkpoint.path))
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this model: {error}") from error
    tell(f"going on after step {checkpoint.state.step}, from {checkpoint.path}")
    return checkpoint.state


def rollouts_in_flight(
    config: TrainConfig,
    accelerator: Accelerator,
    checkpoints: Path,
    state: TrainerState,
    prompts: PromptSource,
    tell: Tell,
) -> list[InFlight[list[Rollout]]]:
    """This process's part of what the checkpoint holds of steps to come, whichever processes wrote it.

    Says so when there should be something and is not: its weights then sample the next step's rollouts themselves.

    Raises: CheckpointError for files that cannot be read, or hold too little.
    """
    if config.max_staleness == 0 or not 0 < state.step < config.steps:
        return []
    checkpoint = checkpoints / checkpoint_name(state.step)
    found = []
    for step in range(state.step + 1, min(state.step + config.max_staleness, config.steps) + 1):
        prompts.of_step(step)  # whose prompts can be looked up from here on
    for sampled in read_rollouts(checkpoint, prompts):
        draws = draws_of_process(
            config,
            sampled.step,
            positions=prompts.of_step(sampled.step),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        found.append(share_of(sampled, draws, checkpoint))
    if not found:
        tell(f"{checkpoint} holds no rollouts: its weights sample those of step {state.step + 1} anew")
    return found
