"""Log-probabilities from hidden states, against log_softmax over the whole vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vopd_server.engines.head import (
    OutputHead,
    full_logprobs,
    output_head,
    row_queries,
    rows_per_chunk,
    score_rows,
    split_answers,
)
from vopd_server.errors import ConfigError, EngineError
from vopd_server.types import Candidates, HiddenStates, NoSupport, ScoreRequest, Scores, Support, TeacherTopK

V, H = 97, 16


@pytest.fixture
def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(H, V).requires_grad_(False)


def request(length: int, support: Support, temperature: float = 1.0, seed: int = 0) -> ScoreRequest:
    ids = np.random.default_rng(seed).integers(0, V, length)
    return ScoreRequest(f"request-{seed}", np.array([1]), ids, support, temperature)


def ragged(length: int, seed: int) -> Candidates:
    rng = np.random.default_rng(seed)
    counts_T = rng.integers(0, 9, length)
    return Candidates(rng.integers(0, V, counts_T.sum()), counts_T)


def scores_of(
    head: OutputHead, hidden_NH: torch.Tensor, requests: list[ScoreRequest], chunk_rows: int
) -> list[Scores | EngineError]:
    return split_answers(requests, score_rows(head, hidden_NH, row_queries(requests), chunk_rows=chunk_rows))


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_mixed_supports_and_temperatures_equal_log_softmax(linear: torch.nn.Linear, chunk_rows: int) -> None:
    requests = [
        request(5, ragged(5, seed=1), temperature=0.3, seed=1),
        request(1, TeacherTopK(7), seed=2),
        request(8, NoSupport(), temperature=2.5, seed=3),
        request(4, TeacherTopK(V), temperature=0.7, seed=4),
        request(3, Candidates(np.array([5, 5, 6]), np.array([0, 3, 0])), seed=5),  # with a duplicate
        request(4, HiddenStates(), temperature=0.7, seed=6),
        request(2, TeacherTopK(3), seed=7),
        request(1, HiddenStates(), seed=8),
    ]
    hidden_NH = torch.randn(28, H) * 3
    results = scores_of(OutputHead(linear, V, H), hidden_NH, requests, chunk_rows)
    row = 0
    for asked, scores in zip(requests, results, strict=True):
        assert isinstance(scores, Scores)
        length = len(asked.completion_ids)
        hidden_TH = hidden_NH[row : row + length]
        expected_TV = (linear(hidden_TH) / asked.temperature).log_softmax(-1).numpy()
        row += length
        positions = np.arange(length)
        np.testing.assert_allclose(scores.sampled_logprobs_T, expected_TV[positions, asked.completion_ids], atol=1e-5)
        match asked.support:
            case Candidates(ids=ids, counts_T=counts_T):
                expected = expected_TV[np.repeat(positions, counts_T), ids]
                np.testing.assert_allclose(scores.support_logprobs, expected, atol=1e-5)
            case TeacherTopK(k=k):
                assert scores.support_ids_TK is not None
                np.testing.assert_allclose(scores.support_logprobs, -np.sort(-expected_TV, axis=-1)[:, :k], atol=1e-5)
                np.testing.assert_allclose(
                    np.take_along_axis(expected_TV, scores.support_ids_TK, 1), scores.support_logprobs, atol=1e-5
                )
            case _:
                assert scores.support_logprobs is None
        if isinstance(asked.support, HiddenStates):
            np.testing.assert_array_equal(scores.hidden_states_TH, hidden_TH.numpy())
        else:
            assert scores.hidden_states_TH is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_are_float32_copies_of_the_models_own_values(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(H, V, dtype=dtype).requires_grad_(False)
    hidden_NH = torch.randn(5, H, dtype=dtype)
    requests = [request(2, NoSupport()), request(3, HiddenStates())]
    _, scores = scores_of(OutputHead(linear, V, H), hidden_NH, requests, chunk_rows=2)
    assert isinstance(scores, Scores)
    assert scores.hidden_states_TH is not None
    assert scores.hidden_states_TH.dtype == np.float32
    as_it_was = torch.as_tensor(scores.hidden_states_TH.copy()).to(dtype)
    hidden_3H = hidden_NH[2:].clone()
    hidden_NH.zero_()  # what was answered is nobody else's memory
    assert torch.equal(as_it_was, hidden_3H)
    np.testing.assert_array_equal(scores.hidden_states_TH, hidden_3H.float().numpy())


def test_a_hidden_state_that_is_not_finite_fails_its_request_where_a_soft_cap_hides_it(linear: torch.nn.Linear) -> None:
    requests = [request(3, kind, seed=seed) for seed, kind in enumerate((HiddenStates(), HiddenStates(), NoSupport()))]
    hidden_NH = torch.randn(9, H)
    hidden_NH[[4, 8], 0] = torch.inf
    head = OutputHead(linear, V, H, softcap=30.0)
    first, second, third = scores_of(head, hidden_NH, requests, chunk_rows=2)
    assert isinstance(first, Scores)
    assert isinstance(second, EngineError)
    assert str(second).startswith(
        "the model gave hidden states that are not finite for 1 of 3 completion tokens, first"
    )
    assert str(second).endswith("at token 1")
    assert isinstance(third, Scores), "its log-probabilities are finite, and it asked for nothing else"


def test_full_logprobs_equal_log_softmax_whatever_the_chunk(linear: torch.nn.Linear) -> None:
    hidden_TH = torch.randn(7, H)
    expected_TV = (linear(hidden_TH) / 0.5).log_softmax(-1)
    for chunk_rows in (1, 3, 100):
        actual_TV = full_logprobs(OutputHead(linear, V, H), hidden_TH, temperature=0.5, chunk_rows=chunk_rows)
        torch.testing.assert_close(actual_TV, expected_TV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30])
def test_extreme_temperatures_go_to_their_limits_without_nan(linear: torch.nn.Linear, temperature: float) -> None:
    hidden_TH = torch.randn(4, H)
    asked = request(4, TeacherTopK(2), temperature=temperature)
    (scores,) = scores_of(OutputHead(linear, V, H), hidden_TH, [asked], chunk_rows=4)
    assert isinstance(scores, Scores)
    assert scores.support_logprobs is not None
    greedy_or_uniform = (1.0, 0.0) if temperature < 1 else (1 / V, 1 / V)
    np.testing.assert_allclose(np.exp(scores.support_logprobs), np.tile(greedy_or_uniform, (4, 1)), atol=1e-6)


def test_a_nan_row_fails_its_request_and_no_other(linear: torch.nn.Linear) -> None:
    requests = [request(3, TeacherTopK(2), seed=seed) for seed in range(3)]
    hidden_NH = torch.randn(9, H)
    alone = scores_of(OutputHead(linear, V, H), hidden_NH, requests, chunk_rows=2)
    hidden_NH[4, 0] = torch.nan
    first, second, third = scores_of(OutputHead(linear, V, H), hidden_NH, requests, chunk_rows=2)
    assert isinstance(second, EngineError)
    assert "1 of 3 completion tokens, first at token 1" in str(second)
    for before, after in ((alone[0], first), (alone[2], third)):
        assert isinstance(before, Scores)
        assert isinstance(after, Scores)
        np.testing.assert_array_equal(before.sampled_logprobs_T, after.sampled_logprobs_T)
        np.testing.assert_array_equal(before.support_ids_TK, after.support_ids_TK)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_grows_with_completion_length_times_vocabulary(dtype: torch.dtype) -> None:
    wide = 5000
    head = OutputHead(torch.nn.Linear(4, wide, bias=False, dtype=dtype).requires_grad_(False), wide, 4)
    chunk_rows = rows_per_chunk(wide, chunk_elements=40_000)
    assert chunk_rows == 8
    largest = {}
    for length in (16, 512):
        hidden_TH = torch.randn(length, 4, dtype=dtype)
        asked = request(length, Candidates(np.arange(length), np.ones(length, np.int64)))
        with LargestTensor() as record:
            scores_of(head, hidden_TH, [asked], chunk_rows)
        largest[length] = record.numel
    assert largest == {16: chunk_rows * wide, 512: chunk_rows * wide}


def causal_lm(
    linear: torch.nn.Module, *, model_type: str = "any", logit_scale: float | None = None, **config: Any
) -> Any:
    """The parts of a transformers model that say how its logits are made."""
    text_config = SimpleNamespace(model_type=model_type, **config)
    return SimpleNamespace(
        get_output_embeddings=lambda: linear,
        config=SimpleNamespace(get_text_config=lambda: text_config),
        logit_scale=logit_scale,
    )


@pytest.mark.parametrize(
    ("model_settings", "expected"),
    [
        ({}, lambda logits: logits),
        ({"logit_scale": 0.0625}, lambda logits: logits * 0.0625),
        ({"model_type": "granite", "logits_scaling": 8.0}, lambda logits: logits / 8.0),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, lambda logits: logits * 8.0),
        ({"lm_head_multiplier": 0.5}, lambda logits: logits * 0.5),
        ({"final_logit_softcapping": 2.0}, lambda logits: 2.0 * torch.tanh(logits / 2.0)),
        ({"final_logit_softcapping": None, "logits_soft_cap": 2.0}, lambda logits: 2.0 * torch.tanh(logits / 2.0)),
    ],
)
def test_what_an_architecture_does_to_its_logits_is_done(
    linear: torch.nn.Linear, model_settings: dict[str, Any], expected: Any
) -> None:
    hidden_NH = torch.randn(6, H) * 4
    head = output_head(causal_lm(linear, **model_settings))
    torch.testing.assert_close(head.logits(hidden_NH), expected(linear(hidden_NH)))


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear output head"):
        output_head(causal_lm(torch.nn.Embedding(3, 4)))
