"""Rollouts from a real vLLM server in a process of its own, over a real socket, for one trainer and for two."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from fake_local_teacher import FakeLocalTeacher
from process_runs import Job, run_in_processes
from recalled import recalled
from tiny_model import NUM_IDS, write_tiny_model
from training_runs import Runs
from vopd_client.errors import ConfigError, RolloutEngineError
from vopd_client.model_files import merged_state_dict
from vopd_client.rollout_engine import checkpoint_weights
from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.vllm import VllmSampler
from vopd_client.rollouts.vllm_facts import WORKER_EXTENSION, StudentShape, check_settings, check_student
from vopd_client.rollouts.vllm_request import DrawSettings
from vopd_client.rollouts.vllm_server import ServerEngine
from vopd_client.run_directory import read_rows
from vopd_client.student import load_student
from vopd_client.weight_sync import check_can_read, push, write_weights

TOLERANCE_NATS = 1e-4  # see test_vllm_rollouts
TOP_K = 16
START_S = 300.0


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with tied embeddings and more rows in them than ids, a teacher, and prompts."""
    directory = tmp_path_factory.mktemp("models")
    write_tiny_model(directory / "student", seed=0, hidden_size=128, vocab_padding=29)
    write_tiny_model(directory / "teacher", seed=5, hidden_size=128, vocab_padding=29)
    prompts = [f'{{"prompt": "question {index}"}}' for index in range(6)]
    (directory / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    return directory


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As docs/rollouts.md starts one; the flags behind the fourth line only make it small."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models / "student")]
    command += ["--enable-scale-out", "--worker-extension-cls", WORKER_EXTENSION]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", str(TOP_K + 1)]
    command += ["--dtype", "float32", "--max-model-len", "64", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 26), "--max-num-seqs", "8"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    give_up = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < give_up, log.read_text(errors="replace")[-4000:]
        try:
            with urlopen(f"{url}/health", timeout=5):
                break
        except (URLError, OSError):
            time.sleep(0.3)
    yield Server(process, url, log)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture
def engine(server: Server) -> Iterator[ServerEngine]:
    engine = ServerEngine(server.url, max_in_flight=4, timeout_s=30, tell=lambda _text: None)
    yield engine
    engine.close()


def test_it_says_what_it_is(engine: ServerEngine, models: Path, tmp_path: Path) -> None:
    facts = engine.facts
    assert (facts.vocab_size, facts.dtype, facts.logprobs_mode) == (NUM_IDS + 29, "float32", "processed_logprobs")
    check_settings(facts, num_logprobs=TOP_K + 1, max_length=64, where="the server")
    shape = StudentShape(architecture="LlamaForCausalLM", vocab_size=NUM_IDS + 29, hidden_size=128, num_layers=2)
    check_student(facts, shape, where="the server")
    with pytest.raises(ConfigError, match="not the student: num_layers 2 instead of 3"):
        check_student(facts, shape.model_copy(update={"num_layers": 3}), where="the server")
    check_can_read(engine, tmp_path / "weights")
    with pytest.raises(RolloutEngineError, match="answered /collective_rpc with HTTP 500"):
        engine._workers("vopd_nonsense")


def test_its_rollouts_are_those_of_the_weights_it_was_given(engine: ServerEngine, models: Path, tmp_path: Path) -> None:
    """Also that its supports are the top K whether the sampled token is one of them or not."""
    student = load_student(
        write_tiny_model(tmp_path / "other", seed=9, hidden_size=128, vocab_padding=29), device="cpu"
    )
    student.module.num_shared_ids = NUM_IDS
    student.module.temperature = 1.3
    weights = checkpoint_weights(student.module.causal_lm, merged_state_dict(student.module.causal_lm))

    def deliver() -> None:
        write_weights(tmp_path / "weights", iter(weights.items()), dtype=torch.float32)
        engine.reload(str(tmp_path / "weights"))

    push(engine, deliver, "other")
    settings = DrawSettings(
        num_shared_ids=NUM_IDS,
        vocab_size=engine.facts.vocab_size,
        end_ids=student.end_ids,
        max_new_tokens=24,
        temperature=1.3,
        top_k=TOP_K,
        seed=3,
    )
    sampler = VllmSampler(engine, settings, support_mass=0.99)
    sampler.weight_version = "other"
    outside = 0
    for rollout in sampler.sample([(RolloutKey(1, index, 0), np.arange(3 + index)) for index in range(10)]):
        exact = recalled(student, rollout, top_k=TOP_K, support_mass=0.99)
        assert np.abs(rollout.behaviour_logprobs_T - exact.behaviour_logprobs_T).max() < TOLERANCE_NATS
        assert rollout.support_counts_T.tolist() == exact.support_counts_T.tolist()
        assert rollout.support_ids.tolist() == exact.support_ids.tolist()
        np.testing.assert_allclose(rollout.support_mass_T, exact.support_mass_T, atol=1e-5)
        supports = np.split(rollout.support_ids, np.cumsum(rollout.support_counts_T)[:-1])
        outside += sum(token not in ids for token, ids in zip(rollout.completion_ids, supports, strict=True))
    assert outside > 5
    sampler.weight_version = "mine"
    with pytest.raises(RolloutEngineError, match="with weights other and not with mine"):
        list(sampler.sample([(RolloutKey(1, 0, 0), np.arange(5))]))


def settings_of(server: Server) -> dict[str, Any]:
    return {
        "rollouts": "vllm",
        "rollouts_url": server.url,
        "learning_rate": 3e-3,
        "max_prompt_tokens": 40,
        "max_new_tokens": 12,
        "prompts_per_step": 4,
        "top_k": TOP_K,
        "schedule": "constant",
    }


def test_two_processes_learn_from_one_server(server: Server, models: Path, tmp_path: Path) -> None:
    settings = settings_of(server)
    jobs = [
        Job({**settings, "name": "both", "steps": 2}),
        Job({**settings, "name": "ahead", "steps": 3, "max_staleness": 1}),
    ]
    outcomes = run_in_processes(models, tmp_path, jobs)
    assert [[outcome.exit_code for outcome in of_rank] for of_rank in outcomes] == [[0, 0], [0, 0]], [
        [outcome.error for outcome in of_rank] for of_rank in outcomes
    ]
    assert [len(both.asked) for both, _ in outcomes] == [8, 8]
    runs = Runs(models, tmp_path)
    rows = read_rows(runs.directory("both").metrics_file)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["logprob_mismatch_max_nats"] < TOLERANCE_NATS for row in rows)

    # Sampled one update ahead: each step's rollouts are of the weights before the last update, and of no others.
    rows = read_rows(runs.directory("ahead").metrics_file)
    assert [row["staleness"] for row in rows] == [0, 1, 1]
    assert rows[0]["logprob_mismatch_max_nats"] < TOLERANCE_NATS
    assert all(row["logprob_mismatch_max_nats"] > 1e-2 for row in rows[1:])
    assert all(row["rollout_kl_nats"] > 0 for row in rows[1:])

    # The server has the weights of the other run by now; going on, in one process, brings those of the checkpoint.
    teacher = FakeLocalTeacher(models / "teacher")
    assert runs.train(teacher, **settings, name="both", steps=4, resume=True) == 0
    rows = read_rows(runs.directory("both").metrics_file)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["logprob_mismatch_max_nats"] < TOLERANCE_NATS for row in rows)


def test_a_server_that_goes_away_is_waited_for_and_then_the_run_is_saved(
    server: Server, models: Path, tmp_path: Path
) -> None:
    """The last test of this module: the server is gone after it."""
    runs = Runs(models, tmp_path)

    def kill(number: int) -> None:
        if number == 10:  # in the second step, whose rollouts are 8 to 15
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(30)

    teacher = FakeLocalTeacher(models / "teacher", on_submit=kill)
    settings = {**settings_of(server), "rollouts_timeout_s": 1.5, "rollout_batch_size": 1, "checkpoint_every": 5}
    assert runs.train(teacher, **settings, steps=4) == 3
    assert "waiting for the rollout server at http://127.0.0.1" in runs.told
    assert "the rollout engine is gone: the rollout server at" in runs.told
    assert "stopped after step 1; to go on: the same command with --resume --name run" in runs.told
    assert runs.checkpoints() == ["step-000001"]
