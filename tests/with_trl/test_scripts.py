"""Whole training scripts, as their users start them: the shipped example, several processes, Ctrl-C."""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import DistillationConfig

from conftest import REPOSITORY
from process_group import process_group
from teacher_process import RunningTeacher
from tiny_model import write_tiny_model
from vopd_client.trl import RemoteDistillationTrainer

EXAMPLES = REPOSITORY / "examples" / "trl"
JOB = Path(__file__).with_name("job.py")
PATIENCE_S = 120.0
PROMPTS = ["The capital of France is", "Two", "A word for cold", "Once upon a time"]
CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_completion_length": 16,
}


def start(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def test_a_script_of_trls_trains_remotely_once_an_import_and_three_arguments_are_changed(
    teacher_dir: Path, teacher: RunningTeacher, tmp_path: Path
) -> None:
    """Both scripts run as they are; between them differs what the documentation says, and nothing else."""
    before, after = (EXAMPLES / f"{where}_teacher.py" for where in ("local", "remote"))
    code = [path.read_text().split('"""', 2)[2].splitlines() for path in (before, after)]
    changes = [
        line for line in difflib.unified_diff(*code, lineterm="", n=0) if not line.startswith(("---", "+++", "@@"))
    ]
    assert [line for line in changes if line != "+"] == [
        "-from trl import DistillationConfig, DistillationTrainer",
        "+from trl import DistillationConfig",
        "+from vopd_client.trl import RemoteDistillationTrainer as DistillationTrainer",
        "-    teacher_model=teacher,",
        "+    teacher_url=teacher,",
        '+    objective="vopd-rb",',
        "+    top_k=100,",
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    student_dir = write_tiny_model(tmp_path / "student", seed=1)
    untouched = load_file(student_dir / "model.safetensors")
    env = {"HF_HOME": str(tmp_path / "cache")}
    local = start(before, student_dir, teacher_dir, prompts, tmp_path / "local", env=env)
    remote = start(after, student_dir, teacher.url, prompts, tmp_path / "remote", env=env)
    log = {"local": output_of(local), "remote": output_of(remote)}
    assert "vopd/kl_nats" in log["remote"]
    assert "vopd/kl_nats" not in log["local"]
    for name in log:
        trained = load_file(tmp_path / name / "model.safetensors")
        assert any(not torch.equal(tensor, untouched[key]) for key, tensor in trained.items()), name


def test_a_step_of_two_processes_is_that_of_one(student_dir: Path, teacher: RunningTeacher, tmp_path: Path) -> None:
    """Four greedy completions, all by one process or two by each; every process asks the teacher itself."""

    config = {
        **CONFIG,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "generation_kwargs": {"do_sample": False},
    }
    shared = json.dumps({**config, "output_dir": str(tmp_path), "per_device_train_batch_size": 2})
    group = [start(JOB, student_dir, teacher.url, shared, json.dumps(PROMPTS), env=env) for env in process_group(2)]
    trainer = RemoteDistillationTrainer(
        str(student_dir),
        args=DistillationConfig(**config, output_dir=str(tmp_path), per_device_train_batch_size=4),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        teacher_url=teacher.url,
        top_k=50,
    )
    trainer.train()
    alone = trainer.state.log_history[0]
    outputs = [output_of(process) for process in group]
    [together] = [json.loads(line) for line in outputs[0].splitlines() if line.startswith('{"step"')]
    actual, untouched = (load_file(path / "model.safetensors") for path in (tmp_path, student_dir))
    expected = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}

    for name in ("loss", "grad_norm", "num_tokens", "entropy", "vopd/kl_nats", "vopd/variance"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    assert all(not torch.equal(tensor, untouched[name]) for name, tensor in expected.items())


def test_ctrl_c_ends_a_script_that_waits_for_a_teacher_that_hangs(
    student_dir: Path, teacher: RunningTeacher, tmp_path: Path
) -> None:
    config = {**CONFIG, "output_dir": str(tmp_path), "max_steps": 100_000, "per_device_train_batch_size": 2}
    script = start(JOB, student_dir, teacher.url, json.dumps(config), json.dumps(PROMPTS))
    assert script.stdout is not None
    try:
        while not script.stdout.readline().startswith('{"step"'):
            assert script.poll() is None
        teacher.send_signal(signal.SIGSTOP)
        time.sleep(1)  # a step takes a tenth of that: now it waits
        script.send_signal(signal.SIGINT)
        output, _ = script.communicate(timeout=20)
    finally:
        teacher.send_signal(signal.SIGCONT)
        script.kill()
    # Python forgets that it was SIGINT when a library executes text at its exit, as torch does beside tabulate.
    assert script.returncode in (-signal.SIGINT, 1), output
    assert output.rstrip().endswith("KeyboardInterrupt")
    assert "remote_loss.py" in output  # where it was
