"""Every benchmark of examples/paper runs by its command, on local files with the columns of the public sets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from conftest import REPOSITORY
from vopd_client.cli import main

PAPER = REPOSITORY / "examples" / "paper"
SMALL = ["--samples-per-prompt", "2", "--max-new-tokens", "4", "--device", "cpu", "--mixed-precision", "no"]

MATH: dict[str, tuple[list[str], dict[str, Any]]] = {
    "MATH-500": (
        ["problem"],
        {"problem": "What is $1+1$?", "solution": "It is \\boxed{2}.", "answer": "2", "level": 1, "subject": "Algebra"},
    ),
    "MATH-500 by its solution": (
        ["problem", "--answer-column", "solution", "--answer-form", "boxed"],
        {"problem": "What is $1+1$?", "solution": "First \\boxed{1}, then \\boxed{2}."},
    ),
    "Minerva": (["question"], {"question": "What is 1+1?", "answer": "2"}),
    "AMC23": (["question"], {"id": 0, "question": "What is 1+1?", "answer": 2.0, "url": "https://example.org"}),
    "AIME24": (["problem"], {"id": 60, "problem": "What is 1+1?", "solution": "...", "answer": "2", "year": "2024"}),
    "AIME25": (["problem"], {"problem_idx": 1, "problem": "What is 1+1?", "answer": 2, "problem_type": ["Number"]}),
    "GSM8K": (
        ["question", "--answer-form", "hashes"],
        {"question": "One and one?", "answer": "1+1 = <<1+1=2>>2 #### no\n#### 2"},
    ),
}


def parquet(directory: Path, rows: list[dict[str, Any]]) -> Path:
    path = directory / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", MATH)
def test_a_maths_set_runs_with_its_columns(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    (column, *flags), row = MATH[name]
    result = tmp_path / "result.json"
    command = ["eval", "--config", str(PAPER / "eval-math.yaml"), "--model", str(tiny_model_dir)]
    command += ["--prompts", str(parquet(tmp_path, [row])), "--prompt-column", column, *flags, *SMALL]
    assert main([*command, "--json-file", str(result)]) == 0
    (prompt,) = json.loads(result.read_text())["per_prompt"]
    assert prompt["answer"] == "2"
    assert prompt["prompt"].endswith("put your final answer within \\boxed{}.")


def test_gpqa_s_columns_become_lettered_options_shuffled_by_seed(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {
            "Question": f"What is {number}+1?", "Correct Answer": f"right {number}\n", "Incorrect Answer 1": "w1",
            "Incorrect Answer 2": "w2", "Incorrect Answer 3": "w3", "High-level domain": "Physics",
        }
        for number in range(12)
    ]  # fmt: skip

    def make(rows: list[dict[str, Any]], *flags: str) -> list[dict[str, str]]:
        command = [sys.executable, str(PAPER / "make_choices.py"), str(parquet(tmp_path, rows)), "gpqa.jsonl", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (tmp_path / "gpqa.jsonl").read_text().splitlines()]

    made = make(rows, "--kind-column", "High-level domain")
    kept = tmp_path / "kept.jsonl"
    (tmp_path / "gpqa.jsonl").rename(kept)
    for number, row in enumerate(made):
        question, empty, *options = row["prompt"].split("\n")
        assert (question, empty, row["kind"]) == (f"What is {number}+1?", "", "Physics")
        assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "]
        assert sorted(option[3:] for option in options) == sorted([f"right {number}", "w1", "w2", "w3"])
        assert f"{row['answer']}. right {number}" in options
    assert len({row["answer"] for row in made}) > 1  # all of 12 the same: (1/4)^11, and the seed is fixed
    assert [row["prompt"] for row in make(rows[:3])] == [row["prompt"] for row in made[:3]]
    assert [row["prompt"] for row in make(rows, "--seed", "7")] != [row["prompt"] for row in made]

    result = tmp_path / "result.json"
    command = ["eval", "--config", str(PAPER / "eval-choice.yaml"), "--model", str(tiny_model_dir)]
    command += ["--prompts", str(kept), "--prompt-column", "None", "--answer-column", "None"]
    assert main([*command, *SMALL, "--json-file", str(result)]) == 0
    found = json.loads(result.read_text())
    assert found["by_kind"]["Physics"]["num_prompts"] == 12
    assert '"answer", and the letter' in found["per_prompt"][0]["prompt"]


def test_a_solution_without_its_mark_is_named(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form, mark in (("hashes", "####"), ("boxed", "\\boxed{...}")):
        data = parquet(tmp_path, [{"prompt": "x", "answer": "just 2"}])
        assert main(["eval", "--model", "m", "--prompts", str(data), "--answer-form", form]) == 2
        assert (
            f"data.parquet:1: answer: answer_form {form} looks for {mark}, and there is none" in capsys.readouterr().err
        )


def test_a_column_that_is_missing_is_named_by_the_script(tmp_path: Path) -> None:
    data = parquet(tmp_path, [{"Question": "x"}])
    command = [sys.executable, str(PAPER / "make_choices.py"), str(data), str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no column Correct Answer, Incorrect Answer 1" in done.stderr
