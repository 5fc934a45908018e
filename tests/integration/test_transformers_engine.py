"""The transformers engine on real (mostly tiny) models, against a plain forward of one sequence at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

from tiny_model import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_model
from vopd_proto.arrays import IntArray
from vopd_server.engines.loading import LoadedModel, directory_revision, load_model
from vopd_server.engines.scoring_model import scoring_model
from vopd_server.engines.transformers import EngineStats, TransformersEngine
from vopd_server.errors import ConfigError, EngineError, InvalidRequestError, UnavailableError
from vopd_server.types import Candidates, HeadFile, HiddenStates, NoSupport, ScoreRequest, Scores, Support, TeacherTopK

V = 259  # of the tiny model
TOLERANCE_NATS = 1e-4


@asynccontextmanager
async def serving(model_dir: Path, **settings: Any) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(model=str(model_dir), device="cpu", **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def score_all(engine: TransformersEngine, requests: Sequence[ScoreRequest]) -> list[Scores]:
    return list(await asyncio.gather(*map(engine.score, requests)))


def request(
    context_ids: IntArray, completion_ids: IntArray, support: Support | None = None, temperature: float = 1.0
) -> ScoreRequest:
    return ScoreRequest("test", context_ids, completion_ids, support or NoSupport(), temperature)


def random_requests(
    rng: np.random.Generator, count: int, *, vocab_size: int = V, max_length: int = 40
) -> list[ScoreRequest]:
    """Half of them on four shared contexts; completions from none to 24 tokens; every support; three temperatures."""
    shared = [rng.integers(0, vocab_size, rng.integers(1, max_length)) for _ in range(4)]
    requests = []
    for index in range(count):
        alone = rng.integers(0, vocab_size, rng.integers(1, max_length))
        length = int(rng.choice([0, 1, 1, 2, 7, 24]))
        counts_T = rng.integers(0, 6, length)
        candidates = Candidates(rng.integers(0, vocab_size, counts_T.sum()), counts_T)
        supports = (NoSupport(), TeacherTopK(5), candidates, HiddenStates())
        requests.append(
            request(
                shared[index % 4] if index % 2 else alone,
                rng.integers(0, vocab_size, length),
                supports[index // 2 % 4],
                temperature=float(rng.choice([1.0, 0.4, 2.0])),
            )
        )
    return requests


def plain_logprobs(model: Any, asked: ScoreRequest) -> np.ndarray[Any, Any]:
    """[T, V] by one forward of the one sequence: the reference."""
    ids = torch.as_tensor(np.concatenate((asked.context_ids, asked.completion_ids)))
    first = len(asked.context_ids) - 1
    with torch.inference_mode():
        logits_TV = model(input_ids=ids[None]).logits[0, first : first + len(asked.completion_ids)]
        logprobs: np.ndarray[Any, Any] = (logits_TV.float() / asked.temperature).log_softmax(-1).numpy()
    return logprobs


def assert_close_to_plain(model: Any, asked: ScoreRequest, scores: Scores) -> None:
    expected_TV = plain_logprobs(model, asked)
    positions = np.arange(len(asked.completion_ids))
    assert (scores.hidden_states_TH is not None) == isinstance(asked.support, HiddenStates)

    def close(actual: Any, expected: Any) -> None:
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE_NATS, rtol=0)

    close(scores.sampled_logprobs_T, expected_TV[positions, asked.completion_ids])
    match asked.support:
        case Candidates(ids=ids, counts_T=counts_T):
            close(scores.support_logprobs, expected_TV[np.repeat(positions, counts_T), ids])
        case TeacherTopK(k=k):
            assert scores.support_ids_TK is not None
            close(scores.support_logprobs, -np.sort(-expected_TV, axis=-1)[:, :k])
            close(scores.support_logprobs, np.take_along_axis(expected_TV, scores.support_ids_TK, 1))
        case _:
            assert scores.support_logprobs is None
            assert scores.support_ids_TK is None


def through_head(head: HeadFile, hidden_TH: Any, *, temperature: float, dtype: torch.dtype = torch.float32) -> Any:
    """[T, V] as a client computes it, from the file alone."""
    with safe_open(head.path, "pt") as file:
        tensors, transform = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    hidden_TH = torch.as_tensor(np.array(hidden_TH)).to(dtype)
    logits_TV = torch.nn.functional.linear(hidden_TH, tensors["weight"], tensors.get("bias")).float()
    logits_TV *= float(transform["logit_scale"])
    if softcap := transform.get("softcap"):
        logits_TV = float(softcap) * torch.tanh(logits_TV / float(softcap))
    return (logits_TV / temperature).log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


# ------------------------------------------------------------------ right, whatever the company


@pytest.mark.parametrize(
    "settings", [{}, {"max_batch_tokens": 100}, {"deterministic": True}, {"chunk_elements": 3 * V}]
)
async def test_scores_equal_a_plain_forward_whatever_the_batch(
    tiny_model_dir: Path, tiny_model: Any, settings: dict[str, Any]
) -> None:
    requests = random_requests(np.random.default_rng(0), 60)
    async with serving(tiny_model_dir, **settings) as engine:
        scores = await score_all(engine, requests)
    for asked, answer in zip(requests, scores, strict=True):
        assert_close_to_plain(tiny_model, asked, answer)


async def test_scores_of_the_demo_model_equal_a_plain_forward(demo_model_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model_dir).eval()
    requests = random_requests(np.random.default_rng(1), 14, vocab_size=49_152, max_length=20)
    async with serving(demo_model_dir) as engine:
        scores = await score_all(engine, requests)
        assert engine.stats.context_tokens_reused > 0
    for asked, answer in zip(requests, scores, strict=True):
        assert_close_to_plain(model, asked, answer)


COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
SMALL_GPT: dict[str, Any] = {"vocab_size": V, "num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32}
ARCHITECTURES: dict[str, tuple[Any, bool]] = {  # config, and whether its contexts can be shared
    "cohere": (transformers.CohereConfig(**COMMON, logit_scale=0.0625), True),
    "gemma2": (transformers.Gemma2Config(**COMMON, head_dim=8, sliding_window=5, final_logit_softcapping=3.0), True),
    "gpt2": (transformers.GPT2Config(**SMALL_GPT, bos_token_id=0, eos_token_id=0, initializer_range=0.3), True),
    "granite": (transformers.GraniteConfig(**COMMON, logits_scaling=8.0), True),
    "mistral": (transformers.MistralConfig(**COMMON, sliding_window=5), True),
    "opt": (transformers.OPTConfig(**SMALL_GPT, ffn_dim=64, word_embed_proj_dim=16, init_std=0.3), True),
    "phi": (transformers.PhiConfig(**{**COMMON, "num_key_value_heads": 4}), True),  # a bias in its head
    "recurrent_gemma": (
        transformers.RecurrentGemmaConfig(**{**COMMON, "num_hidden_layers": 3}, lru_width=32, attention_window_size=64),
        False,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_other_architectures_score_as_they_do_themselves(name: str, tmp_path: Path) -> None:
    config, shares = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    requests = random_requests(np.random.default_rng(2), 24)
    async with serving(tmp_path, allow_full_vocab=True) as engine:
        scores = await score_all(engine, requests)
        assert (engine.stats.context_tokens_reused > 0) == shares
        reused = engine.stats.context_tokens_reused
        again = [await engine.score(one) for one in requests]  # one after the other: only what is kept can be shared
        assert (engine.stats.context_tokens_reused > reused) == shares
        for asked, answer in zip(requests * 2, scores + again, strict=True):
            assert_close_to_plain(model, asked, answer)
            if answer.hidden_states_TH is not None:
                assert engine.info.head is not None
                ours_TV = through_head(engine.info.head, answer.hidden_states_TH, temperature=asked.temperature)
                np.testing.assert_allclose(ours_TV, plain_logprobs(model, asked), atol=TOLERANCE_NATS, rtol=0)


async def test_ids_beyond_the_tokenizer_are_scored_when_the_head_is_padded(tmp_path: Path) -> None:
    padded = write_tiny_model(tmp_path, vocab_padding=61)
    model = transformers.AutoModelForCausalLM.from_pretrained(padded).eval()
    asked = request(np.array([1, 2]), np.array([V + 60, 3]), TeacherTopK(V + 61))
    async with serving(padded) as engine:
        assert engine.info.vocab_size == V + 61
        assert len(engine.tokenizer.tokens) == V
        assert_close_to_plain(model, asked, await engine.score(asked))


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_hidden_states_are_the_very_values_that_the_models_head_reads(
    tiny_model_dir: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Read alone, in one forward or two, there is nothing to round differently: bits, not tolerances."""
    asked = request(np.arange(9), np.arange(20, 26), HiddenStates(), temperature=0.7)
    seen: list[torch.Tensor] = []
    async with serving(
        tiny_model_dir, dtype=str(dtype).removeprefix("torch."), allow_full_vocab=True, **settings
    ) as engine:
        linear = engine._scoring_model.head.linear  # type: ignore[union-attr]
        linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
        scores = await engine.score(asked)
        assert engine.info.head is not None
        ours_TV = through_head(engine.info.head, scores.hidden_states_TH, temperature=0.7, dtype=dtype)
    assert scores.hidden_states_TH is not None
    assert scores.hidden_states_TH.dtype == np.float32
    np.testing.assert_array_equal(scores.hidden_states_TH, torch.cat(seen).float().numpy())
    assert scores.hidden_states_TH.shape == (6, 32)
    # The same product, of the same numbers in the same type; the log-softmax alone is written in another way.
    sampled_T = ours_TV[np.arange(6), asked.completion_ids]
    np.testing.assert_allclose(scores.sampled_logprobs_T, sampled_T, atol=1e-5, rtol=0)


