"""The variance that a run reports of itself, against enumeration of what each sampled token would have given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from enumeration import batch_of_every_token, expectation, gradient_of_every_token, random_state, variance
from vopd_client.losses import compute_loss
from vopd_client.shaping import NO_SHAPING, Shaping

SEEDS = (0, 1, 2)


def reported(objective, state, name="variance", **choices) -> torch.Tensor:
    """What is reported when y was sampled, [Y, 1], for every y."""
    student, batch, _ = batch_of_every_token(
        state, objective=objective, reward_floor=choices.get("shaping", NO_SHAPING).reward_floor
    )
    values = []
    for row in range(len(state.sampled_ids)):
        only_BT = torch.zeros_like(batch.loss_mask_BT)
        only_BT[row] = True
        output = compute_loss(objective, student, replace(batch, loss_mask_BT=only_BT), **choices)
        values.append(output.sums[name])
    return torch.stack(values)[:, None]


@pytest.mark.parametrize(
    ("objective", "tail", "baseline"),
    [
        ("vopd", "renormalise", "kl"),
        ("vopd", "bucket", "kl"),
        ("vopd", "bucket", "optimal"),
        ("vopd-rb", "bucket", "optimal"),
        ("vopd-rb", "bucket", "kl"),
        ("vopd-rb", "bucket", "none"),
    ],
)
@pytest.mark.parametrize("shaping", [NO_SHAPING, Shaping(reward_floor=-0.8, advantage_clip=0.9)])
def test_with_one_id_outside_the_support_the_mean_is_the_variance_itself(objective, tail, baseline, shaping):
    """The tail is then no approximation, so the report is exact in expectation; 40 ids, so that a tail is small."""
    for seed in SEEDS:
        state = random_state(seed, 39, num_ids=40)
        choices = {"tail": tail, "baseline": baseline, "shaping": shaping}
        expected = variance(state, gradient_of_every_token(objective, state, **choices))
        actual = expectation(state, reported(objective, state, **choices))
        torch.testing.assert_close(actual[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["vopd", "vopd-rb"])
@pytest.mark.parametrize("support_size", [1, 4, 16])
def test_with_a_wide_tail_only_the_square_of_its_mean_is_approximated(objective, support_size):
    """Within 5 % of the variance here, with logits as spread over 200 ids as no language model's."""
    for seed in SEEDS:
        state = random_state(seed, support_size, num_ids=200)
        expected = variance(state, gradient_of_every_token(objective, state, tail="bucket"))
        actual = expectation(state, reported(objective, state, tail="bucket"))
        torch.testing.assert_close(actual[0], expected, rtol=0.05, atol=0)


def test_opds_own_report_is_its_second_moment():
    state = random_state(0, 0)
    gradient_YV = gradient_of_every_token("opd", state)
    second_moment = expectation(state, gradient_YV.square()).sum()
    torch.testing.assert_close(expectation(state, reported("opd", state))[0], second_moment)
    torch.testing.assert_close(expectation(state, reported("opd", state, "opd_variance"))[0], second_moment)


@pytest.mark.parametrize("objective", ["vopd", "vopd-rb", "vopd-full", "topk-kl", "full-kl"])
def test_every_objective_reports_what_opd_would_have_had_at_the_same_states(objective):
    state = random_state(1, 39, num_ids=40)
    expected = variance(state, gradient_of_every_token("opd", state))
    actual = expectation(state, reported(objective, state, "opd_variance"))
    torch.testing.assert_close(actual[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", ["kl", "optimal", "none"])
def test_over_the_whole_vocabulary_every_report_is_the_variance(baseline):
    state = random_state(2, 0, num_ids=40)
    expected = variance(state, gradient_of_every_token("vopd-full", state, baseline=baseline))
    actual_Y1 = reported("vopd-full", state, baseline=baseline)
    torch.testing.assert_close(actual_Y1, expected.expand_as(actual_Y1))


@pytest.mark.parametrize("objective", ["topk-kl", "full-kl"])
def test_what_is_differentiated_has_no_variance_given_the_state(objective):
    assert not reported(objective, random_state(0, 3)).any()


def test_vopd_rb_with_the_whole_vocabulary_in_its_support_has_none():
    actual_Y1 = reported("vopd-rb", random_state(0, 7))
    torch.testing.assert_close(actual_Y1, torch.zeros_like(actual_Y1), rtol=0, atol=1e-12)
