"""`vopd-client eval` with samples, in a process of its own, on the real language model and what it can count."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from warm_python import WarmProcess

# Not sums: math-verify takes "987*654", repeated from the question, for its value.
QUESTIONS = [
    ("How many days are in a week?", "7", "known"),
    ("How many hours are in a day?", "24", "known"),
    ("How many legs does a dog have?", "4", "known"),
    ("I think of a number between 1 and 1000000. Guess it.", "271828", "unknown"),
]


@pytest.mark.e2e
def test_questions_with_numbers_are_sampled_and_judged_by_math_verify(demo_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": question}], "answer": answer, "kind": kind}
        for question, answer, kind in QUESTIONS
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "eval", "--model", str(demo_model_dir),
        "--prompts", str(tmp_path / "data.jsonl"), "--json-file", str(tmp_path / "result.json"), "--device", "cpu",
        "--verifier", "math", "--samples-per-prompt", "4", "--temperature", "0.6", "--max-new-tokens", "24",
    ]  # fmt: skip
    told, complaints, env = tmp_path / "told.txt", tmp_path / "complaints.txt", os.environ | {"COLUMNS": "140"}
    with told.open("wb") as out, complaints.open("wb") as err:
        process = WarmProcess(
            "vopd_client.cli", arguments, stdout=out.fileno(), stderr=err.fileno(), env=env, own_group=False
        )
    assert process.wait(240) == 0, complaints.read_text()
    assert "avg@4" in told.read_text()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["num_prompts"], result["num_completions"]) == (4, 16)
    known, unknown = result["by_kind"]["known"], result["by_kind"]["unknown"]
    assert known["num_prompts"] == 3
    assert known["pass_at_n"]["mean"] > 0.5  # the model is small, but not that small
    assert unknown["pass_at_n"]["mean"] == 0
    for scores in (known, unknown, result):
        assert scores["avg_at_n"]["mean"] <= scores["pass_at_n"]["mean"]
        assert scores["maj_at_n"]["mean"] <= scores["pass_at_n"]["mean"]
        assert scores["avg_at_n"]["low"] <= scores["avg_at_n"]["mean"] <= scores["avg_at_n"]["high"]
    shares = [sum(prompt["correct"]) / 4 for prompt in result["per_prompt"]]
    assert result["avg_at_n"]["mean"] == pytest.approx(sum(shares) / 4)
