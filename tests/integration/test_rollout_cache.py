"""Decoding with the cache that is written in place, with shared heads and with weights kept in bf16: the same
rollouts as without them, and each thing done as often as it has to be. Times are the benchmark's affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, Qwen3Config

from tiny_model import NUM_IDS, small_config
from vopd_client import cpu_attention
from vopd_client.cpu_attention import attending_on_cpu, configs_to_switch
from vopd_client.model_files import add_lora
from vopd_client.output_head import hidden_states
from vopd_client.rollouts import forward
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.bf16_layers import bf16_linear_forwards, forwards_replaced
from vopd_client.rollouts.cache import COLUMNS_AHEAD, PreallocatedLayer
from vopd_client.rollouts.decoding import GrowingBatch, closed_up
from vopd_client.rollouts.forward import InferenceForward
from vopd_client.rollouts.transformers import RolloutRequest, RolloutSampler
from vopd_proto.arrays import IntArray

END_IDS = frozenset(range(0, NUM_IDS, 6))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "learned positions": lambda: GPT2Config(
        vocab_size=NUM_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "shared heads": lambda: small_config(Qwen3Config, head_dim=8),
    "sliding window in every layer": lambda: small_config(MistralConfig, head_dim=8, sliding_window=6),
    "sliding window in every other layer": lambda: small_config(Gemma2Config, head_dim=8, sliding_window=6),
}


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = AutoModelForCausalLM.from_config(ARCHITECTURES[request.param]()).eval()
    return made


def prompt_of(length: int) -> IntArray:
    return np.random.default_rng(length).integers(0, 256, length)


def requests_of(lengths: Sequence[int], *, rollouts_per_prompt: int = 3) -> list[RolloutRequest]:
    return [
        (RolloutKey(0, index, rollout), prompt_of(length))
        for index, length in enumerate(lengths)
        for rollout in range(rollouts_per_prompt)
    ]


def sampled(model: nn.Module, requests: Sequence[RolloutRequest], **changes: Any) -> dict[RolloutKey, Rollout]:
    settings: dict[str, Any] = {
        "num_shared_ids": NUM_IDS,
        "end_ids": END_IDS,
        "pad_id": 0,
        "max_new_tokens": 16,
        "temperature": 1.0,
        "top_k": 20,
        "support_mass": 0.95,
        "seed": 11,
        "batch_size": 16,
    }
    return {rollout.key: rollout for rollout in RolloutSampler(model, **(settings | changes)).sample(requests)}


def assert_same_rollouts(found: dict[RolloutKey, Rollout], expected: dict[RolloutKey, Rollout]) -> None:
    assert found.keys() == expected.keys()
    for key, rollout in found.items():
        np.testing.assert_array_equal(rollout.completion_ids, expected[key].completion_ids)
        np.testing.assert_array_equal(rollout.support_counts_T, expected[key].support_counts_T)
        np.testing.assert_allclose(rollout.behaviour_logprobs_T, expected[key].behaviour_logprobs_T, atol=1e-5)


@pytest.fixture
def dynamic_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, every model's cache is taken for one that is more than keys and values."""
    return lambda: monkeypatch.setattr(forward, "plain_cache", lambda model: None)


def test_rollouts_are_those_of_the_dynamic_cache(model: nn.Module, dynamic_cache: Callable[[], None]) -> None:
    requests = requests_of([2, 3, 9, 14])
    in_place = sampled(model, requests)
    dynamic_cache()
    assert_same_rollouts(in_place, sampled(model, requests))
    lengths = {len(rollout.completion_ids) for rollout in in_place.values()}
    assert len(lengths) > 3  # rows left at several steps, and others moved into their places


