"""Student and teacher over the whole vocabulary, chunk by chunk, against two plain log-softmaxes held in full."""

from __future__ import annotations

import pytest
import torch

from enumeration import plain_moments
from largest_tensor import LargestTensor
from vopd_client.baselines import SupportLogprobs, inner_optimal_baseline
from vopd_client.linear_logprobs import Logits
from vopd_client.teacher_head import TeacherHead
from vopd_client.variance import Distributions, sampled_variance
from vopd_client.whole_vocabulary import RewardMoments, WholeVocabulary, whole_vocabulary

NUM_ROWS, NUM_IDS, HIDDEN, TEACHER_IDS, TEACHER_HIDDEN = 11, 13, 5, 17, 6

SETTINGS = [
    Logits(NUM_IDS),
    Logits(NUM_IDS, temperature=0.7),
    Logits(9),
    Logits(9, temperature=1.3, scale=0.25, softcap=3.0),
    Logits(NUM_IDS, temperature=0.9, dropped_ids=(2, 9)),
    Logits(NUM_IDS, softcap=2.0, dropped_ids=(2,)),
]


def inputs(dtype=torch.float64, *, num_rows=NUM_ROWS, with_bias=True):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    student = (randn(num_rows, HIDDEN), randn(NUM_IDS, HIDDEN), randn(NUM_IDS) if with_bias else None)
    teacher = TeacherHead(
        randn(TEACHER_IDS, TEACHER_HIDDEN), randn(TEACHER_IDS), Logits(TEACHER_IDS, temperature=0.8, scale=0.5)
    )
    sampled_N = torch.randint(2, (num_rows,), generator=generator)  # ids 0 and 1: never dropped
    return (
        tuple(None if leaf is None else leaf.requires_grad_() for leaf in student),
        sampled_N,
        teacher,
        randn(num_rows, TEACHER_HIDDEN),
    )


def ours(logits: Logits, *, chunk_rows: int = 3, want_kl_gradient=True, reward_floor=None, **choices) -> tuple:
    student, sampled_N, teacher, teacher_hidden_NH = inputs(**choices)
    whole = whole_vocabulary(
        *student,
        sampled_N,
        logits,
        teacher_hidden_NH,
        teacher,
        want_kl_gradient=want_kl_gradient,
        reward_floor=reward_floor,
        chunk_elements=chunk_rows * TEACHER_IDS,
    )
    return whole, [leaf for leaf in student if leaf is not None]


def plain(logits: Logits, *, reward_floor=None, **choices) -> tuple:
    student, sampled_N, teacher, teacher_hidden_NH = inputs(**choices)
    hidden_NH, weight_VH, bias_V = student
    weight_VH, bias_V = weight_VH[: logits.num_ids], 0 if bias_V is None else bias_V[: logits.num_ids]
    logits_NV = (hidden_NH @ weight_VH.T + bias_V) * logits.scale
    if logits.softcap is not None:
        logits_NV = logits.softcap * torch.tanh(logits_NV / logits.softcap)
    is_dropped_V = torch.tensor([token_id in logits.dropped_ids for token_id in range(logits.num_ids)])
    student_NV = torch.where(is_dropped_V, -torch.inf, logits_NV / logits.temperature).log_softmax(-1)
    teacher_logits_NV = (teacher_hidden_NH @ teacher.weight_VH.T + teacher.bias_V) * 0.5 / 0.8
    teacher_NV = teacher_logits_NV.log_softmax(-1)[:, : logits.num_ids].detach()
    has_mass_NV = student_NV.detach() > -torch.inf
    log_ratio_NV = torch.where(has_mass_NV, student_NV, 0.0) - torch.where(has_mass_NV, teacher_NV, 0.0)
    whole = WholeVocabulary(
        student_NV.gather(-1, sampled_N[:, None])[:, 0],
        (torch.where(has_mass_NV, student_NV, -torch.inf).exp() * log_ratio_NV).sum(),
        plain_moments(student_NV.detach(), teacher_NV, reward_floor),
    )
    return whole, [leaf for leaf in student if leaf is not None]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("logits", SETTINGS)
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("reward_floor", [None, -0.3])
def test_values_are_those_of_plain_log_softmaxes(logits, chunk_rows, reward_floor):
    actual, _ = ours(logits, chunk_rows=chunk_rows, reward_floor=reward_floor)
    expected, _ = plain(logits, reward_floor=reward_floor)
    assert_close(actual.sampled_N, expected.sampled_N)
    assert_close(actual.reverse_kl_sum, expected.reverse_kl_sum)
    for name, value_N in actual.moments._asdict().items():
        assert_close(value_N, getattr(expected.moments, name))
        assert not value_N.requires_grad


@pytest.mark.parametrize("logits", SETTINGS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("kl_weight", "sampled_weight"), [(1.0, 0.0), (0.0, 1.0), (0.37, -2.0)])
def test_gradients_are_those_of_plain_log_softmaxes(logits, with_bias, kl_weight, sampled_weight):
    def loss(whole: WholeVocabulary) -> torch.Tensor:
        per_row_N = torch.arange(1.0, NUM_ROWS + 1, dtype=torch.float64)
        terms = [kl_weight * whole.reverse_kl_sum] if kl_weight else []
        terms += [(sampled_weight * per_row_N * whole.sampled_N).sum()] if sampled_weight else []
        return sum(terms)

    (actual, leaves), (expected, plain_leaves) = ours(logits, with_bias=with_bias), plain(logits, with_bias=with_bias)
    for ours_grad, plain_grad in zip(
        torch.autograd.grad(loss(actual), leaves), torch.autograd.grad(loss(expected), plain_leaves), strict=True
    ):
        assert_close(ours_grad, plain_grad)


