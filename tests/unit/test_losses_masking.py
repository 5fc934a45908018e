"""What must not matter does not: masked positions, pad columns, microbatches. What must be finite is."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from enumeration import EVERY_SAMPLED_ESTIMATOR, Outputs, batch_of_every_token, plain_moments, random_state
from vopd_client.batch import Batch
from vopd_client.config import FULL_VOCABULARY_OBJECTIVES
from vopd_client.errors import ConfigError, NonFiniteError
from vopd_client.losses import compute_loss

B, T, K, V = 4, 5, 3, 7
EVERY_CHOICE = [
    *EVERY_SAMPLED_ESTIMATOR,
    ("topk-kl", "renormalise", None),
    ("topk-kl", "bucket", None),
    ("full-kl", "renormalise", None),
]
every_choice = pytest.mark.parametrize(("objective", "tail", "baseline"), EVERY_CHOICE)


def example(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Batch]:
    """Leaves for the student's outputs, and a ragged batch: lengths 5, 3, 1 and 0, supports of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(0)
    student_BTV, teacher_BTV = torch.randn(2, B, T, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    completion_ids_BT = torch.randint(V, (B, T), generator=generator)
    support_ids_BTK = student_BTV.topk(K).indices
    sizes_BT = torch.randint(K + 1, (B, T, 1), generator=generator)
    leaves = {
        "sampled_logprobs_BT": student_BTV.gather(-1, completion_ids_BT[..., None])[..., 0],
        "support_logprobs_BTK": student_BTV.gather(-1, support_ids_BTK),
        "sum_pi_squared_BT": student_BTV.exp().square().sum(-1),
        "full_logprobs_BTV": student_BTV,
        "teacher_full_logprobs_BTV": teacher_BTV,
    }
    leaves = {name: value.to(dtype).detach().requires_grad_() for name, value in leaves.items()}
    batch = Batch(
        input_ids_BS=torch.zeros(B, T + 1, dtype=torch.int64),
        attention_mask_BS=torch.ones(B, T + 1, dtype=torch.int64),
        row_index_BT=torch.zeros(B, T, dtype=torch.int64),
        completion_ids_BT=completion_ids_BT,
        loss_mask_BT=torch.arange(T) < torch.tensor([5, 3, 1, 0])[:, None],
        support_ids_BTK=support_ids_BTK,
        support_mask_BTK=torch.arange(K) < sizes_BT,
        behaviour_logprobs_BT=torch.zeros(B, T),
        teacher_logprobs_BT=teacher_BTV.gather(-1, completion_ids_BT[..., None])[..., 0].to(dtype),
        teacher_support_logprobs_BTK=teacher_BTV.gather(-1, support_ids_BTK).to(dtype),
        task_advantages_BT=torch.zeros(B, T, dtype=dtype),
        teacher_hidden_BTH=None,
        prompt_names=("data:1", "data:2", "data:3", "data:4"),
    )
    return leaves, batch


def outputs(leaves: dict[str, Tensor], batch: Batch, objective: str) -> Outputs:
    """What the student would give the objective: moments of the whole distributions to those over the vocabulary."""
    named = {name: leaf for name, leaf in leaves.items() if "full" not in name}
    if objective not in FULL_VOCABULARY_OBJECTIVES:
        return Outputs(**named)
    student_BTV, teacher_BTV = leaves["full_logprobs_BTV"], leaves["teacher_full_logprobs_BTV"].detach()
    if student_BTV.dtype == torch.bfloat16:  # moments never come in less than float32
        student_BTV, teacher_BTV = student_BTV.float(), teacher_BTV.float()
    student_NV, teacher_NV = student_BTV[batch.loss_mask_BT], teacher_BTV[batch.loss_mask_BT]
    return Outputs(
        **named,
        whole_BT=plain_moments(student_BTV.detach(), teacher_BTV, None),
        reverse_kl_sum=(student_NV.exp() * (student_NV - teacher_NV)).sum(),
        num_ids=V,
    )


def loss_and_gradients(leaves, batch, objective, tail, baseline):
    output = compute_loss(objective, outputs(leaves, batch, objective), batch, tail=tail, baseline=baseline)
    gradients = torch.autograd.grad(output.loss_sum, list(leaves.values()), allow_unused=True)
    return output, dict(zip(leaves, gradients, strict=True))


def poisoned(leaves: dict[str, Tensor], batch: Batch, poison: float) -> tuple[dict[str, Tensor], Batch]:
    """The same example with `poison` in every float that no loss may look at."""
    looked_at = {
        "BT": batch.loss_mask_BT,
        "BTK": batch.support_mask_BTK & batch.loss_mask_BT[..., None],
        "BTV": batch.loss_mask_BT[..., None].expand(B, T, V),
    }

    def poison_in(name: str, value: Tensor) -> Tensor:
        return torch.where(looked_at[name.rsplit("_", 1)[1]], value.detach(), poison)

    leaves = {name: poison_in(name, value).requires_grad_() for name, value in leaves.items()}
    floats = [field.name for field in fields(Batch) if "logprobs" in field.name]
    return leaves, replace(batch, **{name: poison_in(name, getattr(batch, name)) for name in floats})


@every_choice
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, torch.inf, 1e30, 700.0])
def test_masked_positions_and_pad_columns_are_never_looked_at(objective, tail, baseline, poison):
    leaves, batch = example()
    output, gradients = loss_and_gradients(leaves, batch, objective, tail, baseline)
    poisoned_leaves, poisoned_batch = poisoned(leaves, batch, poison)
    poisoned_output, poisoned_gradients = loss_and_gradients(poisoned_leaves, poisoned_batch, objective, tail, baseline)
    assert torch.equal(poisoned_output.loss_sum, output.loss_sum)
    for name, value in output.sums.items():
        assert torch.equal(poisoned_output.sums[name], value), name
    for name, gradient in gradients.items():
        assert (gradient is None) == (poisoned_gradients[name] is None)
        assert gradient is None or torch.equal(poisoned_gradients[name], gradient), name


