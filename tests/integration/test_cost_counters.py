"""What a score costs in things that do not depend on the machine: bytes, forwards, tokens read.

Over a real socket, through the client's stream. Times are the benchmarks' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from fake_engine import FakeEngine
from fake_server import fake_teacher
from vopd_client.teacher.client import TeacherClient
from vopd_client.teacher.codec import FloatTypeName
from vopd_client.types import Candidates, SequenceToScore, Support, TeacherTopK
from vopd_server.config import ServerConfig
from vopd_server.engines.transformers import EngineStats, TransformersEngine
from vopd_server.lifecycle import TeacherServer

CONTEXT, COMPLETION, K, GROUP = 256, 64, 100, 8
VOCAB_SIZE = 49_152  # two bytes an id, as in the benchmark's model
FRAMES = 24  # bytes a token: names, lengths, times and the context's share, for the sequences here


def sequence(rng: np.random.Generator, context_ids: np.ndarray, support: Support, vocab_size: int) -> SequenceToScore:
    return SequenceToScore(context_ids, rng.integers(vocab_size, size=COMPLETION), support)


async def bytes_a_token(vocab_size: int, support: Support, float_type: FloatTypeName) -> float:
    """Both directions together, of a group through one stream; frames of gRPC and below are not counted."""
    rng = np.random.default_rng(0)
    context_ids = rng.integers(vocab_size, size=CONTEXT)
    async with (
        fake_teacher(FakeEngine(vocab_size=vocab_size)) as teacher,
        TeacherClient(teacher.url, float_type=float_type) as client,
        client.open_stream() as stream,
    ):
        before = client.bytes_sent + client.bytes_received
        group = [sequence(rng, context_ids, support, vocab_size) for _ in range(GROUP)]
        await asyncio.gather(*map(stream.submit, group))
        return (client.bytes_sent + client.bytes_received - before) / (GROUP * COMPLETION)


def candidates(counts_T: np.ndarray) -> Candidates:
    ids = np.concatenate([np.arange(count) + VOCAB_SIZE - 200 for count in counts_T])
    return Candidates(ids, counts_T)


@pytest.mark.parametrize("support", [candidates(np.full(COMPLETION, K)), TeacherTopK(K)])
async def test_a_dense_support_takes_two_bytes_an_id_and_two_a_logprob(support: Support) -> None:
    found = await bytes_a_token(VOCAB_SIZE, support, "float16")
    assert K * (2 + 2) < found < K * (2 + 2) + FRAMES


async def test_an_adaptive_support_takes_bytes_for_the_ids_it_has() -> None:
    counts_T = np.arange(COMPLETION) % 12 + 1  # six and a half on average
    found = await bytes_a_token(VOCAB_SIZE, candidates(counts_T), "float16")
    assert counts_T.mean() * (2 + 2) < found < counts_T.mean() * (2 + 2) + FRAMES


async def test_a_sampled_logprob_alone_takes_next_to_nothing() -> None:
    assert await bytes_a_token(VOCAB_SIZE, candidates(np.zeros(COMPLETION, np.int64)), "float16") < FRAMES


# ---------------------------------------------------------------- what the model reads


@asynccontextmanager
async def real_teacher(model_dir: Path) -> AsyncIterator[tuple[TeacherClient, TransformersEngine]]:
    engine = TransformersEngine(model=str(model_dir), device="cpu")
    server = TeacherServer(
        ServerConfig(model=str(model_dir), port=0, http_port=None, admin_port=None, golden_file=None), engine
    )
    try:
        await server.start()
        await server.load()
        async with TeacherClient(server.url) as client:
            yield client, engine
    finally:
        await server.close()


def cost(before: EngineStats, after: EngineStats) -> tuple[int, int]:
    """Forwards, and tokens that are no padding."""
    tokens = [stats.tokens_forwarded - stats.padding_tokens for stats in (before, after)]
    return after.forwards - before.forwards, tokens[1] - tokens[0]


@pytest.mark.parametrize("arrival", ["together", "one by one", "in a unary call each"])
async def test_a_group_is_read_once_however_it_arrives(tiny_model_dir: Path, arrival: str) -> None:
    rng = np.random.default_rng(0)
    context_ids = rng.integers(250, size=CONTEXT)
    group = [sequence(rng, context_ids, TeacherTopK(5), 250) for _ in range(GROUP)]
    async with real_teacher(tiny_model_dir) as (client, engine):
        before = engine.stats
        async with client.open_stream() as stream:
            match arrival:
                case "together":
                    await asyncio.gather(*map(stream.submit, group))
                case "one by one":
                    for one in group:
                        await stream.submit(one)
                case _:
                    await asyncio.gather(*(client.score([one]) for one in group))
        forwards, tokens = cost(before, engine.stats)
    assert tokens == CONTEXT + GROUP * (COMPLETION - 1)  # the last token of a completion predicts nothing asked for
    assert forwards <= GROUP
    if arrival == "one by one":
        assert forwards == GROUP  # the first reads context and completion in one


async def test_sequences_of_their_own_share_forwards(tiny_model_dir: Path) -> None:
    rng = np.random.default_rng(0)
    alone = [sequence(rng, rng.integers(250, size=CONTEXT), TeacherTopK(5), 250) for _ in range(GROUP)]
    async with real_teacher(tiny_model_dir) as (client, engine):
        before = engine.stats
        await client.score(alone)
        forwards, tokens = cost(before, engine.stats)
    assert (forwards, tokens) == (1, GROUP * (CONTEXT + COMPLETION - 1))