def test_a_divergence_without_its_gradient_has_none():
    whole, _ = ours(Logits(NUM_IDS), want_kl_gradient=False)
    assert not whole.reverse_kl_sum.requires_grad
    assert whole.sampled_N.requires_grad


def test_a_second_backward_pass_is_an_error_and_not_a_gradient_of_zero():
    whole, _ = ours(Logits(NUM_IDS))
    whole.reverse_kl_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone with its use"):
        whole.reverse_kl_sum.backward()


def test_no_rows_have_no_divergence_and_zero_gradients():
    whole, leaves = ours(Logits(NUM_IDS), num_rows=0)
    assert float(whole.reverse_kl_sum.detach()) == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(whole.reverse_kl_sum, leaves))


def test_float32_stays_within_its_rounding():
    single, _ = ours(Logits(9, temperature=0.7), dtype=torch.float32)
    double, _ = plain(Logits(9, temperature=0.7), dtype=torch.float32)
    for name, value_N in single.moments._asdict().items():
        assert value_N.dtype == torch.float32
        torch.testing.assert_close(value_N, getattr(double.moments, name), rtol=1e-4, atol=1e-5)


def test_under_bfloat16_autocast_the_students_product_is_rounded_and_the_teachers_is_not():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, leaves = ours(Logits(NUM_IDS), dtype=torch.float32)
    exact, exact_leaves = ours(Logits(NUM_IDS), dtype=torch.float32)
    difference = (rounded.sampled_N - exact.sampled_N).detach().abs().max()
    assert 1e-4 < float(difference) < 0.2
    for gradient, exact_gradient in zip(
        torch.autograd.grad(rounded.reverse_kl_sum, leaves),
        torch.autograd.grad(exact.reverse_kl_sum, exact_leaves),
        strict=True,
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, exact_gradient, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("want_kl_gradient", [True, False])
def test_distributions_exist_for_one_chunk_of_rows_at_a_time_in_both_passes(want_kl_gradient):
    num_rows, num_ids, chunk_rows = 64, 512, 8
    hidden_NH = torch.randn(num_rows, 4, requires_grad=True)
    weight_VH = torch.randn(num_ids, 4, requires_grad=True)
    teacher = TeacherHead(torch.randn(num_ids, 4), None, Logits(num_ids))
    with LargestTensor() as largest:
        whole = whole_vocabulary(
            *(hidden_NH, weight_VH, None, torch.zeros(num_rows, dtype=torch.long), Logits(num_ids)),
            *(torch.randn(num_rows, 4), teacher),
            want_kl_gradient=want_kl_gradient,
            chunk_elements=chunk_rows * num_ids,
        )
        (whole.sampled_N.sum() + (whole.reverse_kl_sum if want_kl_gradient else 0)).backward()
    assert largest.numel == chunk_rows * num_ids


# ---------------------------------------------------------------- what the moments tell


def two_distributions(num_rows: int = 5, num_ids: int = 23):
    generator = torch.Generator().manual_seed(3)
    logits_2NV = 2 * torch.randn(2, num_rows, num_ids, generator=generator, dtype=torch.float64)
    return tuple(logits_2NV.log_softmax(-1))


@pytest.mark.parametrize("reward_floor", [None, -0.5])
@pytest.mark.parametrize("baseline", [0.0, -0.7])
def test_moments_tell_the_variance_of_the_sampled_estimator(reward_floor, baseline):
    student_NV, teacher_NV = two_distributions()
    moments = plain_moments(student_NV, teacher_NV, reward_floor)
    floor = -torch.inf if reward_floor is None else reward_floor
    reward_NV = (teacher_NV - student_NV).clamp_min(floor)
    distributions = Distributions.from_logprobs(student_NV, student_NV + reward_NV)
    assert_close(moments.sampled_variance(baseline), sampled_variance(distributions, baseline))


def test_moments_tell_the_optimal_baseline():
    student_NV, teacher_NV = two_distributions()
    everything = SupportLogprobs(student_NV, teacher_NV, torch.ones_like(student_NV, dtype=torch.bool))
    moments = plain_moments(student_NV, teacher_NV, None)
    assert_close(moments.optimal_baseline, inner_optimal_baseline(everything, moments.sum_pi_squared))


def test_the_optimal_baseline_of_a_certain_student_is_its_mean_reward():
    """1 - sum pi^2 is then a rounding error, and what is divided by it another one."""
    almost_one = torch.tensor(1 - 2**-24)
    moments = RewardMoments(*(torch.tensor(value) for value in (0.3, 1.0, -0.3, 0.09, -0.3, 0.09)))
    moments = moments._replace(sum_pi_squared=almost_one)
    assert float(moments.optimal_baseline) == pytest.approx(-0.3)