async def test_an_empty_completion_has_no_hidden_states(tiny_model_dir: Path) -> None:
    async with serving(tiny_model_dir, allow_full_vocab=True) as engine:
        scores = await engine.score(request(np.arange(3), np.arange(0), HiddenStates()))
        assert engine.stats.forwards == 0
    assert scores.hidden_states_TH is not None
    assert scores.hidden_states_TH.shape == (0, 32)


# ------------------------------------------------------------------ what it costs


async def test_a_shared_context_is_read_once(tiny_model_dir: Path) -> None:
    context_length, group, completion_length = 50, 6, 9
    context_ids = np.arange(context_length)
    requests = [request(context_ids, np.arange(seed, seed + completion_length)) for seed in range(group)]
    tokens_read: list[int] = []
    async with serving(tiny_model_dir) as engine:
        embedding = engine._scoring_model.backbone._base_model.get_input_embeddings()  # type: ignore[union-attr]
        embedding.register_forward_hook(lambda _module, inputs, _output: tokens_read.append(inputs[0].numel()))
        await score_all(engine, requests)
        stats = engine.stats
    # The last completion token predicts nothing asked for, so each completion costs one token less.
    assert tokens_read == [context_length, group * (completion_length - 1)]
    assert stats == EngineStats(
        requests_scored=group,
        passes=1,
        forwards=2,
        tokens_forwarded=context_length + group * (completion_length - 1),
        padding_tokens=0,
        context_tokens_reused=(group - 1) * context_length,
    )


