"""Gradient checkpointing: the same loss and gradients from less memory; dropout stays off and sampling untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    Qwen3Config,
)

from fake_local_teacher import FakeLocalTeacher
from tiny_model import NUM_IDS, small_config
from training_runs import Runs, largest_difference, same_bits
from vopd_client.errors import ConfigError
from vopd_client.gradient_checkpointing import layers_to_checkpoint
from vopd_client.model_files import add_lora
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.run_directory import differing_settings
from vopd_client.student import StudentForTraining, StudentOutputs

ARCHITECTURES: dict[str, Any] = {
    "llama": small_config(LlamaConfig),
    "qwen3": small_config(Qwen3Config, head_dim=8),
    "gemma2": small_config(Gemma2Config, head_dim=8, final_logit_softcapping=2.0),
    "phi": small_config(PhiConfig, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    "gpt2": GPT2Config(vocab_size=NUM_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
}
KINDS = ["full", "lora", "lora with dropout"]


def some_model(config: Any, *, kind: str = "full") -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    if kind == "full":
        return model
    adapted = add_lora(model, rank=2, alpha=4.0, dropout=0.5 if "dropout" in kind else 0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


def some_inputs(*, num_tokens: int = 24) -> dict[str, Tensor]:
    """Two sequences of different lengths, whose second half is scored."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([num_tokens, num_tokens - 5])
    half = num_tokens // 2
    ids_BS = torch.randint(NUM_IDS, (2, num_tokens), generator=generator)
    rows_BT = torch.arange(half - 1, num_tokens - 1).expand(2, -1)
    return {
        "input_ids_BS": ids_BS,
        "attention_mask_BS": (torch.arange(num_tokens) < lengths[:, None]).long(),
        "row_index_BT": rows_BT,
        "completion_ids_BT": ids_BS[:, half:],
        "support_ids_BTK": torch.randint(NUM_IDS, (2, num_tokens - half, 3), generator=generator),
        "support_mask_BTK": torch.ones(2, num_tokens - half, 3, dtype=torch.bool),
        "loss_mask_BT": torch.arange(half, num_tokens) < lengths[:, None],
    }


def some_loss(outputs: StudentOutputs) -> Tensor:
    sampled_BT, support_BTK = outputs.sampled_logprobs_BT, outputs.support_logprobs_BTK
    weights_BT = torch.arange(1.0, sampled_BT.numel() + 1).view_as(sampled_BT)
    return (sampled_BT * weights_BT).sum() + (support_BTK.exp() * weights_BT[..., None]).sum()


