"""Rollouts come back from a checkpoint as they were, whichever processes wrote them and whichever read them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from vopd_client.errors import CheckpointError
from vopd_client.pipeline import InFlight
from vopd_client.prompts import Prompt
from vopd_client.rollout_files import read_rollouts, rollout_bytes, share_of, write_rollouts
from vopd_client.rollouts.base import Rollout, RolloutKey

STEP, NUM_UPDATES = 8, 6
PROMPTS = [Prompt(index, f"p:{index}", np.arange(3 + index), np.arange(5), None, None, None, "") for index in range(4)]


def rollout(prompt_index: int, rollout_index: int) -> Rollout:
    """Ragged in everything, with positions that have no support at all."""
    random = np.random.default_rng([prompt_index, rollout_index])
    num_tokens = int(random.integers(1, 6))
    counts_T = random.integers(0, 4, num_tokens)
    return Rollout(
        key=RolloutKey(STEP, prompt_index, rollout_index),
        prompt_ids=PROMPTS[prompt_index].student_ids,
        completion_ids=random.integers(0, 150_000, num_tokens),
        behaviour_logprobs_T=-random.random(num_tokens).astype(np.float32),
        support_ids=random.integers(0, 150_000, counts_T.sum()),
        support_counts_T=counts_T,
        support_mass_T=random.random(num_tokens).astype(np.float32),
        ended=bool(random.integers(2)),
        is_sampled_T=random.random(num_tokens) < 0.5 if rollout_index else None,
        task_reward=0.25 if rollout_index == 2 else None,
    )


ROLLOUTS = [rollout(prompt_index, index) for prompt_index in range(4) for index in range(3)]


def assert_same(left: Rollout, right: Rollout) -> None:
    for name in (field.name for field in fields(Rollout)):
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            assert one == other, name


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_what_some_processes_wrote_any_process_reads_its_share_of(tmp_path: Path, writers: int) -> None:
    for index in range(writers):
        write_rollouts(tmp_path, [InFlight(STEP, NUM_UPDATES, ROLLOUTS[index::writers])], process_index=index)
    (sampled,) = read_rollouts(tmp_path, PROMPTS)
    assert (sampled.step, sampled.num_updates) == (STEP, NUM_UPDATES)
    for share in (ROLLOUTS, ROLLOUTS[4:7], ROLLOUTS[::-1]):
        found = share_of(sampled, [item.key for item in share], tmp_path)
        assert (found.step, found.num_updates) == (STEP, NUM_UPDATES)
        for one, other in zip(found.rollouts, share, strict=True):
            assert_same(one, other)


def test_a_rollout_without_any_support_comes_back_too(tmp_path: Path) -> None:
    bare = Rollout(
        RolloutKey(STEP, 0, 0), PROMPTS[0].student_ids, np.array([7, 8]), np.zeros(2, np.float32),
        np.empty(0, np.int64), np.zeros(2, np.int64), np.zeros(2, np.float32), ended=False,
    )  # fmt: skip
    write_rollouts(tmp_path, [InFlight(STEP, NUM_UPDATES, [bare])], process_index=0)
    (sampled,) = read_rollouts(tmp_path, PROMPTS)
    assert_same(sampled.rollouts[bare.key], bare)


def test_a_directory_without_rollouts_holds_none(tmp_path: Path) -> None:
    write_rollouts(tmp_path, [], process_index=0)
    assert list(tmp_path.iterdir()) == []
    assert read_rollouts(tmp_path, PROMPTS) == []


def test_a_share_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_rollouts(tmp_path, [InFlight(STEP, NUM_UPDATES, ROLLOUTS[:3])], process_index=0)
    (sampled,) = read_rollouts(tmp_path, PROMPTS)
    with pytest.raises(CheckpointError, match=r"holds 3 rollouts of step 8, and not RolloutKey\(.*prompt_index=1"):
        share_of(sampled, [item.key for item in ROLLOUTS[:4]], tmp_path)


def test_a_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "rollouts-000008-00000.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"rollouts-000008-00000\.safetensors cannot be read"):
        read_rollouts(tmp_path, PROMPTS)


def test_the_size_on_disk_is_bounded_by_what_the_disk_is_checked_for(tmp_path: Path) -> None:
    full = [
        Rollout(
            RolloutKey(STEP, 0, index), PROMPTS[0].student_ids, np.arange(500), np.zeros(500, np.float32),
            np.arange(500 * 20), np.full(500, 20), np.zeros(500, np.float32), ended=True,
        )
        for index in range(3)
    ]  # fmt: skip
    write_rollouts(tmp_path, [InFlight(STEP, NUM_UPDATES, full)], process_index=0)
    (path,) = tmp_path.iterdir()
    bound = rollout_bytes(num_rollouts=3, max_new_tokens=500, max_support=20)
    assert 0.95 * bound < path.stat().st_size < bound + 2000  # the header


def test_files_of_versions_that_knew_one_turn_only_are_read(tmp_path: Path) -> None:
    write_rollouts(tmp_path, [InFlight(STEP, NUM_UPDATES, ROLLOUTS)], process_index=0)
    [path] = tmp_path.glob("rollouts-*")
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name in ("has_mask_N", "is_sampled_T", "task_reward_N"):
        del arrays[name]
    save_file(arrays, path, metadata=metadata)
    (sampled,) = read_rollouts(tmp_path, PROMPTS)
    for item in ROLLOUTS:
        assert_same(sampled.rollouts[item.key], replace(item, is_sampled_T=None, task_reward=None))