async def test_a_shared_context_is_read_once_for_all_waves_of_a_small_budget(tiny_model_dir: Path) -> None:
    requests = [request(np.arange(50), np.arange(seed, seed + 11)) for seed in range(5)]
    async with serving(tiny_model_dir, max_batch_tokens=130) as engine:
        await score_all(engine, requests)
        assert engine.stats.forwards == 1 + 3  # waves of 2, 2 and 1 rows of 50 + 10 tokens
        assert engine.stats.tokens_forwarded == 50 + 5 * 10


@asynccontextmanager
async def counting(model_dir: Path, **settings: Any) -> AsyncIterator[tuple[TransformersEngine, list[int]]]:
    """An engine, and the tokens that its model reads, a number for each forward."""
    tokens_read: list[int] = []
    async with serving(model_dir, **settings) as engine:
        embedding = engine._scoring_model.backbone._base_model.get_input_embeddings()  # type: ignore[union-attr]
        embedding.register_forward_hook(lambda _module, inputs, _output: tokens_read.append(inputs[0].numel()))
        yield engine, tokens_read


async def test_a_group_that_arrives_one_by_one_reads_its_context_once(tiny_model_dir: Path, tiny_model: Any) -> None:
    group = [request(np.arange(50), np.arange(seed, seed + 9), TeacherTopK(5)) for seed in range(3)]
    async with counting(tiny_model_dir) as (engine, tokens_read):
        scores = [await engine.score(one) for one in group]
        assert engine.stats.context_tokens_reused == 2 * 50
    assert tokens_read == [50 + 8, 8, 8]
    for asked, answer in zip(group, scores, strict=True):
        assert_close_to_plain(tiny_model, asked, answer)


