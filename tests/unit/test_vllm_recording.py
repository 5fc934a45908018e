"""From vLLM's answers to rollouts and from rollout keys to vLLM's requests, without vLLM."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vopd_client.errors import ConfigError, NonFiniteError, RolloutEngineError
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.support import adaptive_support
from vopd_client.rollouts.vllm_facts import EngineFacts, StudentShape, check_settings, check_student
from vopd_client.rollouts.vllm_recording import Generation, cut_support, rollout_of
from vopd_client.rollouts.vllm_request import NEVER, DrawSettings, request_seed, sampling_parameters
from vopd_client.rollouts.vllm_server import generation_of

KEY = RolloutKey(step=3, prompt_index=5, rollout_index=1)
SETTINGS = DrawSettings(
    num_shared_ids=10, vocab_size=12, end_ids=frozenset({7, 11}), max_new_tokens=4, temperature=0.5, top_k=3, seed=1
)


def generation(**changes: Any) -> Generation:
    """Two tokens; the second is not among its three most likely."""
    made = Generation(
        token_ids_T=np.array([4, 9]),
        sampled_logprobs_T=np.log(np.array([0.6, 0.05], np.float32)),
        top_ids_TK=np.array([[4, 1, 2], [3, 8, 0]]),
        top_logprobs_TK=np.log(np.array([[0.6, 0.3, 0.05], [0.4, 0.3, 0.2]], np.float32)),
        finish_reason="length",
        weight_versions=("run/2",),
    )
    return replace(made, **changes)


def recorded(made: Generation, **changes: Any) -> Rollout:
    settings: dict[str, Any] = {
        "end_ids": frozenset({7}),
        "num_shared_ids": 10,
        "max_tokens": 4,
        "support_mass": 0.85,
        "weight_version": "run/2",
    }
    return rollout_of(made, KEY, np.array([1, 2]), **{**settings, **changes})


def test_the_support_is_the_engines_top_cut_by_mass_whatever_was_sampled() -> None:
    rollout = recorded(generation())
    assert rollout.support_counts_T.tolist() == [2, 3]
    assert rollout.support_ids.tolist() == [4, 1, 3, 8, 0]  # 9 was sampled second, and is in no support
    np.testing.assert_allclose(rollout.support_mass_T, [0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(rollout.behaviour_logprobs_T, np.log([0.6, 0.05]), rtol=1e-6)
    assert not rollout.ended
    assert rollout.completion_ids.tolist() == [4, 9]


def test_it_ended_when_its_last_token_is_an_end_token_even_at_the_limit() -> None:
    assert recorded(generation(token_ids_T=np.array([4, 7]), finish_reason="stop")).ended
    assert recorded(generation(token_ids_T=np.array([4, 7])), max_tokens=2).ended


@pytest.mark.parametrize("support_mass", [0.3, 0.9, 0.999, 1.0])
def test_the_cut_is_the_one_of_the_trainers_own_sampler(support_mass: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = 4 * torch.randn(200, 40, generator=generator)
    logits_BV[:, 30:] = -math.inf  # of probability zero
    expected = adaptive_support(logits_BV, logits_BV.logsumexp(-1), top_k=35, support_mass=support_mass)
    top = logits_BV.log_softmax(-1).topk(35, dim=-1)
    counts_T, mass_T = cut_support(top.values.numpy(), support_mass=support_mass)
    assert counts_T.tolist() == expected.counts_B.tolist()
    np.testing.assert_allclose(mass_T, expected.mass_B.numpy(), rtol=1e-5)
    assert len(set(counts_T.tolist())) == (1 if support_mass == 1 else len(set(expected.counts_B.tolist())))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"finish_reason": "abort"}, RolloutEngineError, "gave 2 of at most 4 tokens for .* and said 'abort'"),
        ({"token_ids_T": np.array([], np.int64)}, RolloutEngineError, "gave 0 of at most 4 tokens"),
        ({"weight_versions": ("run/1",)}, RolloutEngineError, "with weights run/1 and not with run/2"),
        ({"weight_versions": ("run/2", "run/3")}, RolloutEngineError, "with weights run/2, run/3 and not"),
        ({"weight_versions": ()}, RolloutEngineError, "with weights of no version and not with run/2"),
        ({"token_ids_T": np.array([4, 10])}, RolloutEngineError, "sampled id 10 .* only ids below 10 are shared"),
        ({"sampled_logprobs_T": np.array([-1, np.nan])}, NonFiniteError, "completion token 1 of RolloutKey"),
        ({"sampled_logprobs_T": np.array([-9999.0, -1])}, NonFiniteError, "completion token 0 of RolloutKey"),
    ],
)
def test_what_must_not_pass_is_an_error_with_its_facts(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recorded(generation(**changes))


def test_a_request_asks_for_a_draw_from_the_whole_distribution() -> None:
    parameters = sampling_parameters(SETTINGS, KEY, max_tokens=4)
    assert parameters["temperature"] == 0.5
    assert (parameters["top_p"], parameters["top_k"], parameters["min_p"]) == (1.0, 0, 0.0)
    assert parameters["repetition_penalty"] == 1.0
    assert parameters["ignore_eos"] is True
    assert parameters["stop_token_ids"] == [7]  # 11 cannot be sampled
    assert parameters["logit_bias"] == {10: NEVER, 11: NEVER}
    assert (parameters["max_tokens"], parameters["min_tokens"], parameters["logprobs"]) == (4, 0, 3)
    assert sampling_parameters(replace(SETTINGS, vocab_size=10), KEY, max_tokens=4)["logit_bias"] is None
    assert sampling_parameters(replace(SETTINGS, top_k=100), KEY, max_tokens=4)["logprobs"] == 10


def test_an_id_that_is_never_sampled_has_no_share_of_the_normaliser() -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(0))
    biased_V = logits_V.clone()
    biased_V[10:] += NEVER
    assert torch.equal((biased_V / 0.5).log_softmax(-1)[:10], (logits_V[:10] / 0.5).log_softmax(-1))
    assert (biased_V / 0.5).softmax(-1)[10:].tolist() == [0, 0]


def test_seeds_differ_by_everything_that_names_a_draw() -> None:
    keys = [KEY, RolloutKey(4, 5, 1), RolloutKey(3, 6, 1), RolloutKey(3, 5, 2), RolloutKey(3, 5, 1, turn=1)]
    seeds = {request_seed(seed, key) for seed in (1, 2) for key in keys}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, KEY) == request_seed(1, RolloutKey(3, 5, 1))


def entry(token_id: int, rank: int | None, logprob: float) -> dict[str, Any]:
    return {"token_id": token_id, "rank": rank, "logprob": logprob}


def answer(positions: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> dict[str, Any]:
    """A GenerateResponse of vLLM, with what is not read left out."""
    content = [{**sampled, "top_logprobs": top} for sampled, top in positions]
    choice = {
        "token_ids": [sampled["token_id"] for sampled, _ in positions],
        "finish_reason": "length",
        "logprobs": {"content": content},
        "weight_versions": [{"version": "v", "start": 0, "end": len(positions)}],
    }
    return {"request_id": "1", "choices": [choice]}


def test_a_servers_top_is_read_by_rank_wherever_the_sampled_id_stands() -> None:
    """Asked for K + 1 = 3, the server puts the sampled id first and leaves out what is then too many."""
    inside, outside = entry(5, 2, -1.0), entry(6, 9, -5.0)
    made = generation_of(
        answer(
            [
                (inside, [inside, entry(1, 1, -0.5), entry(2, 3, -2.0)]),
                (outside, [outside, entry(1, 1, -0.5), entry(5, 2, -1.0)]),
                (entry(2, 3, -2.0), [entry(2, 3, -2.0), entry(1, 1, -0.5), entry(5, 2, -1.0)]),
                # Equal logits: the engine's order is a function of the logits, and the rank keeps it.
                (entry(2, 2, -1.0), [entry(2, 2, -1.0), entry(9, 1, -1.0), entry(5, 3, -1.0)]),
            ]
        ),
        num_logprobs=2,
    )
    assert made.top_ids_TK.tolist() == [[1, 5], [1, 5], [1, 5], [9, 2]]
    np.testing.assert_allclose(made.top_logprobs_TK[0], [-0.5, -1.0])
    np.testing.assert_allclose(made.sampled_logprobs_T, [-1.0, -5.0, -2.0, -1.0])
    assert made.weight_versions == ("v",)


def test_a_nan_that_the_server_could_not_write_is_one_again() -> None:
    broken = entry(5, None, -9999.0)
    made = generation_of(answer([(broken, [broken, entry(1, None, -9999.0)])]), num_logprobs=1)
    with pytest.raises(NonFiniteError, match="completion token 0"):
        recorded(replace(made, weight_versions=("run/2",)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"choices": []}, "not enough values"),
        ({"choices": [{"token_ids": [1]}]}, "finish_reason"),
        (answer([(entry(5, 1, -1.0), [entry(5, 1, -1.0)])]), r"ranks \[1\] instead of 1 to 2"),
    ],
)
def test_an_answer_that_cannot_be_read_is_an_error(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutEngineError, match=message):
        generation_of(wrong, num_logprobs=2)


FACTS = EngineFacts(
    vllm_version="0.32.0",
    model="org/student",
    architecture="LlamaForCausalLM",
    vocab_size=12,
    hidden_size=8,
    num_layers=2,
    max_model_len=64,
    max_logprobs=20,
    logprobs_mode="raw_logprobs",
    dtype="bfloat16",
    device="cuda",
    weight_transfer="nccl",
    world_size=1,
)


def test_every_missing_flag_of_an_engine_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_settings(FACTS, num_logprobs=101, max_length=1280, where="the rollout server at http://a:1")
    assert str(raised.value) == (
        "the rollout server at http://a:1 must be started with --logprobs-mode processed_logprobs (it has "
        "raw_logprobs, which knows no temperature and no masked ids) and --max-logprobs 101 (it has 20) and "
        "--max-model-len 1280 (it has 64; prompt and completion must fit)"
    )
    unlimited = FACTS.model_copy(update={"logprobs_mode": "processed_logprobs", "max_logprobs": -1})
    check_settings(unlimited, num_logprobs=101, max_length=64, where="it")


def test_another_model_is_told_by_every_difference() -> None:
    student = StudentShape(architecture="Qwen3ForCausalLM", vocab_size=12, hidden_size=16, num_layers=2)
    with pytest.raises(ConfigError, match=r"serves org/student, which is not the student: architecture .* hidden_size"):
        check_student(FACTS, student, where="it")
