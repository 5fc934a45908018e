"""A transformers engine in the test, requests for it, and a plain forward of one sequence at a time to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tiny_model import NUM_IDS
from vopd_proto.arrays import IntArray
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.types import Candidates, HeadFile, HiddenStates, NoSupport, ScoreRequest, Scores, Support, TeacherTopK

V = NUM_IDS
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


@asynccontextmanager
async def counting(model_dir: Path, **settings: Any) -> AsyncIterator[tuple[TransformersEngine, list[int]]]:
    """An engine, and the tokens that its model reads, a number for each forward."""
    tokens_read: list[int] = []
    async with serving(model_dir, **settings) as engine:
        embedding = engine._scoring_model.backbone._base_model.get_input_embeddings()  # type: ignore[union-attr]
        embedding.register_forward_hook(lambda _module, inputs, _output: tokens_read.append(inputs[0].numel()))
        yield engine, tokens_read