async def test_late_members_of_several_groups_go_on_together_from_contexts_of_unlike_length(
    tiny_model_dir: Path, tiny_model: Any
) -> None:
    contexts = [np.arange(length) for length in (50, 7, 33)]
    late = [request(ids, np.arange(seed, seed + 9), TeacherTopK(5)) for seed, ids in enumerate(contexts * 2)]
    async with counting(tiny_model_dir) as (engine, tokens_read):
        await score_all(engine, [request(ids, np.arange(4)) for ids in contexts[:2]])
        tokens_read.clear()
        scores = await score_all(engine, late)
    assert tokens_read == [33, 6 * 8]  # the third group's context was new
    for asked, answer in zip(late, scores, strict=True):
        assert_close_to_plain(tiny_model, asked, answer)


async def test_the_same_tokens_again_get_the_same_scores_and_only_their_completion_is_read(
    tiny_model_dir: Path, tiny_model: Any
) -> None:
    asked = request(np.arange(50), np.arange(9), Candidates(np.arange(18), np.full(9, 2)))
    async with counting(tiny_model_dir) as (engine, tokens_read):
        first, second = await engine.score(asked), await engine.score(asked)
    assert tokens_read == [58, 8]
    for answer in (first, second):
        assert_close_to_plain(tiny_model, asked, answer)


async def test_another_tenants_context_is_read_anew(tiny_model_dir: Path) -> None:
    mine = request(np.arange(50), np.arange(9))
    async with counting(tiny_model_dir) as (engine, tokens_read):
        await engine.score(replace(mine, cache_salt="mine"))
        await engine.score(replace(mine, cache_salt="yours"))
        assert engine.stats.context_tokens_reused == 0
    assert tokens_read == [58, 58]


async def test_no_more_contexts_are_kept_than_there_is_room_for(tiny_model_dir: Path) -> None:
    contexts = [np.arange(first, first + 40) for first in range(3)]
    async with counting(tiny_model_dir, context_cache_tokens=100) as (engine, tokens_read):
        for ids in (*contexts, contexts[2], contexts[1], contexts[0], np.arange(101), np.arange(101)):
            await engine.score(request(ids, np.arange(9)))
        assert engine._kept.num_tokens <= 100
    # The first went when the third came; what is longer than the whole room is read again each time.
    assert tokens_read == [48, 48, 48, 8, 8, 48, 109, 109]
    assert engine._kept.num_tokens == 0  # closed


async def test_nothing_is_kept_where_it_is_switched_off(tiny_model_dir: Path) -> None:
    async with counting(tiny_model_dir, context_cache_tokens=0) as (engine, tokens_read):
        for _ in range(2):
            await engine.score(request(np.arange(50), np.arange(9)))
    assert tokens_read == [58, 58]


async def test_one_token_completions_cost_their_contexts_alone(tiny_model_dir: Path) -> None:
    requests = [request(np.arange(20), np.array([seed])) for seed in range(5)]
    async with serving(tiny_model_dir) as engine:
        await score_all(engine, requests)
        assert (engine.stats.forwards, engine.stats.tokens_forwarded) == (1, 20)


async def test_an_empty_completion_costs_nothing_and_has_no_rows(tiny_model_dir: Path) -> None:
    async with serving(tiny_model_dir) as engine:
        scores = await engine.score(request(np.arange(3), np.arange(0), TeacherTopK(4)))
        assert engine.stats.forwards == 0
    assert scores.sampled_logprobs_T.shape == (0,)
    assert scores.support_ids_TK is not None
    assert scores.support_ids_TK.shape == (0, 4)


async def test_requests_of_one_batch_report_its_time_and_their_own_wait(tiny_model_dir: Path) -> None:
    requests = [request(np.array([seed]), np.arange(5)) for seed in range(3)]
    async with serving(tiny_model_dir) as engine:
        scores = await score_all(engine, requests)
        assert engine.stats.forwards == 1
    assert len({answer.engine_time_s for answer in scores}) == 1
    assert scores[0].engine_time_s > 0
    waits = [answer.queue_time_s for answer in scores]
    assert waits == sorted(waits, reverse=True)
    assert waits[-1] > 0


# ------------------------------------------------------------------ deterministic

