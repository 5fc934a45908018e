"""The two versions that `make bench-memory` compares compute the same gradients, for every objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memory import OBJECTIVES, relative_error
from memory_versions import Inputs, Shape, ours, plain, write_inputs
from vopd_client.config import Objective

SHAPE = Shape(batch=3, tokens=7, vocab=97, hidden=16, k=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    write_inputs(path, SHAPE)
    return path


def gradients_of(version: object, objective: Objective, path: Path) -> tuple[torch.Tensor, ...]:
    inputs = Inputs.load(path, "cpu", torch.float32)
    assert callable(version)
    version(objective, inputs, SHAPE.batch)
    return inputs.gradients


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_versions_have_the_same_gradients(objective: Objective, path: Path) -> None:
    expected = gradients_of(plain, objective, path)
    assert all(float(gradient.norm()) > 0 for gradient in expected)
    assert relative_error(gradients_of(ours, objective, path), expected) < 1e-5


def test_no_two_objectives_have_the_same_gradients(path: Path) -> None:
    found = [gradients_of(plain, objective, path) for objective in OBJECTIVES]
    for place, gradients in enumerate(found):
        assert all(relative_error(other, gradients) > 1e-2 for other in found[:place])


def test_the_error_is_relative_to_the_norm_of_all_tensors_together() -> None:
    expected = (torch.tensor([3.0]), torch.tensor([0.0, 4.0]))
    found = (torch.tensor([3.0]), torch.tensor([0.5, 4.0]))
    assert relative_error(found, expected) == pytest.approx(0.1)


def test_a_few_rows_are_a_problem_of_their_own(path: Path) -> None:
    few = Inputs.load(path, "cpu", torch.float32).first_rows(4)
    ours("vopd", few, 2)
    assert few.gradients[0].shape == (4, SHAPE.hidden)
    assert few.gradients[1].shape == (SHAPE.vocab, SHAPE.hidden)
