"""`vopd-client compare` on hand-written runs and results: what it reads, pairs, draws, prints and refuses."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from vopd_client.cli import main
from vopd_client.command_config import CompareConfig
from vopd_client.compare_command import default_directory, run_compare
from vopd_client.compared import MAX_SUBJECTS, differing, distinct_names, read_subjects
from vopd_client.compared_pairs import Pairing, pair_with_first, paired_difference
from vopd_client.compared_plot import look_of
from vopd_client.compared_tables import final_numbers, paired_lines
from vopd_client.errors import ConfigError, RunDirectoryError

NUM_RIGHT = [4, 3, 2, 1, 0, 0, 1, 4]


def estimate(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    return {"mean": mean, "low": max(0.0, mean - 0.1), "high": min(1.0, mean + 0.1)}


def sampled_row(num_right: list[int], **more: Any) -> dict[str, Any]:
    majority_right = [int(right > 2) for right in num_right]
    scores = {
        "avg_at_n": estimate([right / 4 for right in num_right]),
        "pass_at_n": estimate([float(right > 0) for right in num_right]),
        "maj_at_n": estimate([float(right) for right in majority_right]),
    }
    by_kind = {kind: {"num_prompts": 4, **scores} for kind in ("algebra", "geometry")}
    return {
        **scores, "samples_per_prompt": 4, "by_kind": by_kind, "by_teacher": {}, "num_right": num_right,
        "majority_right": majority_right, "questions_hash": "same", "num_cut": 1, "num_completions": 32,
    } | more  # fmt: skip


def greedy_row(num_right: list[int], **more: Any) -> dict[str, Any]:
    share = sum(num_right) / len(num_right)
    by_kind = {"algebra": share, "geometry": share}
    return {
        "exact_match": share,
        "exact_match_by_kind": by_kind,
        "num_right": num_right,
        "questions_hash": "same",
    } | more


def write_run(
    directory: Path,
    *,
    steps: int = 8,
    evaluations: list[dict[str, Any]] | None = None,
    columns: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    directory.mkdir(parents=True)
    rows = [
        {
            "step": step, "kl_nats": 1.0 / step, "grad_norm": 2.0, "tokens_per_s": 50.0, "step_s": 2.0,
            "num_valid_tokens": 100, "teacher_wait_s": 0.5, "variance_over_opd": 0.25,
        } | (columns or {})
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"name": directory.name, "output_dir": "runs", "objective": "vopd-rb", "steps": steps} | config
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    if evaluations is not None:
        common = {"who": "student", "exact_match": None, "num_prompts": 8, "kl_nats": 0.5, "samples": []}
        (directory / "evals.jsonl").write_text("".join(json.dumps(common | row) + "\n" for row in evaluations))
    return directory


def write_result(path: Path, row: dict[str, Any], **settings: Any) -> Path:
    path.write_text(json.dumps({"model": path.stem, "prompts": "data.jsonl", "as_teacher": False} | settings | row))
    return path


def pairing(tmp_path: Path, first: dict[str, Any], other: dict[str, Any]) -> Pairing:
    paths = [write_result(tmp_path / f"{name}.json", row) for name, row in (("a", first), ("b", other))]
    (found,) = pair_with_first(read_subjects(paths))
    return found


# ---------------------------------------------------------------- paired differences


def test_a_constant_difference_has_an_interval_without_width_however_hard_the_prompts_differ() -> None:
    reference_P = np.array([0.0, 0.25, 0.5, 0.75])
    found = paired_difference("avg@4", reference_P, reference_P + 0.25)
    assert (found.estimate.mean, found.estimate.low, found.estimate.high) == (0.25, 0.25, 0.25)
    assert (found.num_better, found.num_worse, found.num_prompts) == (4, 0, 4)
    assert found.is_clear


def test_the_interval_of_one_prompt_up_in_a_hundred_is_its_binomial_one() -> None:
    # The resampled count is binomial(100, 1/100): P(0) = 0.366 > 2.5 %, P(<= 2) = 0.921, P(<= 3) = 0.982.
    moved_P = np.array([1.0] + [0.0] * 99)
    found = paired_difference("pass@4", np.zeros(100), moved_P)
    assert (found.estimate.low, found.estimate.high) == (0.0, 0.03)
    assert not found.is_clear
    down = paired_difference("pass@4", moved_P, np.zeros(100))
    assert (down.estimate.low, down.estimate.high) == (-0.03, 0.0)


def test_pairing_takes_out_what_makes_a_prompt_hard_for_both() -> None:
    generator = np.random.default_rng(3)
    hard_P = generator.random(400)
    first_P, other_P = hard_P, np.clip(hard_P + generator.normal(0.02, 0.05, 400), 0, 1)
    found = paired_difference("avg@8", first_P, other_P)
    error = (other_P - first_P).std() / math.sqrt(400)
    # 10,000 resamples place a 2.5 % quantile to about 0.027 standard errors; a tenth is four times as much.
    assert found.estimate.low == pytest.approx(found.estimate.mean - 1.96 * error, abs=0.1 * error)
    assert found.estimate.high == pytest.approx(found.estimate.mean + 1.96 * error, abs=0.1 * error)
    assert found.is_clear  # unpaired, the standard error is eight times as large


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    # 100 data sets of 60 prompts, whose differences have a mean of 0.075. In 4,000 others the interval covered it in
    # 94.8 %; at that rate fewer than 86 of 100 have probability 0.0002.
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(100):
        moved_P = generator.choice([-0.25, 0.0, 0.25, 0.5], 60, p=[0.2, 0.4, 0.3, 0.1])
        found = paired_difference("avg@4", np.zeros(60), moved_P)
        covered += found.estimate.low <= 0.075 <= found.estimate.high
    assert covered >= 86


def test_what_was_measured_on_both_sides_is_paired(tmp_path: Path) -> None:
    better = [min(4, right + 1) for right in NUM_RIGHT]
    found = pairing(tmp_path, sampled_row(NUM_RIGHT), sampled_row(better))
    assert [(it.measure, it.num_better, it.num_worse) for it in found.differences] == [
        ("avg@4", 6, 0), ("pass@4", 2, 0), ("maj@4", 1, 0),
    ]  # fmt: skip
    assert found.differences[0].estimate.mean == pytest.approx(6 / 4 / 8)
    assert found.note == ""
    (line, *_) = paired_lines([found])
    assert line.pair == "b − a"
    assert re.fullmatch(r"\+18\.8 points \(\+\d+\.\d to \+\d+\.\d\)", line.difference)
    assert line.prompts == "6 up, 0 down of 8"
    greedy = pairing(tmp_path, greedy_row([1, 0, 1, 0]), greedy_row([1, 1, 0, 0]))
    assert [(it.measure, it.num_better, it.num_worse) for it in greedy.differences] == [("exact match", 1, 1)]


def test_with_other_numbers_of_samples_only_averages_are_paired(tmp_path: Path) -> None:
    found = pairing(tmp_path, sampled_row(NUM_RIGHT), sampled_row([8] * 8, samples_per_prompt=8))
    assert [it.measure for it in found.differences] == ["avg@8 against avg@4"]
    assert "pass@n and maj@n are left out: they depend on n, which is 4 and 8" in found.note


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (sampled_row(NUM_RIGHT, questions_hash="other"), "they answered other prompts (both 8, but others)"),
        (sampled_row(NUM_RIGHT[:4], questions_hash="other"), "they answered other prompts (8 against 4)"),
        (greedy_row([1] * 8), "one is of greedy completions, the other of sampled ones"),
        ({"exact_match": 0.5, "exact_match_by_kind": {}}, "written by an older version"),
    ],
)
def test_what_cannot_be_paired_says_why(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    found = pairing(tmp_path, sampled_row(NUM_RIGHT), other)
    assert found.differences == ()
    assert reason in found.note


# ---------------------------------------------------------------- reading


def test_names_are_as_short_as_keeps_them_apart() -> None:
    paths = [Path(p) for p in ("/x/one/run", "/x/two/run", "/x/other", "/x/one.json")]
    assert distinct_names(paths) == ["one/run", "two/run", "other", "one"]
    assert distinct_names([Path("/x/a"), Path("/x/a.json")]) == ["a", "a.json"]


def test_settings_that_differ_leave_out_where_runs_lie(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", learning_rate=1e-5), write_run(tmp_path / "b", learning_rate=2e-5, lora_rank=8)]
    assert differing(read_subjects(runs)) == [("learning_rate", [1e-5, 2e-5]), ("lora_rank", [None, 8])]


def test_final_numbers_are_those_of_the_runs_files(tmp_path: Path) -> None:
    evaluations = [{"step": 0} | sampled_row([0] * 8), {"step": 4, "kl_nats": 0.25} | sampled_row(NUM_RIGHT)]
    first = write_run(tmp_path / "a", evaluations=evaluations)
    other = write_run(tmp_path / "b", evaluations=None, columns={"variance_over_opd": None})
    (other / "config.yaml").write_text("{steps: 10}")
    numbers = {line.label: line.cells for line in final_numbers(read_subjects([first, other])) if not line.is_part}
    assert numbers == {
        "avg@4": ["46.9% (37–57)", "–"],
        "pass@4": ["75.0% (65–85)", "–"],
        "maj@4": ["37.5% (28–48)", "–"],
        "judged prompts": ["8", "–"],
        "completions cut at the limit": ["1 of 32", "–"],
        "KL to the teacher, held-out, nats": ["0.250", "–"],
        "KL on the last tenth of the steps, nats": ["0.125", "0.125"],
        "steps": ["8", "8 of 10, not finished"],
        "completion tokens learned from": ["800", "800"],
        "training time": ["16.0 s", "16.0 s"],
        "tokens a second": ["50.0", "50.0"],
        "time spent waiting for the teacher": ["25%", "25%"],
        "gradient norm, median": ["2", "2"],
        "noise of the gradient, share of opd's": ["25%", "–"],
    }


# ---------------------------------------------------------------- what comes out


def compare(*paths: Path, **settings: Any) -> tuple[Path, str, str]:
    """The directory, the page, and what was printed."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    png, page = run_compare(CompareConfig(inputs=[str(path) for path in paths], **settings), console)
    assert png.read_bytes().startswith(b"\x89PNG")
    html = page.read_text("utf-8")
    assert "<script" not in html
    assert not re.search(r"url\((?!#)|@import|src=|<link", html)
    assert "nan" not in re.sub(r"<style.*?</style>|<svg.*?</svg>", "", html, flags=re.DOTALL).lower()
    return png.parent, html, text.getvalue()