def loss_and_gradients(
    config: Any, *, gradient_checkpointing: bool, kind: str, autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    student = StudentForTraining(some_model(config, kind=kind), gradient_checkpointing=gradient_checkpointing)
    torch.manual_seed(7)  # LoRA's dropout
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        loss = some_loss(student(**some_inputs()))
    loss.backward()
    assert not any("forward" in vars(module) for module in student.modules())
    gradients = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_same_to_the_last_bit(name: str, kind: str, autocast: bool) -> None:
    """Both computations of a layer run the same kernels: the attention that is switched on CPUs, LoRA's dropout and
    autocast are the same in the second one. The models' own dropout, of a half where there is any, stays off."""
    settings: dict[str, Any] = {"kind": kind, "autocast": autocast}
    assert len(layers_to_checkpoint(some_model(ARCHITECTURES[name]))) == 2
    loss, gradients = loss_and_gradients(ARCHITECTURES[name], gradient_checkpointing=True, **settings)
    plain_loss, plain_gradients = loss_and_gradients(ARCHITECTURES[name], gradient_checkpointing=False, **settings)
    assert torch.equal(loss, plain_loss)
    assert gradients
    assert all(gradient.any() for gradient in gradients.values())
    assert same_bits(gradients, plain_gradients)


class _SavedBytes:
    """Bytes of storages that autograd keeps for a backward pass, those of parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._storages: dict[int, tuple[int, Tensor]] = {}  # the tensors are held, or a pointer would be used twice

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    @property
    def total(self) -> int:
        return sum(num_bytes for num_bytes, _ in self._storages.values())


def saved_bytes(num_layers: int, *, gradient_checkpointing: bool, kind: str) -> int:
    config = small_config(LlamaConfig)
    config.num_hidden_layers = num_layers
    student = StudentForTraining(some_model(config, kind=kind), gradient_checkpointing=gradient_checkpointing)
    saved = _SavedBytes(student)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        student(**some_inputs(num_tokens=200))
    return saved.total


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_layer_keeps_its_input_and_nothing_else_for_the_backward_pass(kind: str) -> None:
    """Counted between two depths, so that what embeddings and output layer keep is left out."""
    a_layer = {
        checkpointed: saved_bytes(6, gradient_checkpointing=checkpointed, kind=kind)
        - saved_bytes(2, gradient_checkpointing=checkpointed, kind=kind)
        for checkpointed in (True, False)
    }
    its_input = 2 * 200 * 32 * 4  # B, S, H, float32
    assert its_input <= a_layer[True] / 4 <= 1.2 * its_input
    assert a_layer[False] / 4 >= 8 * its_input


def test_no_forward_without_gradients_and_no_other_mode_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    student = StudentForTraining(some_model(ARCHITECTURES["phi"]), gradient_checkpointing=True)
    assert student.training
    assert not any(module.training for module in student.model.modules())
    calls: list[str] = []
    monkeypatch.setattr(
        "vopd_client.gradient_checkpointing.checkpoint", lambda function, *a, **k: calls.append("") or function(*a)
    )
    with torch.no_grad():
        student(**some_inputs())
    assert calls == []
    student(**some_inputs())
    assert len(calls) == 2  # layers


def rollouts(student: StudentForTraining) -> list[Rollout]:
    sampler = RolloutSampler(
        student.model,
        num_shared_ids=NUM_IDS,
        end_ids=frozenset({257}),
        pad_id=0,
        max_new_tokens=8,
        temperature=1.0,
        top_k=4,
        support_mass=1.0,
        seed=0,
        batch_size=4,
    )
    requests = [(RolloutKey(0, 0, i), np.arange(1, 6 + i)) for i in range(3)]
    return sorted(sampler.sample(requests), key=lambda rollout: len(rollout.prompt_ids))


def test_sampling_keeps_its_cache_and_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    sampled, plain = (
        rollouts(StudentForTraining(some_model(ARCHITECTURES["qwen3"]), gradient_checkpointing=on))
        for on in (True, False)
    )
    for ours, theirs in zip(sampled, plain, strict=True):
        assert np.array_equal(ours.completion_ids, theirs.completion_ids)
        assert np.array_equal(ours.behaviour_logprobs_T, theirs.behaviour_logprobs_T)
    assert "Caching is incompatible" not in caplog.text  # transformers' word when it drops the cache


def test_an_architecture_without_it_is_refused_by_name() -> None:
    class Bare(nn.Module):
        pass

    with pytest.raises(ConfigError, match="gradient_checkpointing: Bare does not support it"):
        layers_to_checkpoint(Bare())


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone: the reducer is the one of larger groups."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_gradients_are_those_of_one_process(kind: str) -> None:
    student = StudentForTraining(some_model(ARCHITECTURES["llama"], kind=kind), gradient_checkpointing=True)
    parallel = DistributedDataParallel(student)
    torch.manual_seed(7)
    with parallel.no_sync():
        some_loss(parallel(**some_inputs())).backward()
    student.zero_grad()
    torch.manual_seed(7)
    some_loss(parallel(**some_inputs())).backward()
    _, expected = loss_and_gradients(ARCHITECTURES["llama"], gradient_checkpointing=False, kind=kind)
    gradients = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    assert same_bits(gradients, expected)


# ---------------------------------------------------------------- whole runs


@pytest.mark.usefixtures("fresh_process_state", "no_report")
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2, "lora_dropout": 0.3}], ids=["full", "lora"])
def test_a_run_ends_with_the_weights_of_a_run_without_it(
    runs: Runs, make_teacher: Callable[[], FakeLocalTeacher], lora: dict[str, Any]
) -> None:
    for name in ("plain", "checkpointed"):
        settings = {"name": name, "gradient_checkpointing": name == "checkpointed", "steps": 2}
        assert runs.train(make_teacher(), mixed_precision="bf16", **settings, **lora) == 0
    assert largest_difference(runs.weights("plain"), runs.weights("checkpointed")) == 0
    assert runs.metrics("plain") == runs.metrics("checkpointed")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_may_go_on_with_it_unless_every_bit_counts(deterministic: bool) -> None:
    before, now = ({"gradient_checkpointing": on, "deterministic": deterministic} for on in (False, True))
    expected = ["gradient_checkpointing: False -> True"] if deterministic else []
    assert differing_settings(before, now) == expected


@pytest.fixture
def make_teacher(models: Path) -> Callable[[], FakeLocalTeacher]:
    return lambda: FakeLocalTeacher(models / "teacher")
