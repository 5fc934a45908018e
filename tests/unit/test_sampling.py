"""Draws and supports, on logits made up for the purpose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.sampling import draw_by_inverse_cdf, row_uniforms, sampling_logits
from vopd_client.rollouts.support import adaptive_support, largest

KEY = RolloutKey(step=3, prompt_index=5, rollout_index=1)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def support_of(logits_BV: Tensor, *, top_k: int, support_mass: float) -> list[list[int]]:
    support = adaptive_support(logits_BV, logits_BV.logsumexp(dim=-1), top_k=top_k, support_mass=support_mass)
    return [ids[:count].tolist() for ids, count in zip(support.ids_BK, support.counts_B.tolist(), strict=True)]


def test_uniforms_of_a_longer_rollout_begin_like_those_of_a_shorter_one() -> None:
    np.testing.assert_array_equal(row_uniforms(7, KEY, 100)[:13], row_uniforms(7, KEY, 13))


@pytest.mark.parametrize(
    ("seed", "key"),
    [
        (8, KEY),
        (7, RolloutKey(4, 5, 1)),
        (7, RolloutKey(3, 6, 1)),
        (7, RolloutKey(3, 5, 2)),
        (7, RolloutKey(5, 3, 1)),
        (3, RolloutKey(7, 5, 1)),
    ],
)
def test_uniforms_differ_with_every_part_of_the_key(seed: int, key: RolloutKey) -> None:
    ours, other = row_uniforms(7, KEY, 50), row_uniforms(seed, key, 50)
    assert not np.isin(ours, other).any()


def test_uniforms_of_neighbouring_rollouts_are_uncorrelated() -> None:
    # 40,000 pairs: the correlation's standard error is 0.005, so 0.03 fails by chance for two seeds in 10**9.
    rows = np.stack([row_uniforms(0, RolloutKey(0, 0, rollout), 40_000) for rollout in range(2)])
    assert abs(np.corrcoef(rows)[0, 1]) < 0.03
    assert abs(rows.mean() - 0.5) < 0.01


@pytest.mark.parametrize("num_ids", [1, 2, 255, 256, 257, 1000])
def test_a_draw_is_the_first_id_whose_cumulative_probability_exceeds_the_uniform(num_ids: int) -> None:
    generator = torch.Generator().manual_seed(num_ids)
    logits_V = 3 * torch.randn(num_ids, generator=generator)
    uniforms_B = torch.rand(500, generator=generator, dtype=torch.float64)
    cumulative_V = logits_V.double().softmax(dim=-1).cumsum(dim=-1)
    expected_B = torch.searchsorted(cumulative_V, uniforms_B, right=True)
    # float32 weights place an edge of the cumulative sum only to about 1e-7.
    clear_B = (cumulative_V[:, None] - uniforms_B).abs().amin(dim=0) > 1e-6

    draw = draw_by_inverse_cdf(logits_V.expand(500, -1), uniforms_B)

    assert clear_B.float().mean() > 0.9
    torch.testing.assert_close(draw.ids_B[clear_B], expected_B[clear_B])


def test_a_draw_reports_the_log_softmax_of_the_id_it_drew() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = 4 * torch.randn(20, 700, generator=generator)
    draw = draw_by_inverse_cdf(logits_BV, torch.rand(20, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(draw.log_normaliser_B, logits_BV.logsumexp(dim=-1))
    expected_B = logits_BV.log_softmax(dim=-1).gather(1, draw.ids_B[:, None]).squeeze(1)
    torch.testing.assert_close(draw.logprobs_B, expected_B)


@pytest.mark.parametrize("num_ids", [300, 512])
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53, 1.0])  # float32 rounds the second to the third
def test_the_extreme_uniforms_draw_no_id_of_probability_zero(num_ids: int, uniform: float) -> None:
    logits_V = torch.full((num_ids,), -math.inf)
    logits_V[[10, 40, 270]] = torch.tensor([0.3, -20.0, 0.1])
    draw = draw_by_inverse_cdf(logits_V[None], torch.tensor([uniform], dtype=torch.float64))
    assert draw.ids_B.item() == (10 if uniform == 0.0 else 270)
    assert math.isfinite(draw.logprobs_B.item())


def test_draw_frequencies_match_the_softmax() -> None:
    # One chi-square test at a false-failure probability of 1e-6, over the choice of the fixed seed.
    num_draws = 50_000
    logits_V = 1.5 * torch.randn(600, generator=torch.Generator().manual_seed(1))
    uniforms_B = torch.from_numpy(row_uniforms(0, KEY, num_draws))
    counts_V = torch.zeros(600, dtype=torch.float64)
    for chunk_B in uniforms_B.split(1000):
        ids_B = draw_by_inverse_cdf(logits_V.expand(len(chunk_B), -1), chunk_B).ids_B
        counts_V += torch.bincount(ids_B, minlength=600)
    expected_V = num_draws * logits_V.double().softmax(dim=-1)
    frequent_V = expected_V >= 5
    counts = torch.cat([counts_V[frequent_V], counts_V[~frequent_V].sum()[None]])
    expected = torch.cat([expected_V[frequent_V], expected_V[~frequent_V].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(degrees, chi_square / 2).item() > 1e-6


def test_a_row_of_nan_is_told_by_its_normaliser_and_leaves_the_others_alone() -> None:
    logits_BV = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    uniforms_B = torch.tensor([0.4, 0.4], dtype=torch.float64)
    alone = draw_by_inverse_cdf(logits_BV[:1], uniforms_B[:1])
    logits_BV[1, 7] = math.nan
    both = draw_by_inverse_cdf(logits_BV, uniforms_B)
    assert both.log_normaliser_B[1].isnan()
    assert both.logprobs_B[1].isnan()
    assert both.ids_B[0] == alone.ids_B[0]
    assert both.logprobs_B[0] == alone.logprobs_B[0]


def test_sampling_logits_leave_out_the_other_ids_and_divide_by_the_temperature() -> None:
    logits_BV = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    shared_BV = sampling_logits(logits_BV, num_shared_ids=2, temperature=0.5)
    assert shared_BV.dtype == torch.float32
    assert shared_BV.tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize(
    ("support_mass", "expected_ids"),
    [
        (0.3, [2]),
        (0.5, [2]),  # the id that reaches the mass is included, and it is the last
        (0.51, [2, 0]),
        (0.74, [2, 0]),
        (0.8, [2, 0, 3]),
        (0.99, [2, 0, 3, 1]),
        (1.0, [2, 0, 3, 1]),
    ],
)
def test_a_support_ends_with_the_id_that_reaches_the_mass(support_mass: float, expected_ids: list[int]) -> None:
    logits_BV = logits_of(0.25, 0.0625, 0.5, 0.1875)
    assert support_of(logits_BV, top_k=4, support_mass=support_mass) == [expected_ids]


def test_a_support_holds_no_more_than_top_k_ids_and_reports_its_mass() -> None:
    logits_BV = logits_of(0.25, 0.125, 0.5, 0.125)
    support = adaptive_support(logits_BV, logits_BV.logsumexp(dim=-1), top_k=2, support_mass=0.9999)
    assert support.ids_BK[0, : support.counts_B[0]].tolist() == [2, 0]
    assert support.mass_B.item() == pytest.approx(0.75)


def test_each_row_has_a_support_of_its_own_size() -> None:
    logits_BV = torch.cat([logits_of(0.98, 0.01, 0.01), logits_of(0.3, 0.3001, 0.3999)])
    assert support_of(logits_BV, top_k=3, support_mass=0.9) == [[0], [2, 1, 0]]


def test_a_mass_of_one_keeps_top_k_ids_where_rounding_already_reaches_one() -> None:
    logits_BV = torch.tensor([[50.0, 0.0, -1.0, -2.0]])
    assert support_of(logits_BV, top_k=3, support_mass=1.0) == [[0, 1, 2]]
    assert support_of(logits_BV, top_k=3, support_mass=0.9999) == [[0]]


def test_ids_of_probability_zero_are_in_no_support() -> None:
    assert support_of(logits_of(0.5, 0.0, 0.5, 0.0), top_k=4, support_mass=1.0) == [[0, 2]]


def test_a_support_larger_than_the_vocabulary_is_the_vocabulary() -> None:
    assert support_of(logits_of(0.25, 0.75), top_k=100, support_mass=1.0) == [[1, 0]]


@pytest.mark.parametrize("support_mass", [0.5, 0.95, 0.9999])
def test_supports_are_the_shortest_prefix_of_the_sorted_ids_that_reaches_the_mass(
    support_mass: float,
) -> None:
    logits_BV = 5 * torch.randn(64, 500, generator=torch.Generator().manual_seed(2))
    actual = support_of(logits_BV, top_k=20, support_mass=support_mass)
    for logits_V, ids in zip(logits_BV, actual, strict=True):
        probabilities, order = logits_V.double().softmax(dim=-1).sort(descending=True)
        assert ids == order[: len(ids)].tolist()
        assert len(ids) == 20 or probabilities[: len(ids)].sum() >= support_mass - 1e-6
        assert len(ids) == 1 or probabilities[: len(ids) - 1].sum() < support_mass + 1e-6


@pytest.mark.parametrize("num_ids", [6400, 6417])  # whole blocks, and a last one that is not
@pytest.mark.parametrize("k", [1, 7, 100])
def test_the_largest_logits_of_blocks_are_the_largest_of_all(num_ids: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    logits_BV = torch.stack([torch.randperm(num_ids, generator=generator).float() for _ in range(8)])
    values_Bk, ids_Bk = largest(logits_BV, k)
    expected = logits_BV.topk(k, dim=-1)
    assert torch.equal(values_Bk, expected.values)
    assert torch.equal(ids_Bk, expected.indices)


def test_the_largest_of_logits_with_many_equal_ones_are_right_and_distinct() -> None:
    """As bf16 leaves them: a handful of values, and ties at the edge in every row."""
    logits_BV = torch.randint(0, 40, (16, 6417), generator=torch.Generator().manual_seed(0)).float()
    values_Bk, ids_Bk = largest(logits_BV, 100)
    assert torch.equal(values_Bk, logits_BV.topk(100, dim=-1).values)
    assert torch.equal(logits_BV.gather(1, ids_Bk), values_Bk)
    assert all(len(set(ids.tolist())) == 100 for ids in ids_Bk)


def test_a_row_with_few_probable_ids_has_no_id_beyond_the_vocabulary() -> None:
    logits_BV = torch.full((1, 6417), -torch.inf)
    logits_BV[0, [3, 6416]] = torch.tensor([1.0, 2.0])
    values_Bk, ids_Bk = largest(logits_BV, 50)
    assert ids_Bk[0, :2].tolist() == [6416, 3]
    assert ids_Bk.max() < 6417
    assert values_Bk[0, 2:].isneginf().all()
