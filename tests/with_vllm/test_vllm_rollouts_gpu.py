"""Rollouts from vLLM on GPUs. GPU only:

    python -m pytest -W default tests/with_vllm/test_vllm_rollouts_gpu.py

in an environment with vllm and 'vopd[train]'. The first test needs one GPU, the second two. Where there is none, this
file is not collected.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

from fake_local_teacher import FakeLocalTeacher
from tiny_model import write_tiny_model
from training_runs import Runs
from vopd_client.rollouts.vllm_facts import WORKER_EXTENSION
from vopd_client.run_directory import read_rows

TOLERANCE_NATS = 2e-3  # float32, with the attention kernels of each
START_S = 600.0
SETTINGS = {
    "rollouts": "vllm",
    "learning_rate": 3e-3,
    "max_prompt_tokens": 40,
    "max_new_tokens": 12,
    "prompts_per_step": 4,
    "schedule": "constant",
    "device": "cuda",
    "steps": 3,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_tiny_model(directory / "student", seed=0, hidden_size=256, vocab_padding=29)
    write_tiny_model(directory / "teacher", seed=5, hidden_size=256, vocab_padding=29)
    prompts = [f'{{"prompt": "question {index}"}}' for index in range(6)]
    (directory / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    return directory


def assert_in_step(runs: Runs, way: str) -> None:
    assert f"by {way} before each step's rollouts" in runs.told
    rows = read_rows(runs.directory().metrics_file)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["logprob_mismatch_max_nats"] < TOLERANCE_NATS for row in rows)


def test_an_engine_on_the_trainers_gpu_maps_its_weights(models: Path, tmp_path: Path) -> None:
    runs = Runs(models, tmp_path)
    engine_args = {"enforce_eager": True, "gpu_memory_utilization": 0.2}
    assert runs.train(FakeLocalTeacher(models / "teacher"), **SETTINGS, rollouts_engine_args=engine_args) == 0
    assert_in_step(runs, "ipc")


@pytest.fixture
def server_url(models: Path) -> Iterator[str]:
    """On the second GPU; the trainer has the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models / "student")]
    command += ["--enable-scale-out", "--worker-extension-cls", WORKER_EXTENSION, "--dtype", "float32"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "17", "--max-model-len", "64"]
    command += ["--weight-transfer-config", '{"backend": "nccl"}', "--enforce-eager", "--port", url.rpartition(":")[2]]
    env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": "1"}
    with subprocess.Popen(command, env=env) as process:
        try:
            give_up = time.monotonic() + START_S
            while True:
                assert process.poll() is None
                assert time.monotonic() < give_up
                try:
                    with urlopen(f"{url}/health", timeout=5):
                        break
                except (URLError, OSError):
                    time.sleep(1)
            yield url
        finally:
            process.terminate()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_server_on_another_gpu_gets_its_weights_over_nccl(models: Path, tmp_path: Path, server_url: str) -> None:
    runs = Runs(models, tmp_path)
    assert runs.train(FakeLocalTeacher(models / "teacher"), **SETTINGS, rollouts_url=server_url) == 0
    assert_in_step(runs, "nccl")
