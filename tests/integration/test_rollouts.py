"""Rollouts from models: what is recorded is what a plain forward over the whole sequence says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Qwen3Config,
)

from tiny_model import small_config, write_tiny_model
from vopd_client.errors import NonFiniteError
from vopd_client.model_files import add_lora, merged_state_dict
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.forward import InferenceForward
from vopd_client.rollouts.transformers import RolloutRequest, RolloutSampler, greedy
from vopd_client.student import load_student
from vopd_proto.arrays import IntArray

NUM_SHARED_IDS = 259
# Half of the ids end a completion, so that rows of one batch end at different steps.
END_IDS = frozenset(range(0, NUM_SHARED_IDS, 6))


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def sampler_of(model: nn.Module, **changes: Any) -> RolloutSampler:
    settings: dict[str, Any] = {
        "num_shared_ids": NUM_SHARED_IDS,
        "end_ids": END_IDS,
        "pad_id": 0,
        "max_new_tokens": 16,
        "temperature": 1.0,
        "top_k": 20,
        "support_mass": 0.95,
        "seed": 11,
        "batch_size": 8,
    }
    return RolloutSampler(model, **(settings | changes))


def prompt_of(length: int, seed: int = 0) -> IntArray:
    return np.random.default_rng([length, seed]).integers(0, 256, length)


def requests_of(lengths: Sequence[int], *, rollouts_per_prompt: int = 2) -> list[RolloutRequest]:
    return [
        (RolloutKey(step=0, prompt_index=index, rollout_index=rollout), prompt_of(length))
        for index, length in enumerate(lengths)
        for rollout in range(rollouts_per_prompt)
    ]


def by_key(rollouts: Sequence[Rollout]) -> dict[RolloutKey, Rollout]:
    assert len({rollout.key for rollout in rollouts}) == len(rollouts)
    return {rollout.key: rollout for rollout in rollouts}


def supports_of(rollout: Rollout) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(rollout.support_ids, np.cumsum(rollout.support_counts_T)[:-1])]


@torch.no_grad()
def completion_logprobs(
    model: nn.Module, rollout: Rollout, *, temperature: float = 1.0, num_shared_ids: int = NUM_SHARED_IDS
) -> Tensor:
    """log pi at every completion row, [T, V], from one forward over the unpadded sequence."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids]))[None]
    first = len(rollout.prompt_ids) - 1
    logits_TV = model(input_ids=ids).logits[0, first : first + len(rollout.completion_ids)]
    return (logits_TV[:, :num_shared_ids].float() / temperature).log_softmax(dim=-1)


