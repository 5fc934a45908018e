"""Our whole service over an engine that answers at once: `vopd-server serve` with another engine, flags and all.

Its scores are invented and of no use but to measure what is around an engine.

    python bench/null_teacher.py --model .cache/smollm2-135m-instruct --port 0
"""

from __future__ import annotations

import asyncio
import sys
from functools import cache
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from vopd_proto.arrays import Float32Array, IntArray
from vopd_server.config import ServerConfig
from vopd_server.engines.tokenizer import tokenizer_info
from vopd_server.errors import EngineDeadError
from vopd_server.lifecycle import serve
from vopd_server.logs import configure_logging
from vopd_server.main import ENV_PREFIX
from vopd_server.status import EngineCounters
from vopd_server.types import Candidates, EngineInfo, ScoreRequest, Scores, TeacherTopK, TokenizerInfo
from vopd_settings import load_settings


class NullEngine:
    """Implements engines.base.Engine with arrays of the right shapes, made once a shape."""

    def __init__(self, config: ServerConfig) -> None:
        model = AutoConfig.from_pretrained(config.model)
        self._tokenizer = tokenizer_info(AutoTokenizer.from_pretrained(config.model), None)
        self._info = EngineInfo(
            model_id=Path(config.model).name,
            model_revision="none",
            engine="null",
            engine_version="1",
            dtype="float32",
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            max_context_length=config.max_context_length or model.max_position_embeddings,
            supports=frozenset({"sampled", "teacher_top_k", "candidates"}),
            any_temperature=True,
            deterministic=True,
            window_tokens=config.max_batch_tokens,
            max_batch_tokens=config.max_batch_tokens,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self._tokenizer

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters()

    async def start(self) -> None:
        """Nothing to load."""

    async def score(self, request: ScoreRequest) -> Scores:
        num_rows = len(request.completion_ids)
        match request.support:
            case TeacherTopK(k=k):
                ids_TK = null_ids(num_rows, k, self._info.vocab_size)
                return Scores(null_logprobs(num_rows), null_logprobs(num_rows * k).reshape(num_rows, k), ids_TK)
            case Candidates(ids=ids):
                return Scores(null_logprobs(num_rows), null_logprobs(len(ids)))
            case _:
                return Scores(null_logprobs(num_rows))

    async def wait_until_dead(self) -> EngineDeadError:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def close(self) -> None:
        """Nothing to free."""


@cache
def null_logprobs(length: int) -> Float32Array:
    """Different ones, as the wire would not care but a compressor might."""
    return np.random.default_rng(0).uniform(-12, -0.01, length).astype(np.float32)


@cache
def null_ids(num_rows: int, k: int, vocab_size: int) -> IntArray:
    """k different ids a row, in no order, as a real vocabulary's most likely ones."""
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(num_rows)])


def main() -> int:
    config = load_settings(
        ServerConfig,
        sys.argv[1:],
        prog="null_teacher.py",
        env_prefix=ENV_PREFIX,
        description="Serves invented scores, to measure the service.",
    )
    configure_logging(config.log_level, config.log_format)
    return asyncio.run(serve(config, NullEngine(config), announce=lambda line: print(line, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
