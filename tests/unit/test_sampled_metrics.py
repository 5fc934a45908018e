"""avg@n, pass@n, maj@n and their intervals, against values worked out by hand and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vopd_client.sampled_metrics import avg_at_n, estimate, maj_at_n, majority, pass_at_n

CORRECT_PN = np.array([[True, False, False, True], [False, False, False, False], [True, True, True, True]])


def equal(first: str, other: str) -> bool:
    return first == other


def test_avg_at_n_is_the_share_of_right_samples() -> None:
    assert avg_at_n(CORRECT_PN).tolist() == [0.5, 0.0, 1.0]


def test_pass_at_n_counts_a_prompt_when_any_sample_is_right() -> None:
    assert pass_at_n(CORRECT_PN).tolist() == [1.0, 0.0, 1.0]


def test_maj_at_n_asks_the_sample_that_speaks_for_the_majority() -> None:
    assert maj_at_n(CORRECT_PN, [1, 0, 2]).tolist() == [0.0, 0.0, 1.0]
    assert maj_at_n(CORRECT_PN, [3, None, None]).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["a", "b", "b"], 1),
        (["a", "b", "b", "a"], 0),  # as common: the first given
        (["b", "a", "c", "a", "b"], 0),
        ([None, None, "a"], 2),  # who answers nothing does not vote
        ([None, "a", "b", "b"], 2),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_majority_is_the_first_most_common_answer(answers: list[str | None], chosen: int | None) -> None:
    assert majority(answers, equal) == chosen


def test_answers_are_compared_with_the_first_of_their_group() -> None:
    # Within 1 of each other: 0 and 1 are the same, 1 and 2 are, 0 and 2 are not.
    assert majority([0, 1, 2, 3, 3], lambda first, other: abs(first - other) <= 1) == 2


def test_an_estimate_has_the_mean_and_an_interval_around_it() -> None:
    found = estimate(np.array([0.0, 0.25, 1.0, 0.75]))
    assert found.mean == 0.5
    assert 0 <= found.low < 0.5 < found.high <= 1


def test_equal_values_have_an_interval_without_width() -> None:
    found = estimate(np.full(7, 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_the_interval_of_many_prompts_is_the_normal_one() -> None:
    # 10,000 resamples place a 2.5 % quantile to about 0.027 standard errors; a tenth is four times as much.
    values_P = np.random.default_rng(5).random(800).round(3)
    standard_error = values_P.std() / math.sqrt(800)
    found = estimate(values_P)
    assert found.low == pytest.approx(values_P.mean() - 1.96 * standard_error, abs=0.1 * standard_error)
    assert found.high == pytest.approx(values_P.mean() + 1.96 * standard_error, abs=0.1 * standard_error)


def test_the_interval_of_two_prompts_is_known_exactly() -> None:
    # Means of two draws from {0, 1}: 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4.
    found = estimate(np.array([0.0, 1.0]))
    assert (found.low, found.mean, found.high) == (0.0, 0.5, 1.0)


def test_one_prompt_in_a_hundred_reaches_no_further_than_its_binomial_quantiles() -> None:
    # The resampled count of it is binomial(100, 1/100): P(0) = 0.366, P(<= 3) = 0.982, P(<= 2) = 0.921.
    found = estimate(np.array([1.0] + [0.0] * 99))
    assert (found.low, found.high) == (0.0, 0.03)


def test_the_interval_is_a_function_of_the_values_alone() -> None:
    values_P = np.array([0.5, 0.0, 1.0, 0.125, 0.875])
    assert estimate(values_P) == estimate(values_P[::-1].copy())
