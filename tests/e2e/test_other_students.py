"""Students that are not the teacher, against a real language model in a real teacher process: fewer layers with a
padded embedding, and another end token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import REPOSITORY
from teacher_process import RunningTeacher, start_teacher
from vopd_client.run_directory import read_rows
from warm_python import WarmProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DEMO = REPOSITORY / "examples" / "demo"
TEACHER_END, OTHER_END = 2, 0  # <|im_end|>, <|endoftext|>


@pytest.fixture(scope="module")
def teacher(demo_model_dir: Path) -> Iterator[RunningTeacher]:
    # The KL over the whole vocabulary: one from a support and a bucket is a lower bound, which rises as a damaged
    # student's mass comes back into its support.
    with start_teacher(demo_model_dir, "--dtype", "bfloat16", "--allow-full-vocab") as running:
        yield running


def load(directory: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


def train(student: Path, teacher: RunningTeacher, runs: Path, *flags: str) -> tuple[str, Path]:
    """`vopd-client train` with the demo's prompts; what it printed, and its run directory."""
    held_out = runs / "held_out.jsonl"  # a few are enough to see the KL fall
    held_out.write_text("".join((DEMO / "heldout.jsonl").read_text().splitlines(keepends=True)[:8]))
    command = ["train", "--config", str(DEMO / "run.yaml")]
    settings = ["--student", str(student), "--teacher-url", teacher.url, "--output-dir", str(runs), "--name", "run"]
    evaluation = ["--eval-prompts", str(held_out), "--eval-every", "0", "--eval-teacher", "no"]
    evaluation += ["--eval-kl", "vocabulary", "--head-cache", str(runs / "heads")]
    printed = runs / "printed.txt"
    with printed.open("wb") as log_file:
        process = WarmProcess(
            "vopd_client.cli",
            [*command, *settings, *evaluation, *flags],
            stdout=log_file.fileno(),
            stderr=log_file.fileno(),
            env=dict(os.environ),
            own_group=False,
            cwd=REPOSITORY,
        )
    assert process.wait() == 0, printed.read_text()
    return printed.read_text(), runs / "run"


def test_a_pruned_student_with_a_padded_embedding_learns_without_ever_writing_a_padded_id(
    demo_model_dir: Path, teacher: RunningTeacher, tmp_path: Path
) -> None:
    model, tokenizer = load(demo_model_dir)
    kept = [*range(12), *range(27, 30)]  # half of the 30 layers
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    num_ids = model.config.vocab_size
    model.resize_token_embeddings(num_ids + 128, mean_resizing=False)
    # Padded rows that would win the softmax, were they not masked; the teacher refuses ids it does not have, so one
    # sampled id among them, or one in a support, would end the run.
    with torch.no_grad():
        model.get_input_embeddings().weight[num_ids:] = torch.randn(128, model.config.hidden_size)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")

    flags = ("--steps", "4", "--learning-rate", "1e-4", "--objective", "vopd-rb")  # the least noise
    _, run_dir = train(tmp_path / "student", teacher, tmp_path, *flags)

    rows = read_rows(run_dir / "metrics.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # The same held-out prompts before and after; four steps on a damaged model win back nats, not answers.
    assert summary["kl_nats_after"] < 0.9 * summary["kl_nats_before"]
    trained, _ = load(run_dir / "model")
    assert trained.config.vocab_size == num_ids + 128


def test_a_student_with_another_end_token_is_taught_to_end_with_its_own(
    demo_model_dir: Path, teacher: RunningTeacher, tmp_path: Path
) -> None:
    # The teacher itself with two ids exchanged: it ends its answers, and reads its prompts, with <|endoftext|>.
    model, tokenizer = load(demo_model_dir)
    ours, theirs = tokenizer.convert_ids_to_tokens([OTHER_END, TEACHER_END])
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[[OTHER_END, TEACHER_END]] = embedding[[TEACHER_END, OTHER_END]]
    model.config.eos_token_id = model.generation_config.eos_token_id = OTHER_END
    tokenizer.eos_token = ours
    tokenizer.chat_template = tokenizer.chat_template.replace(theirs, ours)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")

    printed, run_dir = train(tmp_path / "student", teacher, tmp_path, "--steps", "6")

    assert "student ends with <|endoftext|> (id 0), teacher with <|im_end|> (id 2); end_token is map" in printed
    summary = json.loads((run_dir / "summary.json").read_text())
    # Mapped, it starts as near to the teacher as the demo's student does, and learns as that one does.
    assert summary["kl_nats_before"] < 1.5
    assert summary["kl_nats_after"] < 0.6 * summary["kl_nats_before"]
    assert read_rows(run_dir / "metrics.jsonl")[-1]["ended_fraction"] > 0.6
