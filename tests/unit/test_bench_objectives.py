"""The pure parts of `make bench-objectives`: what is run in which order, what is refused, what is summed up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from objectives_plan import (
    DEMO,
    HARD_INSTRUCTION,
    OBJECTIVES,
    QUICK,
    SEEDS,
    TASKS,
    RunId,
    Scale,
    bench_settings,
    check_same_bench,
    hard_start,
    missing_runs,
    read_jsonl,
    runs_in_order,
    train_config,
    write_data,
)
from objectives_report import every_seed, markdown, reached
from objectives_results import (
    Results,
    RunResult,
    curve,
    spread,
    steps_to_reach,
)

# ---------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_data(directory, None)
    return directory


def config_of(run: RunId, data: Path, scale: Scale | None = None) -> dict[str, Any]:
    config = train_config(
        run,
        scale or Scale(),
        model="model",
        teacher_url="grpc://127.0.0.1:1",
        data=data,
        output_dir=Path("runs"),
        eval_teacher=False,
    )
    return config.model_dump(mode="json")


def test_every_seed_is_complete_before_the_next_begins() -> None:
    runs = runs_in_order(SEEDS)
    assert len(set(runs)) == len(runs) == len(SEEDS) * len(TASKS) * len(OBJECTIVES) == 70
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    a_seed = runs[: len(TASKS) * len(OBJECTIVES)]
    assert {(run.task, run.objective) for run in a_seed} == {(t.name, o) for t in TASKS for o in OBJECTIVES}


@pytest.mark.parametrize(("only", "count"), [("opd", 2), ("capitals", len(OBJECTIVES)), ("vopd-rb/chain-sum", 1)])
def test_only_picks_an_objective_a_task_or_one_of_both(only: str, count: int) -> None:
    assert len(runs_in_order((1,), only)) == count


def test_only_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"nothing is called 'vopt': there are opd, vopd, .*capitals"):
        runs_in_order((1,), "vopt")


def test_a_benchmark_goes_on_with_the_first_run_that_is_missing() -> None:
    runs = runs_in_order((1, 2))
    assert missing_runs(runs, [runs[0], runs[2]]) == [runs[1], *runs[3:]]


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_runs_of_a_task_differ_in_the_objective_alone(data: Path, task: str) -> None:
    configs = [config_of(RunId(task, objective, 1), data) for objective in OBJECTIVES]
    differing = {key for config in configs for key in config if config[key] != configs[0][key]}
    assert differing == {"name", "objective", "top_k", "tail"}
    assert {(config["steps"], config["eval_kl"], config["seed"]) for config in configs} == {(20, "vocabulary", 1)}
    assert all(config["max_new_tokens"] <= 32 for config in configs)


def test_the_paper_s_vopd_and_the_bucket_at_four_are_what_they_are_called(data: Path) -> None:
    paper = config_of(RunId("capitals", "vopd", 1), data)
    bucket = config_of(RunId("capitals", "vopd-bucket-4", 1), data)
    assert (paper["objective"], paper["top_k"], paper["tail"], paper["support_mass"]) == ("vopd", 100, "renormalise", 1)
    assert (bucket["objective"], bucket["top_k"], bucket["tail"]) == ("vopd", 4, "bucket")


def test_the_hard_start_changes_the_instruction_and_nothing_else(data: Path) -> None:
    easy = [row for row in read_jsonl(DEMO / "heldout.jsonl") if row["kind"] == "capital"]
    hard = read_jsonl(data / "capitals" / "heldout.jsonl")
    assert len(hard) == len(easy) == 28
    for before, after in zip(easy, hard, strict=True):
        assert after["messages"][0]["content"].splitlines()[1:] == [HARD_INSTRUCTION]
        assert {**after, "messages": before["messages"]} == before


def test_a_demo_without_its_instruction_is_noticed() -> None:
    with pytest.raises(AssertionError, match="Begin your reply"):
        hard_start([{"kind": "capital", "messages": [{"role": "user", "content": "What is the capital of X?"}]}])


# ---------------------------------------------------------------- results of other settings


def test_the_same_settings_are_accepted_again(data: Path) -> None:
    first = bench_settings(Scale(), model="model", data=data)
    stored = json.loads(json.dumps(first))
    check_same_bench(stored, bench_settings(Scale(), model="model", data=data), Path("objectives.json"))


def test_other_settings_are_refused_and_named(data: Path) -> None:
    full = bench_settings(Scale(), model="model", data=data)
    with pytest.raises(ValueError, match=r"(?s)objectives\.json holds .* eval_every: 5 -> 2\n.*steps: 20 -> 3"):
        check_same_bench(full, bench_settings(QUICK, model="model", data=data), Path("objectives.json"))


def test_other_prompts_are_refused(data: Path, tmp_path: Path) -> None:
    write_data(tmp_path, 5)
    old, new = (bench_settings(Scale(), model="model", data=where) for where in (data, tmp_path))
    with pytest.raises(ValueError, match="task chain-sum: train: "):
        check_same_bench(old, new, Path("objectives.json"))


def test_a_new_objective_may_join_the_results_of_the_others(data: Path) -> None:
    now = bench_settings(Scale(), model="model", data=data)
    before = {key: value for key, value in now.items() if not key.startswith("objective full-kl: ")}
    check_same_bench(before, now, Path("objectives.json"))
    with pytest.raises(ValueError, match="objective vopd: top_k: 50 -> 100"):
        check_same_bench({**before, "objective vopd: top_k": 50}, now, Path("objectives.json"))


# ---------------------------------------------------------------- results


def a_result(exact_match: tuple[float, ...], kl_nats: float = 0.5) -> RunResult:
    """Steps of two seconds, evaluated at 0, 5, 10, ..."""
    last = 5 * (len(exact_match) - 1)
    metrics = [
        {"step": step, "step_s": 2.0, "kl_nats": kl_nats, "variance_over_opd": 0.25, "teacher_bytes_per_token": 600.0}
        for step in range(1, last + 1)
    ]
    evaluations = [
        {"step": 5 * place, "exact_match": value, "kl_nats": 1 / (1 + place)} for place, value in enumerate(exact_match)
    ]
    return RunResult(metrics, evaluations, seconds=100.0, cpu="a processor")


@pytest.fixture
def results() -> Results:
    made = Results(settings={}, machine={}, teachers={"capitals": {"exact_match": 0.8, "num_prompts": 28}})
    made.add(RunId("capitals", "vopd", 1), a_result((0.0, 0.0, 0.8)))
    made.add(RunId("capitals", "vopd", 2), a_result((0.0, 0.4, 0.6), kl_nats=0.7))
    made.add(RunId("capitals", "opd", 1), a_result((0.0, 0.0, 0.0)))
    return made


def test_a_row_counts_the_seconds_of_the_steps_before_it(results: Results) -> None:
    rows = [row for row in results.rows if (row["objective"], row["seed"]) == ("vopd", 2)]
    assert [(row["step"], row["exact_match"], row["seconds"]) for row in rows] == [
        (0, 0.0, 0.0),
        (5, 0.4, 10.0),
        (10, 0.6, 20.0),
    ]


def test_results_survive_the_file_with_a_line_a_row(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "results" / "objectives.json"
    results.save(path)
    assert Results.load(path) == results
    assert Results.load(path).done == [
        RunId("capitals", "vopd", 1),
        RunId("capitals", "vopd", 2),
        RunId("capitals", "opd", 1),
    ]
    assert sum('"exact_match"' in line and '"step"' in line for line in path.read_text().splitlines()) == 9


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "objectives.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="does not hold results"):
        Results.load(path)


def test_what_is_not_a_number_is_null_in_the_file() -> None:
    result = a_result((0.0, 0.0))
    metrics = [{**row, "variance_over_opd": None, "kl_nats": math.nan} for row in result.metrics]
    made = Results(settings={}, machine={})
    made.add(RunId("capitals", "opd", 1), RunResult(metrics, result.evaluations, 1.0, "another", "stopped"))
    assert made.runs[0]["steps"]["variance_over_opd"] == made.runs[0]["steps"]["kl_nats"] == [None] * 5
    assert made.runs[0]["failed"] == "stopped"


def test_the_start_of_a_seed_is_found_once_any_objective_has_run(results: Results) -> None:
    start = results.start_of("capitals", 2)
    assert start is not None
    assert (start["step"], start["seed"], start["kl_nats"]) == (0, 2, 1.0)
    assert results.start_of("capitals", 3) is None


def test_a_spread_is_over_seeds_and_leaves_out_what_is_missing() -> None:
    found = spread([1.0, None, 3.0, math.nan])
    assert found is not None
    assert (found.mean, found.low, found.high, found.count) == (2.0, 1.0, 3.0, 2)
    assert found.std == pytest.approx(math.sqrt(2))
    assert spread([None]) is None


def test_a_curve_has_a_point_an_evaluated_step(results: Results) -> None:
    found = curve(results.rows, "capitals", "vopd", "exact_match")
    assert {step: point.mean for step, point in found.items()} == pytest.approx({0: 0.0, 5: 0.2, 10: 0.7})


def test_the_first_step_that_is_high_enough_counts() -> None:
    points = [(0, 0.0), (5, 0.4), (10, 0.3), (15, 0.9)]
    assert steps_to_reach(points, 0.4) == 5
    assert steps_to_reach(points, 0.95) is None


def test_the_median_is_of_those_that_got_there_and_says_how_many() -> None:
    curves = [[(0, 0.0), (5, 0.5)], [(0, 0.0), (5, 0.0), (10, 0.5)], [(0, 0.0), (5, 0.1)]]
    assert reached(curves, {"exact_match": 0.8}) == "7.5 (2 of 3)"
    assert reached([[(0, 0.0)]], {"exact_match": 0.8}) == "never (0 of 1)"


def test_the_table_has_every_objective_with_its_spread(results: Results) -> None:
    lines = markdown(results, "capitals").splitlines()
    assert "The teacher itself: 80 % of 28." in lines
    (vopd,) = (line for line in lines if line.startswith("| vopd |"))
    cells = [cell.strip() for cell in vopd.strip("|").split("|")]
    assert cells[1:4] == ["2", "20 % ± 28 %", "70 % ± 14 %"]
    assert cells[4] == "7.5 (2 of 2)"
    assert cells[6:] == ["0.600 ± 0.141", "0.250 ± 0.000", "600", "2.0 ± 0.0"]
    assert any(line.startswith("| opd | 1 | 0 % | 0 % |") for line in lines)


def test_every_seed_has_its_place(results: Results) -> None:
    assert every_seed(results, "capitals").splitlines() == [
        "| objective | seed 1 | seed 2 |",
        "| --- | --- | --- |",
        "| vopd | 0/0/80 %, 0.33 | 0/40/60 %, 0.33 |",
        "| opd | 0/0/0 %, 0.33 | – |",
    ]


def test_seconds_of_several_processors_are_told_apart(results: Results) -> None:
    assert "processors" not in markdown(results, "capitals")
    results.add(RunId("capitals", "opd", 2), replace(a_result((0.0, 0.1)), cpu="another"))
    num_before = len(results.runs) - 1
    assert f"Seconds are of several processors: {num_before} on a processor, 1 on another." in markdown(
        results, "capitals"
    )
