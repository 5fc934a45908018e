"""The demo's data are what its report claims: two kinds, disjoint halves, and made by the script beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from vopd_client.prompts import PromptRow, load_prompts
from vopd_client.train_config import TrainConfig

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def train() -> list[PromptRow]:
    return load_prompts(str(DEMO / "train.jsonl"))


@pytest.fixture(scope="module")
def held_out() -> list[PromptRow]:
    return load_prompts(str(DEMO / "heldout.jsonl"))


def questions(row: PromptRow) -> list[str]:
    """What the teacher is asked, the row's own question last."""
    assert row.teacher_messages is not None
    return [message["content"] for message in row.teacher_messages if message["role"] == "user"]


def test_there_are_enough_prompts_of_both_kinds(train: list[PromptRow], held_out: list[PromptRow]) -> None:
    assert len(train) >= 100
    assert min(Counter(row.kind for row in train).values()) >= 50
    assert Counter(row.kind for row in held_out) == {"capital": 28, "past tense": 28}


def test_no_held_out_question_is_trained_on_or_solved_before(train: list[PromptRow], held_out: list[PromptRow]) -> None:
    asked = [questions(row)[-1] for row in [*train, *held_out]]
    solved = {question for row in [*train, *held_out] for question in questions(row)[:-1]}
    assert len(set(asked)) == len(asked)
    assert not solved & set(asked)
    assert {len(questions(row)) for row in [*train, *held_out]} == {7}


def test_only_held_out_rows_carry_answers(train: list[PromptRow], held_out: list[PromptRow]) -> None:
    assert all(row.answer is None for row in train)
    assert all(row.verifier == "exact" and str(row.answer).startswith("Answer: ") for row in held_out)


def test_student_and_teacher_are_asked_the_same_question(held_out: list[PromptRow]) -> None:
    for row in held_out:
        assert row.messages is not None
        (message,) = row.messages
        assert message["content"].splitlines() == [questions(row)[-1], "Begin your reply with 'Answer:'."]


def test_the_files_are_what_the_script_makes(tmp_path: Path) -> None:
    shutil.copy(DEMO / "make_data.py", tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "make_data.py")], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_the_run_s_settings_are_valid() -> None:
    settings = yaml.safe_load((DEMO / "run.yaml").read_text("utf-8"))
    config = TrainConfig.model_validate(settings)
    assert (config.name, config.objective, config.top_k) == ("demo", "vopd-rb", 100)
    assert config.eval_prompts is not None
    assert (DEMO.parents[1] / config.prompts).is_file()
    assert (DEMO.parents[1] / config.eval_prompts).is_file()
