"""The transformers engine on real (mostly tiny) models, against a plain forward of one sequence at a time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from scoring_checks import (
    TOLERANCE_NATS,
    V,
    assert_close_to_plain,
    plain_logprobs,
    random_requests,
    request,
    score_all,
    serving,
    through_head,
)
from tiny_model import tiny_tokenizer, write_tiny_model
from vopd_server.engines.transformers import EngineStats, TransformersEngine
from vopd_server.errors import EngineError, InvalidRequestError, UnavailableError
from vopd_server.types import HiddenStates, Scores, TeacherTopK
from warm_python import WarmProcess


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


def test_deterministic_scores_have_the_same_bits_in_any_company_and_process(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Two processes are forked from one Python, the third is one of its own."""
    script = tmp_path / "digest.py"
    script.write_text(DIGEST_SCRIPT)
    paths = [tmp_path / f"{index}.txt" for index in range(3)]
    arguments = [[str(tiny_model_dir), *numbers] for numbers in (("1", "0"), ("1", "1000"), ("24", "0"))]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        processes: list[WarmProcess | subprocess.Popen[bytes]] = [
            WarmProcess(str(script), given, stdout=file.fileno(), stderr=2, env={**os.environ}, own_group=False)
            for file, given in zip(files[:2], arguments[:2], strict=True)
        ]
        processes.append(subprocess.Popen([sys.executable, str(script), *arguments[2]], stdout=files[2]))
        assert [process.wait(200) for process in processes] == [0, 0, 0]
    outputs = [path.read_text().split() for path in paths]
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
