"""examples/paper: the settings are the paper's, and rows in the shape of its data sets become the prompts it means.

The rows are made up; their columns and types are those of the public data sets.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from tiny_model import tiny_tokenizer
from vopd_client.baselines import choose_baseline
from vopd_client.command_config import EvalConfig
from vopd_client.config import PromptColumns
from vopd_client.prompts import Prompt, RowFormat, load_prompts, render_prompts
from vopd_client.train_config import TrainConfig
from vopd_settings import load_settings

PAPER = REPOSITORY / "examples" / "paper"
REASON = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

ROWS: dict[str, dict[str, Any]] = {
    "open-r1/DAPO-Math-17k-Processed:en:train": {
        "prompt": "What is 1+1?", "solution": "2", "data_source": "math_dapo", "ability": "MATH",
        "source_prompt": [{"role": "user", "content": "Solve ... What is 1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "9a9b"},
    },
    "HuggingFaceH4/MATH-500:test": {
        "problem": "What is 1+1?", "solution": "It is \\boxed{2}.", "answer": "2", "subject": "Prealgebra", "level": 1,
        "unique_id": "test/prealgebra/1.json",
    },
    "math-ai/minervamath:test": {"question": "What is 1+1?", "answer": "2"},
    "math-ai/amc23:test": {"id": 0, "question": "What is 1+1?", "answer": "2", "url": "https://example.org"},
    "HuggingFaceH4/aime_2024:train": {
        "id": 60, "problem": "What is 1+1?", "solution": "...", "answer": "2", "url": "https://example.org",
        "year": "2024",
    },
    "MathArena/aime_2025:train": {
        "problem_idx": 1, "problem": "What is 1+1?", "answer": 2, "problem_type": ["Number Theory"],
    },
    "fingertap/GPQA-Diamond:test": {"question": "What is 1+1?\n\nA. 1\nB. 2\nC. 3\nD. 4", "answer": "B"},
}  # fmt: skip


def read(settings: type[Any], file: str, *flags: str) -> Any:
    return load_settings(settings, ["--config", str(PAPER / file), *flags], prog="test", env_prefix="VOPD_CLIENT_")


def render(config: PromptColumns, row: dict[str, Any], verifier: Any, directory: Path) -> Prompt:
    path = directory / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    row_format = RowFormat(config.prompt_column, config.answer_column, config.prompt_suffix, config.answer_form)
    (prompt,) = render_prompts(
        load_prompts(str(path), default_verifier=verifier, row_format=row_format),
        tokenizer=tiny_tokenizer(), teacher_chat_template="unused", max_prompt_tokens=1024, max_new_tokens=2048,
        student_max_length=8192, teacher_max_length=4096,
    )  # fmt: skip
    return prompt


def test_training_has_the_paper_s_settings(tmp_path: Path) -> None:
    config = read(TrainConfig, "train.yaml")
    of_the_paper = {
        "objective": "vopd", "top_k": 100, "support": "student", "support_mass": 1.0, "tail": "renormalise",
        "baseline": "kl", "temperature": 1.0, "rollouts_per_prompt": 1, "max_prompt_tokens": 1024,
        "max_new_tokens": 2048, "learning_rate": 1e-5, "schedule": "cosine", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "mixed_precision": "bf16", "lora_rank": 64, "lora_alpha": 128, "lora_dropout": 0.05,
        "seed": 42, "checkpoint_every": 20,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in of_the_paper} == of_the_paper
    assert config.prompts_per_step == 1 * 64 * 4
    assert config.steps == 14_116 // config.prompts_per_step  # one epoch


ESTIMATOR = ("objective", "top_k", "support", "support_mass", "tail")
NEEDED = ("--student", "s", "--prompts", "p", "--teacher-url", "grpc://x:1")


def train_settings(*flags: str) -> TrainConfig:
    return load_settings(TrainConfig, [*NEEDED, *flags], prog="test", env_prefix="VOPD_CLIENT_")


def test_the_paper_s_estimator_is_one_flag_away() -> None:
    recipe, flag = read(TrainConfig, "train.yaml"), train_settings("--objective", "vopd")
    assert [getattr(flag, name) for name in ESTIMATOR] == [getattr(recipe, name) for name in ESTIMATOR]
    assert choose_baseline(flag.objective, flag.baseline) == recipe.baseline


def test_what_is_said_goes_before_the_settings_that_an_objective_comes_with() -> None:
    config = train_settings("--objective", "vopd", "--tail", "bucket", "--support-mass", "0.9")
    assert (config.tail, config.support_mass) == ("bucket", 0.9)


def test_without_an_objective_it_is_ours_with_a_support_cut_by_mass() -> None:
    config = train_settings()
    assert [getattr(config, name) for name in ESTIMATOR] == ["vopd-rb", 100, "student", 0.9999, "bucket"]
    assert choose_baseline(config.objective, config.baseline) == "optimal"


def test_a_training_row_becomes_the_raw_problem_and_the_instruction_for_both_models(tmp_path: Path) -> None:
    config = read(TrainConfig, "train.yaml")
    prompt = render(config, ROWS[config.prompts], config.verifier, tmp_path)
    for ids in (prompt.student_ids, prompt.teacher_ids):
        assert tiny_tokenizer().decode(ids) == "What is 1+1?" + REASON


@pytest.mark.parametrize(("file", "top_p", "top_k"), [("eval-math.yaml", 1.0, 0), ("eval-choice.yaml", 0.95, 20)])
def test_evaluation_has_the_paper_s_protocol(file: str, top_p: float, top_k: int) -> None:
    config = read(EvalConfig, file)
    assert (config.samples_per_prompt, config.temperature, config.max_new_tokens) == (8, 0.6, 4096)
    assert (config.top_p, config.sampling_top_k) == (top_p, top_k)


def commands_of_the_readme() -> list[tuple[str, str]]:
    """(data set, prompt column) of the README's lines `eval NAME DATASET COLUMN`."""
    found = re.findall(r"^ *eval \w+ (\S+) (\w+)$", (PAPER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert len(found) == 5
    return found


@pytest.mark.parametrize(("data_set", "column"), commands_of_the_readme())
def test_a_row_of_each_maths_set_becomes_the_raw_problem_and_its_answer(
    data_set: str, column: str, tmp_path: Path
) -> None:
    config = read(EvalConfig, "eval-math.yaml", "--prompts", data_set, "--prompt-column", column)
    prompt = render(config, ROWS[data_set], config.verifier, tmp_path)
    assert tiny_tokenizer().decode(prompt.student_ids) == "What is 1+1?" + REASON
    assert (prompt.answer, prompt.verifier) == ("2", "boxed-math")


def test_a_row_of_gpqa_becomes_the_question_with_its_options_and_asks_for_a_letter(tmp_path: Path) -> None:
    config = read(EvalConfig, "eval-choice.yaml")
    row = ROWS[config.prompts]
    prompt = render(config, row, config.verifier, tmp_path)
    text = tiny_tokenizer().decode(prompt.student_ids)
    assert text.startswith(row["question"] + "\n\n")
    assert '"answer"' in text.removeprefix(row["question"])
    assert (prompt.answer, prompt.verifier) == ("B", "choice")
