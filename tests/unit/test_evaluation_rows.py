"""Rows of evaluations are read whatever version wrote them, and say what they measured in one way."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vopd_client.evaluation_rows import (
    describe_measures,
    measures,
    parts,
    sampled_lines,
    summary_of_samples,
    values_by_prompt,
)

OLD: dict[str, Any] = {
    "step": 0, "who": "student", "exact_match": 0.25, "exact_match_by_kind": {"a": 0.5, "b": 0.0}, "num_prompts": 4,
    "kl_nats": 1.5, "kl_by_kind": {}, "samples": [],
}  # fmt: skip
GREEDY = OLD | {"num_right": [1, 0, 0, 0], "questions_hash": "abc"}


def scores(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}


SAMPLED = OLD | {
    "exact_match": None, "exact_match_by_kind": {}, "samples_per_prompt": 4, "avg_at_n": scores(0.5),
    "pass_at_n": scores(0.75), "maj_at_n": scores(0.25), "num_right": [4, 0, 3, 1], "majority_right": [1, 0, 0, 0],
    "by_kind": {kind: {"num_prompts": 2, "avg_at_n": scores(mean)} for kind, mean in (("a", 0.5), ("b", 0.625))},
}  # fmt: skip


def test_an_old_row_has_its_mean_without_an_interval_and_nothing_by_prompt() -> None:
    (measure,) = measures(OLD)
    assert (measure.label, measure.estimate.mean) == ("exact match", 0.25)
    assert math.isnan(measure.estimate.low)
    assert values_by_prompt(OLD, "exact_match") is None
    assert describe_measures(OLD) == "exact match 25.0% (a 50.0%, b 0.0%)"


def test_a_greedy_row_has_an_interval_from_its_prompts() -> None:
    (measure,) = measures(GREEDY)
    assert measure.estimate.low == 0.0
    assert measure.estimate.high == 0.75  # P(binomial(4, 1/4) = 4) = 0.004, P(>= 3) = 0.051
    assert parts(GREEDY, "exact_match", "kind")["a"].mean == 0.5


def test_a_sampled_row_has_three_measures_and_each_prompts_values() -> None:
    assert [(it.label, it.estimate.mean) for it in measures(SAMPLED)] == [
        ("avg@4", 0.5), ("pass@4", 0.75), ("maj@4", 0.25),
    ]  # fmt: skip
    by_prompt = {key: values_by_prompt(SAMPLED, key) for key in ("avg_at_n", "pass_at_n", "maj_at_n")}
    assert {key: None if values is None else values.tolist() for key, values in by_prompt.items()} == {
        "avg_at_n": [1.0, 0.0, 0.75, 0.25], "pass_at_n": [1.0, 0.0, 1.0, 1.0], "maj_at_n": [1.0, 0.0, 0.0, 0.0],
    }  # fmt: skip
    assert (
        describe_measures(SAMPLED) == "avg@4 50.0% (38–62; a 50.0%, b 62.5%), pass@4 75.0% (62–88), maj@4 25.0% (12–38)"
    )


@pytest.mark.parametrize("row", [None, {}, OLD | {"exact_match": None}])
def test_nothing_is_measured_where_there_were_no_answers(row: dict[str, Any] | None) -> None:
    assert measures(row) == []
    assert describe_measures(row or {}) == ""


def test_the_summary_holds_sampled_measures_only_where_there_are_any() -> None:
    assert summary_of_samples(OLD, GREEDY) == {}
    assert sampled_lines({}) == []
    summary = summary_of_samples({}, SAMPLED)
    assert (summary["eval_samples_per_prompt"], summary["avg_at_n_after"]) == (4, scores(0.5))
    assert sampled_lines(summary)[0] == ("avg@4", "-", "50.0% (38–62)")
