"""Real launchers: `torchrun` and `accelerate launch` start the processes of one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from process_group import process_group
from tiny_model import write_tiny_model
from training_runs import largest_difference
from vopd_client.run_directory import read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PATIENCE_S = 300.0
MODULE = "vopd_client.cli"


class Launches:
    """Runs of two steps, with a teacher in each process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings = {
            "teacher_model": write_tiny_model(directory / "teacher", seed=0),
            "student": write_tiny_model(directory / "student", seed=1),
            "prompts": directory / "prompts.jsonl",
            "output_dir": directory / "runs",
            "steps": 2,
            "learning_rate": 1e-3,
            "prompts_per_step": 3,
            "max_new_tokens": 8,
            "top_k": 8,
            "mixed_precision": "no",
            "device": "cpu",
            "trackers": "none",
        }
        (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {index}:"}}\n' for index in range(6)))

    def run(self, launcher: list[str], name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        words = [word for key, value in self.settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        command = [*launcher, "train", *words, "--name", name, "--deterministic", *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)

    def assert_same_run(self, name: str, other: str) -> None:
        runs = [self.directory / "runs" / run for run in (name, other)]
        for row, other_row in zip(*(read_rows(run / "metrics.jsonl") for run in runs), strict=True):
            for metric in ("kl_nats", "loss", "grad_norm", "num_valid_tokens"):
                assert row[metric] == pytest.approx(other_row[metric], rel=1e-4, abs=1e-5)
        weights = [load_file(run / "model" / "model.safetensors") for run in runs]
        assert largest_difference(*weights) < 1e-5


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("launchers"))


def free_port() -> str:
    return process_group(1)[0]["MASTER_PORT"]


def test_torchrun_shards_and_accelerate_launch_replicates_the_same_run(launches: Launches) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    sharded = launches.run([*torchrun, "-m", MODULE], "torchrun", "--sharding", "fsdp")
    assert sharded.returncode == 0, sharded.stderr
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    accelerate += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", free_port()]
    replicated = launches.run([*accelerate, "-m", MODULE], "accelerate")
    assert replicated.returncode == 0, replicated.stderr
    for launched in (sharded, replicated):
        assert launched.stdout.count("step 2/2") == 1  # of two processes one tells
    launches.assert_same_run("torchrun", "accelerate")
