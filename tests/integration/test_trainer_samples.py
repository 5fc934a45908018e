"""Evaluations in training that sample: the measures of `vopd-client eval`, in every place that shows a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training_runs import NUM_PROMPTS, Runs
from vopd_client.cli import main
from vopd_client.errors import DataError
from vopd_client.preparation import load_rows
from vopd_client.run_directory import read_rows
from vopd_client.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")

SAMPLED = {"eval_samples_per_prompt": 4, "eval_temperature": 0.7, "eval_top_p": 0.95, "eval_top_k": 20}


def write_prompts(runs: Runs) -> str:
    """Half of the prompts are answered by anything, half by nothing that is ever said; one has no answer."""
    kinds = [("always", "(?s)^"), ("never", "^never$")]
    rows: list[dict[str, Any]] = [
        {"prompt": f"say {number}:", "answer": answer, "verifier": "regex", "kind": kind}
        for number in range(3)
        for kind, answer in kinds
    ]
    path = runs.output_dir / "heldout.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "no answer"}, *rows]))
    return str(path)


def test_two_runs_with_sampled_evaluations_are_reported_and_compared(
    runs: Runs, report_is_drawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SAMPLED | {"eval_prompts": write_prompts(runs), "eval_every": 2, "checkpoint_every": 0}
    assert runs.train(name="a", **settings) == 0
    told = runs.told
    rows = [row for row in read_rows(runs.directory("a").evals_file) if row["who"] == "student"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["exact_match"] is None
        assert row["kl_nats"] > 0
        assert (row["samples_per_prompt"], row["num_prompts"], row["num_completions"]) == (4, 7, 24)
        assert row["num_right"] == [4, 0] * 3
        assert row["majority_right"] == [1, 0] * 3
        for measure in ("avg_at_n", "pass_at_n", "maj_at_n"):
            assert row[measure]["mean"] == 0.5
            assert row[measure]["low"] < 0.5 < row[measure]["high"]
        assert row["by_kind"]["always"]["avg_at_n"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
        assert [sample["correct"] for sample in row["samples"]] == [True, False, True]
    assert len({row["questions_hash"] for row in rows}) == 1
    assert rows[0]["samples"][0]["completion"] != rows[-1]["samples"][0]["completion"]  # it learned something

    assert "avg@4 50.0% (" in told
    assert "always 100.0%" in told
    summary = json.loads(runs.directory("a").summary_file.read_text())
    assert summary["eval_samples_per_prompt"] == 4
    assert summary["maj_at_n_after"]["mean"] == 0.5
    page = (runs.directory("a").path / "report.html").read_text("utf-8")
    assert "avg@4, held-out" in page
    assert "pass@4" in page
    events = EventAccumulator(str(runs.directory("a").tensorboard)).Reload()
    assert [event.value for event in events.Scalars("eval_student/avg_at_n/mean")] == [0.5] * 3

    monkeypatch.setattr("vopd_client.report.write_report", lambda run_dir: [])
    assert runs.train(name="b", steps=2, objective="opd", **settings) == 0
    first = read_rows(runs.directory("b").evals_file)[0]
    assert first["samples"] == rows[0]["samples"]  # before training, with the same draws
    paths = [str(runs.directory(name).path) for name in ("a", "b")]
    assert main(["compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert "+0.0 points (+0.0 to +0.0)" in printed
    assert "b and a: evaluated after step 2 and after step 4" in printed
    assert "opd" in printed
    assert (runs.output_dir / "comparison-a-b" / "comparison.html").exists()


def test_a_task_of_reasoning_gym_trains_rewards_and_evaluates(runs: Runs) -> None:
    spec = "reasoning-gym:chain_sum?size=4&max_terms=2&max_digits=1&chat=false&system_prompt=none"
    settings = {"eval_samples_per_prompt": 2, "task_reward_weight": 0.5, "steps": 1, "checkpoint_every": 0}
    assert runs.train(prompts=f"{spec}&seed=1", eval_prompts=f"{spec}&seed=2", **settings) == 0
    assert read_rows(runs.directory().metrics_file)[0]["task_reward_mean"] >= 0
    evaluations = read_rows(runs.directory().evals_file)
    assert list(evaluations[0]["by_kind"]) == ["chain_sum"]
    assert len(evaluations[0]["num_right"]) == 4
    assert f"{spec}&seed=1" in runs.directory().config_file.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_temperature": 0.6}, "eval_temperature 0.6 has no effect on the one greedy completion"),
        ({"eval_top_k": 5}, "give eval_samples_per_prompt 2 or more"),
        ({"eval_samples_per_prompt": 4}, "eval_samples_per_prompt 4 needs eval_prompts"),
    ],
)
def test_settings_of_sampled_evaluations_that_have_no_effect_are_refused(
    runs: Runs, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        runs.config(**settings)


def test_sampled_evaluations_need_an_answer_to_compare_with(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "x"}\n')
    config: TrainConfig = runs.config(eval_prompts=str(tmp_path / "data.jsonl"), eval_samples_per_prompt=4)
    with pytest.raises(DataError, match="no row has an answer, and eval_samples_per_prompt 4 compares with answers"):
        load_rows(config)
    assert len(load_rows(runs.config(eval_samples_per_prompt=1)).train) == NUM_PROMPTS