def test_a_pad_column_that_holds_the_sampled_id_does_not_put_it_into_the_support():
    leaves, batch = example()
    foreign_ids_BTK = torch.where(batch.support_mask_BTK, batch.support_ids_BTK, V)
    sampled_ids_BTK = torch.where(batch.support_mask_BTK, batch.support_ids_BTK, batch.completion_ids_BT[..., None])
    results = [
        loss_and_gradients(leaves, replace(batch, support_ids_BTK=ids_BTK), "vopd-rb", "bucket", None)[0].loss_sum
        for ids_BTK in (foreign_ids_BTK, sampled_ids_BTK)
    ]
    assert torch.equal(*results)


@every_choice
def test_no_step_of_a_backward_pass_through_empty_supports_is_nan(objective, tail, baseline):
    """Anomaly mode looks at what masks would hide later."""
    leaves, batch = example()
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        loss_and_gradients(*poisoned(leaves, batch, -torch.inf), objective, tail, baseline)


@every_choice
def test_masked_positions_and_pad_columns_have_exactly_zero_gradient(objective, tail, baseline):
    leaves, batch = example()
    _, gradients = loss_and_gradients(leaves, batch, objective, tail, baseline)
    masks = {
        "sampled_logprobs_BT": batch.loss_mask_BT,
        "support_logprobs_BTK": batch.support_mask_BTK & batch.loss_mask_BT[..., None],
        "full_logprobs_BTV": batch.loss_mask_BT[..., None].expand(B, T, V),
    }
    touched = [name for name, gradient in gradients.items() if gradient is not None and gradient.any()]
    assert touched
    for name in touched:
        assert not gradients[name][~masks[name]].any()


