"""Chunked log-probabilities against a plain log-softmax over all logits."""

from __future__ import annotations

import pytest
import torch

from largest_tensor import LargestTensor
from vopd_client.linear_logprobs import Logits, full_logprobs, gather_masked, linear_logprobs

NUM_ROWS, NUM_IDS, HIDDEN, SUPPORT = 11, 13, 5, 4


def inputs(*, dtype=torch.float64, num_rows=NUM_ROWS, num_ids=NUM_IDS, with_bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(num_rows, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight_VH = torch.randn(NUM_IDS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    bias_V = torch.randn(NUM_IDS, generator=generator, dtype=dtype).requires_grad_() if with_bias else None
    sampled_N = torch.randint(num_ids, (num_rows,), generator=generator)
    ids_NK = torch.rand(num_rows, num_ids, generator=generator).argsort(-1)[:, :SUPPORT]
    mask_NK = torch.arange(SUPPORT) < torch.randint(SUPPORT + 1, (num_rows, 1), generator=generator)
    return hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK


def plain_logprobs(hidden_NH, weight_VH, bias_V, *, temperature=1.0, num_ids, scale=1.0, softcap=None, dropped_ids=()):
    logits_NV = hidden_NH @ weight_VH.T + (0 if bias_V is None else bias_V)
    logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    is_shared_V = torch.arange(NUM_IDS) < num_ids
    is_shared_V[list(dropped_ids)] = False
    return torch.log_softmax(torch.where(is_shared_V, logits_NV / temperature, -torch.inf), -1)


SETTINGS = [
    {"temperature": 1.0, "num_ids": NUM_IDS},
    {"temperature": 0.7, "num_ids": NUM_IDS},
    {"temperature": 1.0, "num_ids": 9},
    {"temperature": 1.3, "num_ids": 9, "scale": 0.25, "softcap": 3.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("chunk_rows", [1, 4, NUM_ROWS, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_a_plain_log_softmax(settings, chunk_rows, with_bias):
    hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK = inputs(num_ids=settings["num_ids"], with_bias=with_bias)
    leaves = [leaf for leaf in (hidden_NH, weight_VH, bias_V) if leaf is not None]
    ours = linear_logprobs(
        *(hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK, Logits(**settings)),
        chunk_elements=chunk_rows * settings["num_ids"],
    )
    plain_NV = plain_logprobs(hidden_NH, weight_VH, bias_V, **settings)
    plain_sampled_N = plain_NV.gather(-1, sampled_N[:, None])[:, 0]
    plain_support_NK = plain_NV.gather(-1, ids_NK) * mask_NK

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)

    close(ours.sampled_N, plain_sampled_N)
    close(ours.support_NK, plain_support_NK)
    close(ours.sum_pi_squared_N, plain_NV.exp().square().sum(-1).detach())
    assert not ours.sum_pi_squared_N.requires_grad

    weights_N, weights_NK = torch.randn_like(plain_sampled_N), torch.randn_like(plain_support_NK)
    our_loss = (ours.sampled_N * weights_N).sum() + (ours.support_NK * weights_NK).sum()
    plain_loss = (plain_sampled_N * weights_N).sum() + (plain_support_NK * weights_NK).sum()
    for actual, expected in zip(
        torch.autograd.grad(our_loss, leaves), torch.autograd.grad(plain_loss, leaves), strict=True
    ):
        close(actual, expected)


def test_gradients_agree_with_finite_differences():
    hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK = inputs(num_rows=3)

    def function(hidden_NH, weight_VH, bias_V):
        return linear_logprobs(
            *(hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK),
            Logits(9, temperature=1.3, scale=0.5, softcap=3.0),
            chunk_elements=2 * 9,
        )[:2]

    ids_NK, sampled_N = ids_NK % 9, sampled_N % 9
    assert torch.autograd.gradcheck(function, (hidden_NH, weight_VH, bias_V))


@pytest.mark.parametrize("settings", SETTINGS)
def test_full_logprobs_are_those_of_the_shared_ids(settings):
    hidden_NH, weight_VH, bias_V, *_ = inputs()
    expected_NV = plain_logprobs(hidden_NH, weight_VH, bias_V, **settings)[:, : settings["num_ids"]]
    torch.testing.assert_close(full_logprobs(hidden_NH, weight_VH, bias_V, Logits(**settings)), expected_NV)


def test_pad_columns_are_zero_without_gradient_whatever_id_they_hold():
    hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, _ = inputs()
    nothing_NK = torch.zeros_like(ids_NK, dtype=torch.bool)
    ids_NK = torch.full_like(ids_NK, 10**9)
    ours = linear_logprobs(hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, nothing_NK, Logits(NUM_IDS))
    assert torch.equal(ours.support_NK, torch.zeros_like(ours.support_NK))
    gradient_NH, gradient_VH = torch.autograd.grad(ours.support_NK.sum(), (hidden_NH, weight_VH))
    assert not gradient_NH.any()
    assert not gradient_VH.any()


def test_gather_masked_takes_no_gradient_from_an_infinite_value_behind_the_mask():
    values_NV = torch.tensor([[-torch.inf, -1.0, torch.nan]], requires_grad=True)
    gathered_NK = gather_masked(values_NV, torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, False]]))
    assert gathered_NK.tolist() == [[0.0, -1.0, 0.0]]
    gathered_NK.square().sum().backward()
    assert values_NV.grad.tolist() == [[0.0, -2.0, 0.0]]


@pytest.mark.parametrize("num_columns", [0, SUPPORT])
def test_no_rows_make_empty_results_that_backward_accepts(num_columns):
    hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK = inputs(num_rows=0)
    ours = linear_logprobs(
        *(hidden_NH, weight_VH, bias_V, sampled_N, ids_NK[:, :num_columns], mask_NK[:, :num_columns]),
        Logits(NUM_IDS),
    )
    assert [tuple(array.shape) for array in ours] == [(0,), (0, num_columns), (0,)]
    ours.sampled_N.sum().backward()
    assert not weight_VH.grad.any()


def test_more_shared_ids_than_the_head_has_rows_is_an_error():
    with pytest.raises(ValueError, match="num_ids 14 > 13 rows"):
        linear_logprobs(*inputs(), Logits(NUM_IDS + 1))


def test_float32_stays_within_its_rounding():
    logits = Logits(9, temperature=0.7)
    single = linear_logprobs(*inputs(dtype=torch.float32, num_ids=9), logits)
    hidden_NH, weight_VH, bias_V, *ids = inputs(dtype=torch.float32, num_ids=9)
    double = linear_logprobs(hidden_NH.double(), weight_VH.double(), bias_V.double(), *ids, logits)
    for actual, expected in zip(single, double, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_under_bfloat16_autocast_only_the_product_with_the_head_is_rounded():
    """The log-softmax of the bfloat16 logits is exact to float32; gradients of float32 leaves are float32."""
    hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(
            *(hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK, Logits(NUM_IDS)),
            chunk_elements=4 * NUM_IDS,
        )
        logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
        assert logits_NV.dtype == torch.bfloat16
    expected_NV = logits_NV.double().log_softmax(-1)
    assert ours.sampled_N.dtype == torch.float32
    expected_N = expected_NV.gather(-1, sampled_N[:, None])[:, 0]
    torch.testing.assert_close(ours.sampled_N.double(), expected_N, rtol=0, atol=1e-5)

    gradient_VH = torch.autograd.grad(ours.sampled_N.sum(), weight_VH)[0]
    exact_N = plain_logprobs(hidden_NH, weight_VH, bias_V, temperature=1.0, num_ids=NUM_IDS).gather(
        -1, sampled_N[:, None]
    )
    expected_VH = torch.autograd.grad(exact_N.sum(), weight_VH)[0]
    assert gradient_VH.dtype == torch.float32
    torch.testing.assert_close(gradient_VH, expected_VH, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("is_training", [True, False])
def test_logits_exist_for_one_chunk_of_rows_at_a_time_in_both_passes(is_training):
    num_rows, num_ids, chunk_rows = 64, 512, 8
    hidden_NH = torch.randn(num_rows, 4, requires_grad=True)
    weight_VH = torch.randn(num_ids, 4, requires_grad=True)
    ids_NK = torch.arange(3).repeat(num_rows, 1)
    with LargestTensor() as largest, torch.set_grad_enabled(is_training):
        ours = linear_logprobs(
            *(hidden_NH, weight_VH, None, ids_NK[:, 0], ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)),
            Logits(num_ids),
            chunk_elements=chunk_rows * num_ids,
        )
        if is_training:
            (ours.sampled_N.sum() + ours.support_NK.sum()).backward()
    assert largest.numel == chunk_rows * num_ids
    assert hidden_NH.grad is not None or not is_training


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_backward_pass():
    num_rows, num_ids = 64, 512
    hidden_NH = torch.randn(num_rows, 4, requires_grad=True)
    weight_VH = torch.randn(num_ids, 4, requires_grad=True)
    ids_NK = torch.arange(3).repeat(num_rows, 1)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_logprobs(
            *(hidden_NH, weight_VH, None, ids_NK[:, 0], ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)),
            Logits(num_ids),
            chunk_elements=8 * num_ids,
        )
    assert max(kept, default=0) <= weight_VH.numel()


def test_dropped_ids_leave_the_softmax():
    hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK = inputs()
    dropped = (2, 9)
    keep = lambda ids: torch.where((ids == 2) | (ids == 9), 0, ids)  # noqa: E731
    sampled_N, ids_NK = keep(sampled_N), keep(ids_NK)
    settings = {"temperature": 0.7, "num_ids": NUM_IDS, "dropped_ids": dropped}
    plain_NV = plain_logprobs(hidden_NH, weight_VH, bias_V, **settings)
    ours = linear_logprobs(hidden_NH, weight_VH, bias_V, sampled_N, ids_NK, mask_NK, Logits(**settings))
    torch.testing.assert_close(ours.sampled_N, plain_NV.gather(-1, sampled_N[:, None])[:, 0])
    torch.testing.assert_close(ours.support_NK, plain_NV.gather(-1, ids_NK) * mask_NK)
    torch.testing.assert_close(ours.sum_pi_squared_N, plain_NV.exp().square().sum(-1))
    torch.testing.assert_close(full_logprobs(hidden_NH, weight_VH, bias_V, Logits(**settings)), plain_NV)
    ours.sampled_N.sum().backward()
    assert hidden_NH.grad.isfinite().all()