def test_runs_of_all_sorts_are_drawn_together(tmp_path: Path) -> None:
    sample = {"prompt": "2<b>?", "completion": "<b>4</b>", "answer": "4", "correct": True, "kind": None}
    sampled = [{"step": step, "samples": [sample]} | sampled_row(NUM_RIGHT) for step in (0, 8)]
    runs = [
        write_run(tmp_path / "one" / "run", evaluations=sampled, steps=8),
        write_run(tmp_path / "two" / "run", evaluations=sampled[:1], steps=70, planned=100),
        write_run(tmp_path / "greedy", evaluations=[{"step": 0} | greedy_row([1, 0] * 4)]),
        write_run(tmp_path / "no-evaluations", steps=1, columns={"step_s": None, "grad_norm": None}),
    ]
    directory, html, printed = compare(*runs)
    assert directory == tmp_path / "one" / "comparison-one-run-two-run-and-2-more"
    assert "<h1>one/run, two/run, greedy and no-evaluations</h1>" in html
    assert "&lt;b&gt;4&lt;/b&gt;" in html
    assert "no-evaluations and one/run: not paired: no-evaluations has no evaluation with answers" in printed
    assert "two/run and one/run: evaluated after step 0 and after step 8" in printed
    assert "avg@4" in printed


def test_runs_that_tell_nothing_but_their_steps_still_make_a_page(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("kl_nats", "grad_norm", "tokens_per_s", "step_s", "num_valid_tokens", "variance_over_opd"))
    runs = [write_run(tmp_path / name, columns=nothing | {"teacher_wait_s": None}) for name in "ab"]
    _, html, _ = compare(*runs)
    assert "steps" in html