@every_choice
def test_gradient_flows_through_the_student_terms_of_the_table_and_no_others(objective, tail, baseline):
    """A baseline is a constant: vopd gets no gradient through the support it is made of."""
    leaves, batch = example()
    names = ("teacher_logprobs_BT", "teacher_support_logprobs_BTK")
    teacher = {name: getattr(batch, name).clone().requires_grad_() for name in names}
    student = outputs(leaves, batch, objective)
    output = compute_loss(objective, student, replace(batch, **teacher), tail=tail, baseline=baseline)
    assert not any(value.requires_grad for value in output.sums.values())
    everything = {**leaves, **teacher}
    gradients = torch.autograd.grad(output.loss_sum, list(everything.values()), allow_unused=True)
    touched = {
        name for name, gradient in zip(everything, gradients, strict=True) if gradient is not None and gradient.any()
    }
    expected = {
        "opd": {"sampled_logprobs_BT"},
        "vopd": {"sampled_logprobs_BT"},
        "vopd-full": {"sampled_logprobs_BT"},
        "vopd-rb": {"sampled_logprobs_BT", "support_logprobs_BTK"},
        "topk-kl": {"support_logprobs_BTK"},
        "full-kl": {"full_logprobs_BTV"},
    }
    assert touched == expected[objective]


def rows_of(leaves: dict[str, Tensor], batch: Batch, rows: list[int]) -> tuple[dict[str, Tensor], Batch]:
    names = tuple(batch.prompt_names[row] for row in rows)
    tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return {name: leaf[rows] for name, leaf in leaves.items()}, replace(batch, **tensors, prompt_names=names)


@every_choice
@pytest.mark.parametrize("plan", [[[0], [1], [2], [3]], [[3, 0], [2, 1]], [[1, 2, 3], [0]]])
def test_splitting_a_batch_into_microbatches_changes_nothing(objective, tail, baseline, plan):
    leaves, batch = example()
    whole, whole_gradients = loss_and_gradients(leaves, batch, objective, tail, baseline)
    parts = []
    for rows in plan:
        part_leaves, part_batch = rows_of(leaves, batch, rows)
        student = outputs(part_leaves, part_batch, objective)
        parts.append(compute_loss(objective, student, part_batch, tail=tail, baseline=baseline))
    total = sum(part.loss_sum for part in parts)
    torch.testing.assert_close(total, whole.loss_sum, rtol=0, atol=1e-6)
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if whole_gradients[name] is not None:
            torch.testing.assert_close(gradient, whole_gradients[name], rtol=0, atol=1e-6)


@every_choice
def test_a_batch_without_a_valid_token_is_zero_and_backward_accepts_it(objective, tail, baseline):
    leaves, batch = example()
    batch = replace(batch, loss_mask_BT=torch.zeros(B, T, dtype=torch.bool))
    output, gradients = loss_and_gradients(leaves, batch, objective, tail, baseline)
    assert output.loss_sum.item() == 0.0
    assert {float(value) for value in output.sums.values()} == {0.0}
    assert all(gradient is None or not gradient.any() for gradient in gradients.values())


@every_choice
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_empty_completions_and_supports_without_columns_work(objective, tail, baseline, num_tokens):
    leaves, batch = example()
    tensors = {
        name: value[:, :num_tokens, :0] if name.endswith("BTK") else value[:, :num_tokens]
        for name, value in {**leaves, **vars(batch)}.items()
        if isinstance(value, Tensor)
    }
    cut_leaves = {name: tensors.pop(name) for name in leaves}
    batch = replace(batch, **tensors)
    output = compute_loss(objective, outputs(cut_leaves, batch, objective), batch, tail=tail, baseline=baseline)
    output.loss_sum.backward()
    assert output.loss_sum.isfinite()
    assert all(value.isfinite() for value in output.sums.values())
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_an_empty_support_has_the_value_zero(tail):
    leaves, batch = example()
    batch = replace(batch, support_mask_BTK=torch.zeros(B, T, K, dtype=torch.bool))
    vopd, vopd_gradients = loss_and_gradients(leaves, batch, "vopd", tail, "kl")
    opd, opd_gradients = loss_and_gradients(leaves, batch, "opd", tail, None)
    assert float(vopd.sums["baseline"]) == 0.0
    assert torch.equal(vopd.loss_sum, opd.loss_sum)
    assert torch.equal(vopd_gradients["sampled_logprobs_BT"], opd_gradients["sampled_logprobs_BT"])


