"""Cutting a distribution off, against transformers' own warpers and against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from vopd_client.rollouts.sampling import draw_by_inverse_cdf
from vopd_client.rollouts.truncation import truncate


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept_ids(logits_BV: Tensor) -> list[int]:
    return logits_BV[0].isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("top_k", [0, 1, 7, 20, 399, 400, 1000])
def test_the_same_ids_are_cut_off_as_by_the_warpers_of_transformers(scale: float, top_p: float, top_k: int) -> None:
    logits_BV = scale * torch.randn(32, 400, generator=torch.Generator().manual_seed(3))
    expected_BV = logits_BV
    if top_k:
        expected_BV = TopKLogitsWarper(top_k)(None, expected_BV)
    expected_BV = TopPLogitsWarper(top_p)(None, expected_BV)
    assert torch.equal(truncate(logits_BV, top_k=top_k, top_p=top_p), expected_BV)


@pytest.mark.parametrize(
    ("top_p", "expected_ids"),
    [
        (0.4, [2]),
        (0.5, [2]),  # the id that reaches it is in, and it is the last
        (0.51, [0, 2]),
        (0.75, [0, 2]),
        (0.76, [0, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_a_nucleus_ends_with_the_id_that_reaches_its_probability(top_p: float, expected_ids: list[int]) -> None:
    assert kept_ids(truncate(logits_of(0.25, 0.0625, 0.5, 0.1875), top_k=0, top_p=top_p)) == expected_ids


def test_the_nucleus_is_one_of_what_top_k_leaves() -> None:
    # Of 0.4, 0.3, 0.2, 0.1 the top two are 4/7 and 3/7 of what is left: the first alone reaches 0.55.
    logits_BV = logits_of(0.4, 0.3, 0.2, 0.1)
    assert kept_ids(truncate(logits_BV, top_k=2, top_p=0.55)) == [0]
    assert kept_ids(truncate(logits_BV, top_k=0, top_p=0.55)) == [0, 1]


def test_one_and_zero_cut_nothing_where_rounding_already_reaches_one() -> None:
    logits_BV = torch.tensor([[50.0, 0.0, -50.0]])
    assert torch.equal(truncate(logits_BV, top_k=0, top_p=1.0), logits_BV)


def test_of_equal_logits_at_the_edge_of_the_nucleus_lower_ids_go_first() -> None:
    assert kept_ids(truncate(torch.zeros(1, 8), top_k=0, top_p=0.5)) == [0, 1, 2, 3]


def test_what_is_cut_off_is_never_drawn_and_the_rest_keeps_its_proportions() -> None:
    logits_BV = truncate(logits_of(0.2, 0.1, 0.4, 0.3), top_k=2, top_p=1.0)
    # The ids 2 and 3 share [0, 1) as 4 to 3; uniform numbers on both sides of 4/7, and the extremes.
    uniforms_B = torch.tensor([0.0, 4 / 7 - 1e-4, 4 / 7 + 1e-4, 1 - 2**-53], dtype=torch.float64)
    draw = draw_by_inverse_cdf(logits_BV.expand(4, -1), uniforms_B)
    assert draw.ids_B.tolist() == [2, 2, 3, 3]
    torch.testing.assert_close(draw.logprobs_B[0].item(), math.log(4 / 7), atol=1e-6, rtol=0)
