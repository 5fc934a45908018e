"""Over a tiny vocabulary every sampled token can be tried: which estimators are unbiased is a matter of arithmetic."""

from __future__ import annotations

import pytest
import torch

from enumeration import (
    EVERY_SAMPLED_ESTIMATOR,
    State,
    exact_gradient,
    expectation,
    gradient_of_every_token,
    random_state,
    variance,
)

NUM_IDS = 7
SEEDS = (0, 1, 2)
SUPPORT_SIZES = range(NUM_IDS + 1)


def assert_unbiased(state: State, gradient_YV: torch.Tensor) -> None:
    torch.testing.assert_close(expectation(state, gradient_YV), exact_gradient(state), rtol=0, atol=1e-6)


def bias(state: State, gradient_YV: torch.Tensor) -> float:
    return float((expectation(state, gradient_YV) - exact_gradient(state)).abs().max())


@pytest.mark.parametrize(("objective", "tail", "baseline"), EVERY_SAMPLED_ESTIMATOR)
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_sampled_estimator_is_unbiased_for_every_support(objective, tail, baseline, owner):
    for seed in SEEDS:
        for support_size in SUPPORT_SIZES:
            state = random_state(seed, support_size, num_ids=NUM_IDS, owner=owner)
            assert_unbiased(state, gradient_of_every_token(objective, state, tail=tail, baseline=baseline))


@pytest.mark.parametrize(("objective", "tail", "baseline"), EVERY_SAMPLED_ESTIMATOR)
def test_a_sampled_estimator_is_unbiased_with_a_support_cut_by_mass(objective, tail, baseline):
    for seed in SEEDS:
        whole = random_state(seed, NUM_IDS, num_ids=NUM_IDS)
        ranked = whole.pi_V.argsort(descending=True)
        size = int((whole.pi_V[ranked].cumsum(0) < 0.8).sum()) + 1
        state = State(whole.student_logits_V, whole.teacher_logprobs_V, tuple(ranked[:size].tolist()))
        assert 1 <= size < NUM_IDS
        assert_unbiased(state, gradient_of_every_token(objective, state, tail=tail, baseline=baseline))


@pytest.mark.parametrize(("objective", "tail", "baseline"), EVERY_SAMPLED_ESTIMATOR)
def test_a_sampled_estimator_is_unbiased_when_an_id_exists_on_one_side_only(objective, tail, baseline):
    """Id 6 is the student's alone and masked from pi; ids 7 and 8 are the teacher's alone: q sums to less than 1."""
    for seed in SEEDS:
        both = random_state(seed, 9, num_ids=9)
        shared = torch.arange(9) < 6
        logits_V = torch.where(shared, both.student_logits_V, -torch.inf)
        teacher_V = torch.where(torch.arange(9) == 6, -torch.inf, both.teacher_logprobs_V)
        support = tuple(token_id for token_id in both.support_ids if token_id < 6)[:3]
        state = State(logits_V, teacher_V, support)
        assert state.sampled_ids == [0, 1, 2, 3, 4, 5]
        assert_unbiased(state, gradient_of_every_token(objective, state, tail=tail, baseline=baseline))


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_topk_kl_is_biased_until_the_support_is_the_whole_vocabulary(tail):
    for seed in SEEDS:
        for support_size in range(1, NUM_IDS - 1):
            state = random_state(seed, support_size, num_ids=NUM_IDS)
            assert bias(state, gradient_of_every_token("topk-kl", state, tail=tail)) > 1e-3
        state = random_state(seed, NUM_IDS, num_ids=NUM_IDS)
        assert_unbiased(state, gradient_of_every_token("topk-kl", state, tail=tail))


@pytest.mark.parametrize("objective", ["full-kl", "vopd-rb"])
def test_the_exact_gradient_whatever_was_sampled_when_the_support_is_the_whole_vocabulary(objective):
    for seed in SEEDS:
        state = random_state(seed, NUM_IDS, num_ids=NUM_IDS)
        gradient_YV = gradient_of_every_token(objective, state)
        torch.testing.assert_close(gradient_YV, exact_gradient(state).expand_as(gradient_YV), rtol=0, atol=1e-12)
        assert float(variance(state, gradient_YV)) < 1e-24


def test_vopd_rb_without_a_support_is_the_sampled_estimator():
    state = random_state(0, 0)
    torch.testing.assert_close(
        gradient_of_every_token("vopd-rb", state, baseline="none"), gradient_of_every_token("opd", state)
    )


@pytest.mark.parametrize(("objective", "tail"), [("vopd", "renormalise"), ("vopd", "bucket"), ("vopd-rb", "bucket")])
def test_a_support_that_always_holds_the_sampled_token_makes_the_estimator_biased(objective, tail):
    """The trap: adding y to S. The same state without it is unbiased (tests above)."""
    for seed in SEEDS:
        state = random_state(seed, 2, num_ids=NUM_IDS)

        def with_sampled(token_id: int, support: tuple[int, ...] = state.support_ids) -> tuple[int, ...]:
            return support if token_id in support else (*support, token_id)

        gradient_YV = gradient_of_every_token(objective, state, tail=tail, baseline="kl", support_of=with_sampled)
        assert bias(state, gradient_YV) > 1e-3