DIGEST_SCRIPT = """
import asyncio, hashlib, sys
import numpy as np
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.types import Candidates, ScoreRequest, TeacherTopK

async def main(model_dir, concurrency, context_cache_tokens):
    rng = np.random.default_rng(3)
    contexts = [rng.integers(0, 259, length) for length in (5, 30, 30, 61)]
    requests = []
    for index in range(24):
        completion = rng.integers(0, 259, [1, 13, 40][index % 3])
        support = TeacherTopK(6) if index % 2 else Candidates(completion[::-1].copy(), np.ones_like(completion))
        requests.append(ScoreRequest("r", contexts[index % 4], completion, support, [1.0, 0.7][index % 2]))
    engine = TransformersEngine(
        model=model_dir, device="cpu", deterministic=True, chunk_elements=7 * 259,
        context_cache_tokens=context_cache_tokens,
    )
    await engine.start()
    digest = hashlib.sha256()
    for start in range(0, len(requests), concurrency):
        for scores in await asyncio.gather(*map(engine.score, requests[start : start + concurrency])):
            digest.update(scores.sampled_logprobs_T.tobytes() + scores.support_logprobs.tobytes())
    await engine.close()
    print(digest.hexdigest(), engine.stats.forwards)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


def test_deterministic_scores_have_the_same_bits_in_any_company_and_process(tiny_model_dir: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST_SCRIPT, str(tiny_model_dir), str(concurrency), str(context_cache_tokens)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for concurrency, context_cache_tokens in ((1, 0), (1, 1000), (24, 0))
    ]
    outputs = [process.communicate(timeout=200)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    digests, forwards = {digest for digest, _ in outputs}, [int(count) for _, count in outputs]
    assert len(digests) == 1
    assert forwards[0] > forwards[1] == forwards[2]  # alone and with nothing kept, every context was read again


# ------------------------------------------------------------------ failures reach those they concern


async def test_nan_fails_its_own_request_and_no_other(tmp_path: Path) -> None:
    broken = write_tiny_model(tmp_path, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken).eval()
    torch.nn.init.constant_(model.get_input_embeddings().weight[200], torch.nan)
    model.save_pretrained(broken)
    fine = [request(np.arange(3 + seed), np.arange(1, 6), TeacherTopK(2)) for seed in range(2)]
    fine.append(request(np.arange(5), np.arange(1, 6), HiddenStates()))
    poisoned = request(np.arange(4), np.array([1, 2, 200, 3]), HiddenStates())
    on_shared_context = request(np.arange(5), np.array([200, 3]))  # shares the context of fine[2]
    async with serving(broken) as engine:
        results = await asyncio.gather(*map(engine.score, [*fine, poisoned, on_shared_context]), return_exceptions=True)
    for asked, answer in zip(fine, results[:3], strict=True):
        assert isinstance(answer, Scores)
        assert_close_to_plain(model, asked, answer)
    assert isinstance(results[3], EngineError)
    assert "of 4 completion tokens" in str(results[3])
    assert isinstance(results[4], EngineError)


async def test_an_exception_in_the_model_fails_its_batch_and_the_engine_serves_on(
    tiny_model_dir: Path, tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    impossible = request(np.array([V + 1]), np.array([1, 2]))  # an id that validation would have refused
    group = [request(np.array([V + 1]), np.array([seed, 2])) for seed in range(2)]
    asked = request(np.arange(5), np.arange(6))
    async with serving(tiny_model_dir) as engine:
        with pytest.raises(EngineError, match="IndexError") as caught:
            await engine.score(impossible)
        assert isinstance(caught.value.__cause__, IndexError)
        for result in await asyncio.gather(*map(engine.score, group), return_exceptions=True):
            assert isinstance(result, EngineError)  # where the shared context fails, too
        assert_close_to_plain(tiny_model, asked, await engine.score(asked))
    assert "a batch failed" in caplog.text


async def test_cancelled_calls_are_dropped_before_they_run(tiny_model_dir: Path, tiny_model: Any) -> None:
    requests = [request(np.arange(5 + seed), np.arange(6)) for seed in range(4)]
    async with serving(tiny_model_dir) as engine:
        calls = [asyncio.create_task(engine.score(asked)) for asked in requests]
        await asyncio.sleep(0)  # all are queued, none has run
        calls[0].cancel()
        calls[2].cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert engine.stats.requests_scored == 2
        assert engine.stats.tokens_forwarded == 2 * (8 + 5)  # 6 + 5 and 8 + 5 tokens, padded
        lonely = asyncio.create_task(engine.score(requests[0]))
        await asyncio.sleep(0)
        lonely.cancel()
        assert_close_to_plain(tiny_model, requests[0], await engine.score(requests[0]))
    assert [type(result) for result in results[::2]] == [asyncio.CancelledError] * 2
    for asked, answer in zip(requests[1::2], results[1::2], strict=True):
        assert isinstance(answer, Scores)
        assert_close_to_plain(tiny_model, asked, answer)


async def test_close_fails_what_is_queued_and_leaves_no_thread(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(model=str(tiny_model_dir), device="cpu", max_batch_tokens=1)
    with pytest.raises(UnavailableError, match="not started"):
        await engine.score(request(np.arange(3), np.arange(2)))
    await engine.start()
    calls = [asyncio.create_task(engine.score(request(np.arange(3 + seed), np.arange(4)))) for seed in range(20)]
    await asyncio.sleep(0)
    await engine.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    kinds = {type(result) for result in results}
    assert UnavailableError in kinds  # the budget lets one request run at a time
    assert kinds <= {UnavailableError, Scores}
    with pytest.raises(UnavailableError):
        await engine.score(request(np.arange(3), np.arange(2)))
    assert not any(thread.is_alive() for thread in engine._executor._threads)


async def test_close_without_start_and_close_twice_are_harmless(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(model=str(tiny_model_dir), device="cpu")
    await engine.close()
    async with serving(tiny_model_dir) as started:
        await started.close()


async def test_k_beyond_the_vocabulary_is_refused_without_harm_to_others(tiny_model_dir: Path) -> None:
    async with serving(tiny_model_dir) as engine:
        good, bad = await asyncio.gather(
            engine.score(request(np.arange(3), np.arange(4), TeacherTopK(V))),
            engine.score(request(np.arange(3), np.arange(4), TeacherTopK(V + 1))),
            return_exceptions=True,
        )
    assert isinstance(good, Scores)
    assert isinstance(bad, InvalidRequestError)
    assert "260 > vocab_size 259" in str(bad)


# ------------------------------------------------------------------ loading


async def test_loading_leaves_the_event_loop_free(tiny_model_dir: Path) -> None:
    num_ticks = 0

    async def tick() -> None:
        nonlocal num_ticks
        while True:
            num_ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    async with serving(tiny_model_dir):
        ticking.cancel()
        assert num_ticks > 2


async def test_info_says_what_is_served(tiny_model_dir: Path) -> None:
    async with serving(tiny_model_dir, dtype="bfloat16", max_context_length=100_000, deterministic=True) as engine:
        pass
    info = engine.info  # which a closed engine still knows
    assert info.model_id == str(tiny_model_dir)
    assert info.model_revision == directory_revision(tiny_model_dir)
    assert (info.engine, info.engine_version) == ("transformers", transformers.__version__)
    assert (info.dtype, info.vocab_size, info.hidden_size) == ("bfloat16", V, 32)
    assert info.max_context_length == 32_768  # the model's own
    assert info.supports == {"sampled", "teacher_top_k", "candidates"}
    assert info.any_temperature
    assert info.deterministic


async def test_the_head_is_there_from_start_to_close_where_it_is_allowed(tiny_model_dir: Path) -> None:
    async with serving(tiny_model_dir, allow_full_vocab=True) as engine:
        info = engine.info
        assert info.supports == {"sampled", "teacher_top_k", "candidates", "hidden_states"}
        assert info.head is not None
        data = info.head.path.read_bytes()
        assert info.head.num_bytes == len(data) > V * 32 * 4
        assert info.head.sha256 == hashlib.sha256(data).hexdigest()
    assert not info.head.path.parent.exists()
    async with serving(tiny_model_dir, allow_full_vocab=True) as again:
        assert again.info.head is not None
        assert again.info.head.sha256 == info.head.sha256
        assert again.info.head.path != info.head.path
    async with serving(tiny_model_dir) as closed:
        assert closed.info.head is None
        assert closed.info.supports == {"sampled", "teacher_top_k", "candidates"}


@pytest.fixture
def head_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[Path]]:
    """Those that are there now, of the heads written in this test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return lambda: list(place.glob("vopd-head-*"))


