"""Supports, positions and completed distributions of `vopd-client variance`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from enumeration import random_state
from vopd_client.baselines import SupportLogprobs, bucket_reverse_kl
from vopd_client.variance_measure import Block, choose_positions, completed_teacher, numbers_of_block, support_of
from vopd_client.variance_report import SupportRule

NUM_IDS = 40


def two_distributions(num_positions: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    states = [random_state(seed, 0, num_ids=NUM_IDS) for seed in range(num_positions)]
    student_NV = torch.stack([state.student_logits_V for state in states]).log_softmax(-1)
    return student_NV, torch.stack([state.teacher_logprobs_V for state in states])


# ---------------------------------------------------------------- completed distributions


def test_a_completed_teacher_is_a_distribution_that_agrees_on_the_support():
    student_NV, teacher_NV = two_distributions()
    ids_NK = teacher_NV.topk(6).indices
    mask_NK = torch.arange(6) < torch.tensor([[6], [2], [0]])
    completed_NV, (student_out_N, teacher_out_N) = completed_teacher(
        student_NV, ids_NK, teacher_NV.gather(-1, ids_NK).float(), mask_NK
    )
    torch.testing.assert_close(completed_NV.exp().sum(-1), torch.ones(3).double(), rtol=0, atol=1e-6)
    for row, size in enumerate((6, 2, 0)):
        ids = ids_NK[row, :size]
        torch.testing.assert_close(completed_NV[row, ids], teacher_NV[row, ids], rtol=0, atol=1e-6)
        outside = torch.ones(NUM_IDS, dtype=torch.bool)
        outside[ids] = False
        ratio = (completed_NV - student_NV)[row, outside]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert float(student_out_N[row]) == pytest.approx(float(student_NV[row, outside].exp().sum()))
        assert float(teacher_out_N[row]) == pytest.approx(float(teacher_NV[row, outside].exp().sum()), abs=1e-6)


def test_the_kl_to_a_completed_teacher_is_the_buckets():
    student_NV, teacher_NV = two_distributions()
    ids_NK = student_NV.topk(6).indices
    mask_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    teacher_NK = teacher_NV.gather(-1, ids_NK)
    completed_NV, _ = completed_teacher(student_NV, ids_NK, teacher_NK, mask_NK)
    expected_N = bucket_reverse_kl(SupportLogprobs(student_NV.gather(-1, ids_NK), teacher_NK, mask_NK))
    torch.testing.assert_close((student_NV.exp() * (student_NV - completed_NV)).sum(-1), expected_N)


def test_with_nearly_all_mass_inside_rounding_does_not_become_a_log_ratio():
    """float32 log-probabilities of a teacher whose mass on S rounds to just above 1."""
    student_NV = torch.tensor([[30.0, 29.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    ids_NK, mask_NK = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    teacher_NK = (student_NV[:, :2] + 2e-7).float()
    completed_NV, _ = completed_teacher(student_NV, ids_NK, teacher_NK, mask_NK)
    assert abs(float((completed_NV - student_NV)[0, 2])) < 1e-6


# ---------------------------------------------------------------- supports


def test_supports_are_the_owners_most_likely_ids_cut_at_the_mass():
    logprobs_NV = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).log()
    logprobs_NV = logprobs_NV[:, [2, 0, 3, 1]]
    top = logprobs_NV.topk(4)
    for rule, sizes in {
        SupportRule("student", 3): (3, 3),
        SupportRule("student", 4, 0.8): (2, 1),
        SupportRule("student", 4, 0.81): (3, 1),
        SupportRule("student", 2, 0.99): (2, 2),
    }.items():
        ids_NK, mask_NK = support_of(rule, top.values, top.indices)
        assert mask_NK.sum(-1).tolist() == list(sizes)
        assert ids_NK[0][mask_NK[0]].tolist() == [1, 3, 0, 2][: sizes[0]]


def test_numbers_of_a_block_are_those_of_its_distributions():
    student_NV, teacher_NV = two_distributions()
    rules = [SupportRule("student", 4), SupportRule("teacher", 4), SupportRule("student", 6, 0.4)]
    numbers = numbers_of_block(Block(torch.tensor([2, 2, 5]), student_NV, teacher_NV, None), rules)
    pi_NV = student_NV.exp()
    np.testing.assert_allclose(numbers.kl_n, (pi_NV * (student_NV - teacher_NV)).sum(-1), rtol=1e-9)
    assert numbers.sequence_n.tolist() == [2, 2, 5]
    for rule, logprobs_NV in ((rules[0], student_NV), (rules[1], teacher_NV)):
        ids_NK = logprobs_NV.topk(4).indices
        np.testing.assert_allclose(numbers.supports[rule].left_out_n, 1 - pi_NV.gather(-1, ids_NK).sum(-1), rtol=1e-9)
        assert numbers.supports[rule].largest_id_n.tolist() == ids_NK.amax(-1).tolist()
    cut = numbers.supports[rules[2]]
    assert cut.num_ids_n.max() < 6  # so each of them reaches its mass
    assert cut.left_out_n.max() <= 0.6


def test_an_id_that_the_student_never_gives_is_in_no_support():
    """An end token that is dropped; the teacher likes it best."""
    student_NV, teacher_NV = two_distributions(1)
    student_NV[0, 7] = -torch.inf
    student_NV = student_NV.log_softmax(-1)
    teacher_NV[0, 7] = 3.0
    teacher_NV = teacher_NV.log_softmax(-1)
    rule = SupportRule("teacher", 4)
    numbers = numbers_of_block(Block(torch.tensor([0]), student_NV, teacher_NV, None), [rule])
    assert numbers.supports[rule].num_ids_n.tolist() == [3]
    assert all(np.isfinite(value_n).all() for value_n in numbers.supports[rule].variances_n.values())


# ---------------------------------------------------------------- positions


def test_positions_are_all_or_as_many_as_were_asked_for():
    assert [rows.tolist() for rows in choose_positions([2, 0, 1], 3, 0)] == [[True, True], [], [True]]
    chosen = choose_positions([50, 70, 80], 60, 0)
    assert [len(rows) for rows in chosen] == [50, 70, 80]
    assert sum(rows.sum() for rows in chosen) == 60
    assert [rows.tolist() for rows in choose_positions([50, 70, 80], 60, 0)] == [rows.tolist() for rows in chosen]


def test_every_position_has_the_same_chance():
    """2,000 draws of 5 of 20: each position's count is 500 ± 19, and stays within 5 of these in all but 1 of 10^5."""
    counts = np.zeros(20)
    for seed in range(2000):
        counts += np.concatenate(choose_positions([3, 17], 5, seed))
    assert np.abs(counts - 500).max() < 5 * 19.4