def test_results_are_compared_with_paired_intervals(tmp_path: Path) -> None:
    first = write_result(tmp_path / "before.json", sampled_row(NUM_RIGHT), temperature=0.6)
    other = write_result(tmp_path / "after.json", sampled_row([4] * 8), temperature=0.7)
    directory, html, printed = compare(first, other, comparison_dir=tmp_path / "out")
    assert directory == tmp_path / "out"
    assert "after − before" in html
    assert "+53.1 points" in printed
    assert "temperature" in printed
    compare(
        write_result(tmp_path / "x.json", greedy_row([1, 0])), write_result(tmp_path / "y.json", greedy_row([1, 1]))
    )
    assert (tmp_path / "comparison-x-y" / "comparison.png").exists()


def test_ten_subjects_look_different_and_long_names_make_no_long_path(tmp_path: Path) -> None:
    assert len({str(sorted(look_of(place).items())) for place in range(MAX_SUBJECTS)}) == MAX_SUBJECTS
    runs = [write_run(tmp_path / (f"{letter}" * 90), steps=2) for letter in "ab"]
    assert len(default_directory(read_subjects(runs)).name) == 100


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    result = write_result(tmp_path / "result.json", greedy_row([1]))
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for paths, message in [
        ([run], "inputs: 1 given, and 2 to 10 can be compared"),
        ([run] * 11, "inputs: 11 given"),
        ([run, tmp_path / "." / "run"], "is given twice"),
        ([run, tmp_path / "nowhere"], "no such file or directory"),
        ([run, result], "give directories of runs alone, or files alone"),
        ([run, tmp_path], "holds no run: there is no metrics.jsonl in it"),
        ([result, damaged], "damaged.json is no result of `vopd-client eval --json-file`"),
        ([result, write_result(tmp_path / "none.json", {})], "neither exact_match nor avg_at_n"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        assert main(["compare", *map(str, paths)]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_comparison_is_not_written_into_a_run_or_where_nothing_can_be(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    with pytest.raises(RunDirectoryError, match="holds a run: give another comparison_dir"):
        compare(*runs, comparison_dir=runs[0])
    with pytest.raises(RunDirectoryError, match="cannot write the comparison"):
        compare(*runs, comparison_dir=runs[0] / "metrics.jsonl" / "x")
    with pytest.raises(ConfigError):
        read_subjects([])


def test_the_command_takes_paths_first_and_flags_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name)) for name in "abc"]
    assert main(["compare", *runs, "--comparison-dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out' / 'comparison.html'}\n")
    assert main(["compare", "--inputs", ",".join(runs)]) == 0
    assert (tmp_path / "comparison-a-b-c" / "comparison.html").exists()