async def test_a_start_that_fails_leaves_no_head_behind(
    tiny_model_dir: Path, head_directories: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_arguments: Any, **_settings: Any) -> HeadFile:
        assert len(head_directories()) == 1
        raise ConfigError("no room")

    monkeypatch.setattr("vopd_server.engines.transformers.write_head_file", write)
    engine = TransformersEngine(model=str(tiny_model_dir), device="cpu", allow_full_vocab=True)
    with pytest.raises(ConfigError, match="no room"):
        await engine.start()
    assert head_directories() == []
    await engine.close()


async def test_a_start_that_is_cancelled_leaves_no_head_behind_once_closed(
    tiny_model_dir: Path, head_directories: Callable[[], list[Path]]
) -> None:
    engine = TransformersEngine(model=str(tiny_model_dir), device="cpu", allow_full_vocab=True)
    starting = asyncio.create_task(engine.start())
    while not head_directories():  # noqa: ASYNC110  # written by the engine's thread
        await asyncio.sleep(0.001)
    starting.cancel()
    await asyncio.wait((starting,))
    await engine.close()
    assert head_directories() == []


async def test_a_head_that_cannot_be_given_away_keeps_the_teacher_from_starting(
    tiny_model_dir: Path, head_directories: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class CompressedLinear(torch.nn.Linear):
        """Computes as a linear layer does and is none."""

    def load_compressed(*arguments: Any, **settings: Any) -> LoadedModel:
        loaded = load_model(*arguments, **settings)
        loaded.model.lm_head.__class__ = CompressedLinear
        return loaded

    monkeypatch.setattr("vopd_server.engines.transformers.load_model", load_compressed)
    async with serving(tiny_model_dir) as engine:
        await engine.score(request(np.arange(3), np.arange(4)))
    with pytest.raises(ConfigError, match=r"the output head cannot be given away: it is a .*CompressedLinear"):
        await TransformersEngine(model=str(tiny_model_dir), device="cpu", allow_full_vocab=True).start()
    assert head_directories() == []


async def test_the_tokenizer_is_described_with_every_end_id(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 3]}))
    async with serving(directory) as engine:
        tokenizer = engine.tokenizer
    assert tokenizer.end_ids == (257, 258, 3)  # the tokenizer's own, the main one, first
    assert (tokenizer.begin_id, tokenizer.pad_id) == (256, 257)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.tokens[256:] == (b"<|start|>", b"<|end|>", b"<|other_end|>")
    rebuilt = Tokenizer.from_str(tokenizer.tokenizer_json)
    assert rebuilt.encode("hello").ids == tiny_tokenizer().encode("hello")