def test_prompts_read_in_several_groups_make_the_same_rollouts(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of([2, 3, 9, 14, 20])
    together = sampled(model, requests)
    monkeypatch.setattr("vopd_client.rollouts.decoding.FORWARD_COST_TOKENS", 0)
    widths = inputs_read(model)
    assert_same_rollouts(sampled(model, requests), together)
    assert [tuple(shape) for shape in widths[:5]] == [(1, 20), (1, 14), (1, 9), (1, 3), (1, 2)]


def inputs_read(model: nn.Module) -> list[torch.Size]:
    """Shapes of the inputs of every forward from now on."""
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    return shapes


def test_prompts_of_unlike_length_are_read_with_little_padding(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    lengths = [40, 70, 101, 132, 163, 194, 225, 256]
    shapes = inputs_read(model)
    sampled(model, requests_of(lengths, rollouts_per_prompt=2), max_new_tokens=1)
    assert sum(shape[0] for shape in shapes) == len(lengths)
    assert sum(shape.numel() for shape in shapes) < sum(lengths) / 0.8


def test_no_position_of_a_prompt_but_its_last_has_logits(model: nn.Module) -> None:
    rows: list[tuple[int, ...]] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, output: rows.append(tuple(output.shape[:2])))
    sampled(model, requests_of([20, 21], rollouts_per_prompt=1), max_new_tokens=3, end_ids=frozenset())
    hook.remove()
    assert rows == [(2, 1)] * 3


class Concatenated(TorchDispatchMode):
    """Elements of the results of every concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.cat:
            self.numels.append(result.numel())
        return result


def test_a_step_concatenates_nothing_as_large_as_a_layers_cache(
    tiny_model_dir: Path, dynamic_cache: Callable[[], None]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    prompts = [prompt_of(50), prompt_of(51)]

    def largest_concatenation() -> int:
        batch = GrowingBatch(InferenceForward(model, "no"), prompts, pad_id=0, max_new_tokens=8)
        batch.prefill()
        with Concatenated() as concatenated:
            batch.step(np.array([1, 2]))
        return max(concatenated.numels, default=0)

    cache_of_a_layer = 2 * 2 * 51 * 8  # rows, heads, columns, features
    assert largest_concatenation() < cache_of_a_layer
    dynamic_cache()
    assert largest_concatenation() > cache_of_a_layer


def test_a_cache_grows_by_many_columns_at_once_and_says_the_same(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of([5, 9])
    expected = sampled(model, requests)
    monkeypatch.setattr("vopd_client.rollouts.cache.COLUMNS_AHEAD", 3)
    assert_same_rollouts(sampled(model, requests), expected)


def test_a_long_limit_does_not_take_its_memory_from_the_start(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    batch = GrowingBatch(InferenceForward(model, "no"), [prompt_of(10)], pad_id=0, max_new_tokens=10_000)
    batch.prefill()
    assert {layer.keys.shape[2] for layer in batch._cache.layers} == {10 + COLUMNS_AHEAD}


def test_a_row_that_leaves_moves_one_row_and_not_all() -> None:
    keys_BHSF = torch.arange(5.0)[:, None, None, None].expand(5, 2, 4, 3).clone()
    layer = PreallocatedLayer(keys_BHSF, keys_BHSF.clone(), length=4, window=None)
    before = layer.keys.data_ptr()
    layer.close_up(closed_up([False, True, False, False, False]))
    assert layer.keys[:, 0, 0, 0].tolist() == [0, 4, 2, 3]
    assert layer.keys.data_ptr() == before


@pytest.mark.parametrize(
    ("ended", "slots"),
    [
        ([False, False], [0, 1]),
        ([True, False, False], [2, 1]),
        ([True, False, True, False], [3, 1]),
        ([False, False, True, True], [0, 1]),
        ([True, True, False, True, False], [2, 4]),
        ([True, True], []),
    ],
)
def test_gaps_are_filled_from_behind_the_new_end(ended: list[bool], slots: list[int]) -> None:
    assert closed_up(ended) == slots


# ---------------------------------------------------------------- shared heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_heads_attend_as_copied_ones_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 6, 2, 8, dtype=dtype)
    key, value = torch.randn(2, 3, 2, 7, 8, dtype=dtype)
    mask = torch.ones(3, 1, 2, 7, dtype=torch.bool)
    mask[1, :, :, :4] = False
    found, _ = cpu_attention.cpu_attention(nn.Module(), query, key, value, mask, scaling=0.3)
    copied = [states.repeat_interleave(3, dim=1) for states in (key, value)]
    expected = scaled_dot_product_attention(query, *copied, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_a_model_attends_with_shared_heads_inside_the_block_alone(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    calls: list[int] = []

    def counting(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return cpu_attention.cpu_attention(*arguments, **settings)

    monkeypatch.setitem(cpu_attention.AttentionInterface._global_mapping, cpu_attention.NAME, counting)
    sampled(model, requests_of([4, 9]), max_new_tokens=3)
    assert calls
    calls.clear()
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert not calls
    assert model.config._attn_implementation == "sdpa"


def test_the_attention_of_a_model_is_put_back_when_a_forward_fails(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    found: list[str] = []

    def forward_that_fails() -> None:
        with attending_on_cpu(configs_to_switch(model)):
            found.append(model.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        forward_that_fails()
    assert [*found, model.config._attn_implementation] == [cpu_attention.NAME, "sdpa"]


def test_a_model_that_was_told_to_attend_otherwise_does_so() -> None:
    eager = AutoModelForCausalLM.from_config(ARCHITECTURES["shared heads"](), attn_implementation="eager")
    assert configs_to_switch(eager) == []


def test_short_sequences_are_trained_with_float32_attention_and_long_ones_are_not(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    dtypes: list[torch.dtype] = []
    torchs = cpu_attention.scaled_dot_product_attention

    def noting(query: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        dtypes.append(torch.float32 if not torch.is_autocast_enabled("cpu") else torch.bfloat16)
        return torchs(query, *arguments, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    monkeypatch.setattr(cpu_attention, "MOST_TOKENS_IN_FLOAT32", 8)
    for length in (8, 9):
        ids_BS = torch.ones(2, length, dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_states(model, ids_BS, torch.ones_like(ids_BS))
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_gradients_through_float32_attention_are_those_of_a_float32_forward(tiny_model_dir: Path) -> None:
    """Not another function: within what bf16 rounds off everywhere else."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids_BS = torch.from_numpy(np.stack([prompt_of(30), prompt_of(30)[::-1].copy()]))
    weights_BSH = torch.randn(2, 30, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def gradient(*, autocast: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            (hidden_states(model, ids_BS, torch.ones_like(ids_BS)) * weights_BSH).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.model.layers.parameters()])

    exact, ours = gradient(autocast=False), gradient(autocast=True)
    assert 0 < float((ours - exact).norm() / exact.norm()) < 0.05


# ---------------------------------------------------------------- weights in bf16


class WeightCasts(TorchDispatchMode):
    """Conversions of float32 matrices of given shapes to bf16."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self._shapes = shapes
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and result.dtype == torch.bfloat16:
            self.count += args[0].shape in self._shapes
        return result


@pytest.mark.parametrize("lora", [False, True])
def test_every_weight_is_cast_once_for_all_steps_and_batches_of_a_sampling(tiny_model_dir: Path, lora: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    student: Any = add_lora(model, rank=4, alpha=8.0, dropout=0.0) if lora else model
    linear = [module for module in student.modules() if isinstance(module, nn.Linear)]
    requests = requests_of([4, 9, 30])
    with WeightCasts({module.weight.shape for module in linear}) as casts:
        rollouts = sampled(student, requests, batch_size=3, mixed_precision="bf16", max_new_tokens=8)
    assert len({len(rollout.completion_ids) for rollout in rollouts.values()}) > 1
    assert casts.count == len(linear)


@pytest.mark.parametrize("num_rows", [1, 16, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_a_kept_weight_gives_the_bits_that_autocast_gives(num_rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias)
    inputs_NH = torch.randn(num_rows, 96)
    forwards = bf16_linear_forwards(nn.Sequential(layer))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected_NO = layer(inputs_NH)
        with forwards_replaced(forwards):
            found_NO = layer(inputs_NH)
    assert found_NO.dtype == torch.bfloat16
    assert torch.equal(found_NO, expected_NO)


def test_a_layer_has_its_own_forward_again_afterwards() -> None:
    layer = nn.Linear(4, 3)
    names = list(vars(layer))

    def forward_that_fails() -> None:
        with forwards_replaced(bf16_linear_forwards(nn.Sequential(layer))):
            assert "forward" in vars(layer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        forward_that_fails()
    assert list(vars(layer)) == names


def test_layers_that_are_more_than_linear_keep_their_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the base class
            return 2 * super().forward(input)

    replaced = nn.Linear(4, 3)
    replaced.forward = lambda values: values  # type: ignore[method-assign]
    half = nn.Linear(4, 3).to(torch.bfloat16)
    plain = nn.Linear(4, 3)
    forwards = bf16_linear_forwards(nn.Sequential(Doubled(4, 3), replaced, half, plain))
    assert list(forwards) == [plain]