@every_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(objective, tail, baseline, dtype):
    leaves, batch = example(dtype)
    output, _ = loss_and_gradients(leaves, batch, objective, tail, baseline)
    assert output.loss_sum.dtype == torch.float32
    exact = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    exact_output, _ = loss_and_gradients(exact, batch, objective, tail, baseline)
    torch.testing.assert_close(output.loss_sum.double(), exact_output.loss_sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_sampled_logprob_that_is_not_finite_names_prompt_position_and_id(owner, value):
    leaves, batch = example()
    token_id = int(batch.completion_ids_BT[1, 2])
    if owner == "student":
        leaves["sampled_logprobs_BT"].data[1, 2] = value
    else:
        batch.teacher_logprobs_BT[1, 2] = value
    message = f"the {owner}'s log-probability of completion token 2 \\(id {token_id}\\) of data:2 is {value}"
    with pytest.raises(NonFiniteError, match=message):
        loss_and_gradients(leaves, batch, "opd", "renormalise", None)


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_support_logprob_that_is_not_finite_names_its_id(owner):
    """collate takes out the ids that a teacher lacks; one that comes through is an error, not a NaN."""
    leaves, batch = example()
    row, position, column = (
        int(index) for index in (batch.support_mask_BTK & batch.loss_mask_BT[..., None]).nonzero()[0]
    )
    support_id = int(batch.support_ids_BTK[row, position, column])
    logprobs = leaves["support_logprobs_BTK"].data if owner == "student" else batch.teacher_support_logprobs_BTK
    logprobs[row, position, column] = -torch.inf
    with pytest.raises(NonFiniteError, match=f"{owner}'s log-probability of id {support_id} in the support .* is -inf"):
        loss_and_gradients(leaves, batch, "vopd-rb", "bucket", None)


def test_an_id_that_only_the_student_gives_mass_to_makes_the_full_divergence_an_error():
    leaves, batch = example()
    leaves["teacher_full_logprobs_BTV"].data[0, 1, 4] = -torch.inf
    with pytest.raises(NonFiniteError, match=r"over the whole vocabulary at completion token 1 .* of data:1 is inf"):
        loss_and_gradients(leaves, batch, "full-kl", "renormalise", None)


@pytest.mark.parametrize("objective", ["vopd-full", "full-kl"])
def test_an_id_without_student_mass_adds_nothing_to_the_full_divergence(objective):
    state = random_state(0, 0)
    state.student_logits_V[4] = -torch.inf
    state.teacher_logprobs_V[4] = -torch.inf
    student, batch, leaf_YV = batch_of_every_token(state, objective=objective)
    output = compute_loss(objective, student, batch)
    output.loss_sum.backward()
    assert output.loss_sum.isfinite()
    assert leaf_YV.grad.isfinite().all()
    assert not leaf_YV.grad[:, 4].any()


@pytest.mark.parametrize("objective", ["vopd-full", "full-kl"])
def test_an_objective_over_the_whole_vocabulary_is_not_computed_from_a_support(objective):
    leaves, batch = example()
    with pytest.raises(ConfigError, match=f"{objective} needs the teacher's whole distribution"):
        compute_loss(objective, outputs(leaves, batch, "vopd"), batch)


def test_full_kl_is_not_computed_from_a_divergence_without_a_gradient():
    leaves, batch = example()
    student = replace(outputs(leaves, batch, "full-kl"), reverse_kl_sum=None)
    with pytest.raises(ConfigError, match="full-kl needs a differentiable KL"):
        compute_loss("full-kl", student, batch)