def test_a_directory_revision_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "first", seed=0)
    copied = Path(shutil.copytree(first, tmp_path / "copied"))
    retrained = write_tiny_model(tmp_path / "retrained", seed=1)
    assert directory_revision(first) == directory_revision(copied)
    assert directory_revision(first) != directory_revision(retrained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, "cannot load the model 'no/such-model'"),
        ({"device": "abacus"}, "'abacus' is not a device"),
        ({"device": "meta:99"}, "'meta:99' is not on this machine"),
    ],
)
async def test_what_cannot_be_loaded_is_a_config_error(
    tiny_model_dir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        await TransformersEngine(**{"model": str(tiny_model_dir), **settings}).start()


async def test_damaged_weights_are_a_config_error(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    weights = directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ConfigError, match="cannot load the model"):
        await TransformersEngine(model=str(directory), device="cpu").start()


class LlamaWithSecondThoughts(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """An architecture that does to its logits what no engine could know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * torch.linspace(0.5, 1.5, outputs.logits.shape[-1])
        return outputs


class LlamaThatLooksAhead(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Not causal: padding behind a sequence would change its scores."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_hook(self._mix_positions)

    @staticmethod
    def _mix_positions(_module: Any, _inputs: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state.mean(1, keepdim=True)
        return outputs


@pytest.mark.parametrize(
    ("architecture", "through"),
    [(LlamaWithSecondThoughts, "its output head"), (LlamaThatLooksAhead, "a padded batch")],
)
def test_a_model_that_cannot_be_reproduced_is_refused_by_name(
    tiny_model_dir: Path, architecture: Any, through: str
) -> None:
    model = architecture.from_pretrained(tiny_model_dir).eval()
    loaded = LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), "revision", 512)
    with pytest.raises(ConfigError, match=rf"{architecture.__name__} .* through {through}.* nats"):
        scoring_model(loaded)


def test_the_package_of_engines_imports_without_torch() -> None:
    script = "import sys, vopd_server.engines, vopd_server.engines.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