def assert_records_a_plain_forward(model: nn.Module, rollout: Rollout, *, temperature: float = 1.0) -> None:
    logprobs_TV = completion_logprobs(model, rollout, temperature=temperature)
    expected_T = logprobs_TV.gather(1, torch.from_numpy(rollout.completion_ids)[:, None]).squeeze(1)
    np.testing.assert_allclose(rollout.behaviour_logprobs_T, expected_T.numpy(), atol=1e-4)
    for row, ids in enumerate(supports_of(rollout)):
        probabilities, order = logprobs_TV[row].exp().sort(descending=True)
        assert ids == order[: len(ids)].tolist()
        inside = probabilities[: len(ids)].sum().item()
        assert len(ids) == 20 or inside >= 0.95 - 1e-5
        assert len(ids) == 1 or inside - probabilities[len(ids) - 1].item() < 0.95 + 1e-5
        assert rollout.support_mass_T[row] == pytest.approx(inside, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_and_supports_are_those_of_a_plain_forward(model: nn.Module, temperature: float) -> None:
    requests = requests_of([1, 3, 9, 9, 30])
    rollouts = list(sampler_of(model, temperature=temperature, batch_size=4).sample(requests))
    assert by_key(rollouts).keys() == {key for key, _ in requests}
    assert len({len(rollout.completion_ids) for rollout in rollouts}) > 2  # rows did leave their batches
    for rollout in rollouts:
        assert_records_a_plain_forward(model, rollout, temperature=temperature)


ARCHITECTURES = {
    "learned positions": GPT2Config(
        vocab_size=NUM_SHARED_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "q and k norms": small_config(Qwen3Config, head_dim=8),
    "sliding window and softcap": small_config(Gemma2Config, head_dim=8, sliding_window=8),
    "logit scale": small_config(CohereConfig),
    "logit divisor": small_config(GraniteConfig, logits_scaling=2.0),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_are_sampled_as_their_plain_forward_says(name: str) -> None:
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    rollouts = list(sampler_of(other, end_ids=frozenset(range(20))).sample(requests_of([2, 7, 13])))
    assert len(rollouts) == 6
    for rollout in rollouts:
        assert_records_a_plain_forward(other, rollout)


def test_a_support_is_a_function_of_the_state_and_not_of_the_draw(model: nn.Module) -> None:
    request = requests_of([6], rollouts_per_prompt=1)
    one_token = [next(sampler_of(model, seed=seed, max_new_tokens=1).sample(request)) for seed in range(12)]
    assert len({rollout.completion_ids[0] for rollout in one_token}) > 3
    assert len({tuple(rollout.support_ids.tolist()) for rollout in one_token}) == 1
    drawn_outside = [
        rollout
        for rollout in list(sampler_of(model, support_mass=0.3).sample(requests_of([4, 5, 6])))
        for token_id, ids in zip(rollout.completion_ids, supports_of(rollout), strict=True)
        if token_id not in ids
    ]
    assert drawn_outside, "a draw outside a 30 % support was to be expected"


def test_first_tokens_are_drawn_with_the_frequencies_of_the_softmax(model: nn.Module) -> None:
    # One chi-square test at a false-failure probability of 1e-6, over the choice of the fixed seed.
    prompt_ids, num_draws = prompt_of(5), 4000
    requests = [(RolloutKey(0, 0, rollout), prompt_ids) for rollout in range(num_draws)]
    rollouts = list(sampler_of(model, max_new_tokens=1, batch_size=1000).sample(requests))
    expected_V = num_draws * completion_logprobs(model, rollouts[0])[0].double().exp()
    counts_V = torch.bincount(
        torch.tensor([rollout.completion_ids[0] for rollout in rollouts]), minlength=NUM_SHARED_IDS
    ).double()
    frequent_V = expected_V >= 5
    assert frequent_V.sum() > 5
    counts = torch.cat([counts_V[frequent_V], counts_V[~frequent_V].sum()[None]])
    expected = torch.cat([expected_V[frequent_V], expected_V[~frequent_V].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(degrees, chi_square / 2).item() > 1e-6


def test_rollouts_do_not_depend_on_batch_size_order_or_company(model: nn.Module) -> None:
    requests = requests_of([3, 8, 8, 21], rollouts_per_prompt=3)
    reference = by_key(list(sampler_of(model, batch_size=1).sample(requests)))
    others = [
        list(sampler_of(model, batch_size=5).sample(requests)),
        list(sampler_of(model, batch_size=12).sample(requests)),
        list(sampler_of(model, batch_size=12).sample(requests[::-1])),
        list(sampler_of(model, batch_size=4).sample(requests[1::3])),
    ]
    for rollouts in others:
        for key, rollout in by_key(rollouts).items():
            np.testing.assert_array_equal(rollout.completion_ids, reference[key].completion_ids)
            np.testing.assert_array_equal(rollout.support_counts_T, reference[key].support_counts_T)
            np.testing.assert_array_equal(rollout.prompt_ids, reference[key].prompt_ids)
            assert rollout.ended == reference[key].ended


def test_a_recorded_support_of_another_size_does_not_change_the_draws(model: nn.Module) -> None:
    requests = requests_of([3, 8])
    small_support = by_key(list(sampler_of(model, top_k=1).sample(requests)))
    for key, rollout in by_key(list(sampler_of(model, top_k=200, support_mass=1.0).sample(requests))).items():
        np.testing.assert_array_equal(rollout.completion_ids, small_support[key].completion_ids)
        assert set(rollout.support_counts_T) == {200}
        assert set(small_support[key].support_counts_T) == {1}


def test_rollouts_of_one_prompt_and_of_one_state_at_another_step_differ(model: nn.Module) -> None:
    requests = requests_of([6], rollouts_per_prompt=6)
    later = [(RolloutKey(1, key.prompt_index, key.rollout_index), prompt) for key, prompt in requests]
    completions = {
        tuple(rollout.completion_ids.tolist())
        for rollout in [*sampler_of(model).sample(requests), *sampler_of(model).sample(later)]
    }
    assert len(completions) > 6


def test_a_row_that_ends_early_is_yielded_before_the_rest_is_computed(model: nn.Module) -> None:
    num_forwards = 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    with model.register_forward_hook(count):
        forwards_at_yield = [
            (len(rollout.completion_ids), num_forwards)
            for rollout in sampler_of(model).sample(requests_of([4, 5, 6, 7]))
        ]
    lengths = [length for length, _ in forwards_at_yield]
    assert lengths[0] < lengths[-1]
    # Prompts of 4 to 7 tokens fit one batch: T tokens need the forward over the prompts and T - 1 more.
    assert all(length == forwards for length, forwards in forwards_at_yield)


def test_rows_that_have_ended_leave_the_batch_and_equal_prompts_are_computed_once(model: nn.Module) -> None:
    batch_sizes: list[int] = []

    def note(_: nn.Module, __: object, inputs: dict[str, Tensor]) -> None:
        batch_sizes.append(len(inputs["input_ids"]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    rollouts = list(sampler_of(model).sample(requests_of([4, 5], rollouts_per_prompt=4)))
    hook.remove()
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    still_growing = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert batch_sizes == [2, *still_growing]


def test_the_consumer_finds_its_modes_as_they_were(model: nn.Module) -> None:
    dropout_model = copy.deepcopy(model).train()
    dropout_model.model.layers[0].eval()
    for _ in sampler_of(dropout_model, mixed_precision="bf16").sample(requests_of([4, 5])):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert dropout_model.training
        assert dropout_model.model.layers[1].mlp.training
        assert not dropout_model.model.layers[0].mlp.training


def test_dropout_is_off_while_sampling() -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(ARCHITECTURES["learned positions"])
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    dropout_model = AutoModelForCausalLM.from_config(config).train()
    rollout = next(sampler_of(dropout_model).sample(requests_of([4])))
    assert_records_a_plain_forward(dropout_model.eval(), rollout)


def test_a_completion_ends_with_the_first_end_token_or_at_the_limit(model: nn.Module) -> None:
    rollouts = list(sampler_of(model, max_new_tokens=6).sample(requests_of([3, 8, 8, 21])))
    assert {rollout.ended for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert not END_IDS.intersection(rollout.completion_ids[:-1].tolist())
        assert rollout.ended == (int(rollout.completion_ids[-1]) in END_IDS)
        assert rollout.ended or len(rollout.completion_ids) == 6
        num_tokens = len(rollout.completion_ids)
        assert rollout.behaviour_logprobs_T.shape == (num_tokens,)
        assert rollout.support_mass_T.shape == (num_tokens,)
        assert rollout.support_counts_T.sum() == len(rollout.support_ids)


def test_completions_of_one_token_are_complete_rollouts(model: nn.Module) -> None:
    rollouts = list(sampler_of(model, max_new_tokens=1).sample(requests_of([1, 8], rollouts_per_prompt=20)))
    assert {rollout.ended for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert len(rollout.completion_ids) == 1
        assert_records_a_plain_forward(model, rollout)


def test_an_end_token_at_the_limit_counts_as_ended(model: nn.Module) -> None:
    everything_ends = frozenset(range(NUM_SHARED_IDS))
    rollouts = list(sampler_of(model, max_new_tokens=1, end_ids=everything_ends).sample(requests_of([3])))
    assert [rollout.ended for rollout in rollouts] == [True, True]


def test_ids_of_a_padded_vocabulary_are_never_sampled_and_have_no_probability(tmp_path: Path) -> None:
    padded = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path, vocab_padding=200)).eval()
    rollouts = list(sampler_of(padded, support_mass=1.0).sample(requests_of([4, 9, 15], rollouts_per_prompt=6)))
    unmasked_mass = []
    for rollout in rollouts:
        assert rollout.completion_ids.max() < NUM_SHARED_IDS
        assert rollout.support_ids.max() < NUM_SHARED_IDS
        expected_TV = completion_logprobs(padded, rollout)
        expected_T = expected_TV.gather(1, torch.from_numpy(rollout.completion_ids)[:, None]).squeeze(1)
        np.testing.assert_allclose(rollout.behaviour_logprobs_T, expected_T.numpy(), atol=1e-4)
        everything_TV = completion_logprobs(padded, rollout, num_shared_ids=NUM_SHARED_IDS + 200)
        unmasked_mass.append(everything_TV[:, NUM_SHARED_IDS:].exp().sum(dim=-1).mean().item())
    assert np.mean(unmasked_mass) > 0.1  # the model would have sampled them


def test_logits_that_are_not_finite_stop_the_rollout_and_name_it(model: nn.Module) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"token 0 of RolloutKey\(step=0, prompt_index=0"):
        list(sampler_of(broken).sample(requests_of([4])))


def test_no_requests_give_no_rollouts(model: nn.Module) -> None:
    assert list(sampler_of(model).sample([])) == []


def with_random_lora(model: nn.Module) -> Any:
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(model), rank=4, alpha=8.0, dropout=0.5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts at zero
            nn.init.normal_(parameter, std=0.3)
    return adapted


def test_lora_adapters_take_part_in_sampling(model: nn.Module) -> None:
    adapted = with_random_lora(model)
    adapted.train()  # its dropout must not reach the rollouts
    merged = copy.deepcopy(model)
    merged.load_state_dict(merged_state_dict(adapted.get_base_model()))
    requests = requests_of([4, 9])
    plain = by_key(list(sampler_of(model).sample(requests)))
    rollouts = by_key(list(sampler_of(adapted).sample(requests)))
    for rollout in rollouts.values():
        assert_records_a_plain_forward(merged, rollout)
    assert any(rollouts[key].completion_ids.tolist() != plain[key].completion_ids.tolist() for key in rollouts)


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_weights_kept_for_sampling_give_the_bits_of_autocast(model: nn.Module, lora: bool) -> None:
    student = with_random_lora(model) if lora else model
    ids_BS = torch.from_numpy(prompt_of(12))[None]
    mask_BS = torch.ones_like(ids_BS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected_BV = student.eval()(input_ids=ids_BS, attention_mask=mask_BS, logits_to_keep=1).logits[:, -1]
    actual_BV = InferenceForward(student, "bf16")(
        input_ids=ids_BS, attention_mask=mask_BS, position_ids=torch.arange(12)[None], cache=None
    ).logits[:, -1]
    assert torch.equal(actual_BV, expected_BV)


def test_weights_changed_between_two_samples_are_seen(model: nn.Module) -> None:
    changing = copy.deepcopy(model)
    sampler = sampler_of(changing, mixed_precision="bf16")
    before = next(sampler.sample(requests_of([5])))
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.mul_(1.1)
    after = next(sampler.sample(requests_of([5])))
    assert before.behaviour_logprobs_T[0] != after.behaviour_logprobs_T[0]


def generated(model: nn.Module, prompt_ids: IntArray, end_ids: frozenset[int], max_new_tokens: int) -> list[int]:
    """What transformers' own generate makes of one prompt."""
    ids_BS = torch.from_numpy(prompt_ids)[None]
    output = model.generate(
        input_ids=ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids),
        pad_token_id=0,
    )
    completion: list[int] = output[0, len(prompt_ids) :].tolist()
    return completion


def test_greedy_equals_generate_and_keeps_the_order_of_the_prompts(model: nn.Module) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate([9, 2, 30, 9, 1, 17])]
    completions = greedy(
        model,
        prompts,
        end_ids=END_IDS,
        pad_id=0,
        max_new_tokens=10,
        num_shared_ids=NUM_SHARED_IDS,
        batch_size=4,
    )
    expected = [generated(model, prompt, END_IDS, 10) for prompt in prompts]
    assert [completion.tolist() for completion in completions] == expected
    assert len({len(completion) for completion in completions}) > 1


def test_greedy_never_chooses_ids_of_a_padded_vocabulary(tmp_path: Path) -> None:
    padded = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path, vocab_padding=2000)).eval()
    prompts = [prompt_of(length) for length in (3, 7, 12)]
    settings: dict[str, Any] = {"end_ids": frozenset(), "pad_id": 0, "max_new_tokens": 8, "batch_size": 2}
    masked = greedy(padded, prompts, num_shared_ids=NUM_SHARED_IDS, **settings)
    unmasked = greedy(padded, prompts, num_shared_ids=NUM_SHARED_IDS + 2000, **settings)
    assert max(completion.max() for completion in masked) < NUM_SHARED_IDS
    assert max(completion.max() for completion in unmasked) >= NUM_SHARED_IDS


def test_greedy_of_the_real_model_equals_generate(demo_model_dir: Path) -> None:
    student = load_student(demo_model_dir, device="cpu")
    prompts = [
        np.array(
            student.tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)[
                "input_ids"
            ],
            np.int64,
        )
        for question in ("What is the capital of France?", "Name a colour.")
    ]
    model = student.module.model
    completions = greedy(
        model,
        prompts,
        end_ids=student.end_ids,
        pad_id=student.pad_id,
        max_new_tokens=8,
        num_shared_ids=student.vocab_size,
        batch_size=2,
    )
    assert "Paris" in student.tokenizer.decode(completions[0])
    expected = [generated(model, prompt, student.end_ids, 8) for prompt in prompts]
    assert [completion.tolist() for completion in completions] == expected
