"""What Adam's moments say of the gradient's noise."""

from __future__ import annotations

import pytest
import torch

from vopd_client.optimization import adam_moment_variance, make_optimizer


def optimizer_after(gradients: list[list[float]]):
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(module, learning_rate=0.0, weight_decay=0.0)
    for gradient in gradients:
        module.weight.grad = torch.tensor([gradient])
        optimizer.step()
    return optimizer


def test_a_gradient_that_never_changes_has_no_variance():
    assert adam_moment_variance(optimizer_after([[3.0, -2.0]] * 5)) == pytest.approx(0.0, abs=1e-4)


def test_it_is_the_second_moment_less_the_square_of_the_first_each_without_its_bias():
    gradients = [[1.0, 4.0], [-3.0, 0.5], [2.0, -1.0]]
    expected = 0.0
    for values in zip(*gradients, strict=True):
        m = v = 0.0
        for value in values:
            m, v = 0.9 * m + 0.1 * value, 0.999 * v + 0.001 * value**2
        expected += v / (1 - 0.999**3) - (m / (1 - 0.9**3)) ** 2
    assert adam_moment_variance(optimizer_after(gradients)) == pytest.approx(expected, rel=1e-5)


def test_before_the_first_step_there_is_none():
    assert adam_moment_variance(optimizer_after([])) == 0.0
