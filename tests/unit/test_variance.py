"""The closed forms against enumeration: every token sampled once through the real losses, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from enumeration import exact_gradient, gradient_of_every_token, random_state, variance
from vopd_client.errors import NonFiniteError
from vopd_client.variance import (
    Distributions,
    estimator_variances,
    moments_outside,
    sampled_variance,
    squared_gradient_norm,
)

NUM_IDS = 7
LOSS_OF_ESTIMATOR = {
    "opd": ("opd", "renormalise", "none"),
    "vopd-full kl": ("vopd-full", "renormalise", "kl"),
    "vopd-full optimal": ("vopd-full", "renormalise", "optimal"),
    "vopd renormalise": ("vopd", "renormalise", "kl"),
    "vopd bucket": ("vopd", "bucket", "kl"),
    "vopd optimal": ("vopd", "bucket", "optimal"),
    "vopd-rb none": ("vopd-rb", "bucket", "none"),
    "vopd-rb renormalise": ("vopd-rb", "renormalise", "kl"),
    "vopd-rb bucket": ("vopd-rb", "bucket", "kl"),
    "vopd-rb optimal": ("vopd-rb", "bucket", "optimal"),
}


def distributions_of(state) -> Distributions:
    return Distributions.from_logprobs(state.student_logits_V.log_softmax(-1)[None], state.teacher_logprobs_V[None])


def closed_forms(state) -> dict[str, torch.Tensor]:
    ids_NK = torch.tensor(state.support_ids).long()[None]
    student_NV = state.student_logits_V.log_softmax(-1)[None]
    return estimator_variances(
        student_NV, state.teacher_logprobs_V[None], ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)
    )


@pytest.mark.parametrize("estimator", LOSS_OF_ESTIMATOR)
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_the_closed_form_is_the_variance_of_the_loss_gradient(estimator, owner):
    objective, tail, baseline = LOSS_OF_ESTIMATOR[estimator]
    for seed in (0, 1, 2):
        for support_size in range(NUM_IDS + 1):
            state = random_state(seed, support_size, num_ids=NUM_IDS, owner=owner)
            gradient_YV = gradient_of_every_token(objective, state, tail=tail, baseline=baseline)
            enumerated = float(variance(state, gradient_YV))
            assert float(closed_forms(state)[estimator]) == pytest.approx(enumerated, rel=1e-9, abs=1e-9)


def test_every_estimator_but_those_with_knowledge_of_the_tail_is_compared_with_a_loss():
    """ "tail" and "best" are no training objectives: r_tail is dominated by b*, and b_rb cannot be known."""
    assert set(closed_forms(random_state(0, 2))) - set(LOSS_OF_ESTIMATOR) == {"vopd-rb tail", "vopd-rb best"}


def test_no_scalar_baseline_beats_the_optimal_one_over_the_whole_vocabulary():
    for seed in (0, 1, 2):
        state = random_state(seed, NUM_IDS, num_ids=NUM_IDS)
        best = float(closed_forms(state)["vopd-full optimal"])
        for baseline in torch.linspace(-6, 6, 241).tolist():
            assert float(sampled_variance(distributions_of(state), baseline)) >= best - 1e-12
    assert best > 0


def test_the_optimal_baseline_over_the_whole_vocabulary_beats_the_kl_baseline():
    for seed in (0, 1, 2):
        forms = closed_forms(random_state(seed, NUM_IDS))
        assert float(forms["vopd optimal"]) == pytest.approx(float(forms["vopd-full optimal"]), rel=1e-9)
        assert float(forms["vopd-full optimal"]) < float(forms["vopd-full kl"])


def test_no_scalar_baseline_beats_the_best_one_of_rb():
    for seed in (0, 1, 2):
        for support_size in range(NUM_IDS - 1):
            state = random_state(seed, support_size, num_ids=NUM_IDS)
            distributions = distributions_of(state)
            ids_NK = torch.tensor(state.support_ids).long()[None]
            outside = moments_outside(distributions, ids_NK, torch.ones_like(ids_NK, dtype=torch.bool))
            best_N = outside.best_baseline()
            least = float(outside.variance(best_N))
            assert float(closed_forms(state)["vopd-rb best"]) == pytest.approx(least, rel=1e-12)
            for step in (-1e-3, 1e-3, -1.0, 1.0):
                assert float(outside.variance(best_N + step)) > least


def test_rb_over_the_whole_vocabulary_has_no_variance_at_all():
    forms = closed_forms(random_state(0, NUM_IDS))
    assert {name: float(value) for name, value in forms.items() if name.startswith("vopd-rb")} == {
        f"vopd-rb {name}": 0.0 for name in ("none", "renormalise", "bucket", "optimal", "tail", "best")
    }


def test_positions_are_independent_of_each_other():
    states = [random_state(seed, 3) for seed in (0, 1, 2)]
    together = estimator_variances(
        torch.stack([state.student_logits_V for state in states]).log_softmax(-1),
        torch.stack([state.teacher_logprobs_V for state in states]),
        torch.tensor([state.support_ids for state in states]),
        torch.ones(3, 3, dtype=torch.bool),
    )
    for row, state in enumerate(states):
        for name, value_N in closed_forms(state).items():
            torch.testing.assert_close(together[name][row : row + 1], value_N)


def test_the_signal_is_the_squared_norm_of_the_exact_gradient():
    state = random_state(0, 0)
    expected = exact_gradient(state).square().sum()
    torch.testing.assert_close(squared_gradient_norm(distributions_of(state))[0], expected)


def test_pad_columns_belong_to_no_support():
    """They hold id 0 and ids that are in the support or not, and make no difference."""
    state = random_state(0, 0)
    student_NV = state.student_logits_V.log_softmax(-1).expand(3, NUM_IDS)
    teacher_NV = state.teacher_logprobs_V.expand(3, NUM_IDS)
    padded = torch.tensor([[2, 5, 0, 0], [5, 2, 2, 5], [2, 5, 3, 1]]), torch.tensor([[True, True, False, False]] * 3)
    plain = torch.tensor([[2, 5]] * 3), torch.ones(3, 2, dtype=torch.bool)
    expected = estimator_variances(student_NV, teacher_NV, *plain)
    for name, value_N in estimator_variances(student_NV, teacher_NV, *padded).items():
        torch.testing.assert_close(value_N, expected[name])


def test_an_id_that_the_teacher_lacks_is_named():
    state = random_state(0, 0)
    teacher_NV = state.teacher_logprobs_V[None].clone()
    teacher_NV[0, 4] = -torch.inf
    with pytest.raises(NonFiniteError, match="-inf at position 0, id 4"):
        Distributions.from_logprobs(state.student_logits_V.log_softmax(-1)[None], teacher_NV)


def test_no_array_grows_beyond_positions_times_vocabulary():
    sizes: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    student_NV, teacher_NV = torch.randn(2, 5, 64, dtype=torch.float64).log_softmax(-1)
    ids_NK = student_NV.topk(8).indices
    with Recorder():
        estimator_variances(student_NV, teacher_NV, ids_NK, torch.ones_like(ids_NK, dtype=torch.bool))
    assert max(sizes) == 5 * 64
