"""vLLM as the engine sees it, without vLLM: both runners' answers, a prefix cache, stale memory, preemption.

Every log-probability is a function of the whole prefix, so a row taken from anywhere else shows.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vopd_server.engines.vllm_backend import BackendFacts
from vopd_server.engines.vllm_requests import CONTEXT_TOKENS
from vopd_server.errors import EngineError, InvalidRequestError
from vopd_server.types import TokenizerInfo

VOCAB_SIZE = 50
BLOCK_SIZE = 8


def row_logprobs(prefix: list[int]) -> np.ndarray:
    """[V] float32: the model's next-token log-probabilities after `prefix`."""
    seed = int.from_bytes(hashlib.blake2b(repr(prefix).encode(), digest_size=8).digest(), "little")
    logits = np.random.default_rng(seed).normal(size=VOCAB_SIZE)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


@dataclass
class Flat:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append(self, ids: list[int], logprobs: list[float]) -> None:
        self.start_indices.append(len(self.logprobs))
        self.token_ids += ids
        self.logprobs += logprobs
        self.end_indices.append(len(self.logprobs))


@dataclass
class Metrics:
    num_preemptions: int = 0
    queued_ts: float = 1.0
    scheduled_ts: float = 3.0
    last_token_ts: float = 3.5


@dataclass
class Part:
    finish_reason: str | None = "length"


@dataclass
class Output:
    prompt_logprobs: Any = None
    prompt_token_id_logprobs: Any = None
    num_cached_tokens: int | None = 0
    metrics: Metrics | None = field(default_factory=Metrics)
    outputs: list[Part] = field(default_factory=lambda: [Part()])


class FakeVllm:
    """Implements `vllm_backend.Backend`. runner: "v1" has no given ids; "v2" has.

    stays_within_contexts: whether the scheduler looks at what requests say of their contexts, as ours does.
    preempt_with: what a request finds cached when it resumes, for the next requests (None: not preempted).
    """

    def __init__(self, runner: str = "v1", *, max_model_len: int = 1000) -> None:
        self.runner = runner
        self.is_dead = False
        self.is_hung = False
        self.is_shut_down = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.arrivals: asyncio.Queue[str] = asyncio.Queue()  # request ids, to wait for
        self.stays_within_contexts = True
        self.preempt_with: int | None = None
        self.spoil: Any = None  # called with every output, to change it
        self.error: Exception | None = None
        self.asked: list[dict[str, Any]] = []  # of every request: prompt_ids, arguments, read_cache
        self.aborted: list[str] = []
        self.stale: dict[tuple[int, int], list[tuple[list[int], list[float]]]] = {}  # freed buffers by shape
        self._cached: set[tuple[int, ...]] = set()
        nothing = TokenizerInfo((b"a",), "", "", None, (), None, "f")
        self.facts = BackendFacts("0", "r", "float32", VOCAB_SIZE, 4, max_model_len, 512, 1024, nothing)

    async def answer(
        self, request_id: str, prompt_ids: list[int], arguments: dict[str, Any], *, read_cache: bool, salt: str
    ) -> Output:
        self.asked.append({"prompt_ids": prompt_ids, "arguments": arguments, "read_cache": read_cache})
        self.arrivals.put_nowait(request_id)
        if self.is_dead:
            raise EngineError("EngineCore died")
        if self.error is not None:
            raise self.error
        if self.runner == "v1" and "prompt_logprob_token_ids" in arguments:
            raise InvalidRequestError("request", "requires the V2 model runner")
        readable = arguments["extra_args"][CONTEXT_TOKENS] if self.stays_within_contexts else len(prompt_ids)
        hit = self._hit(prompt_ids[:readable]) if read_cache else 0
        try:
            await asyncio.sleep(0)  # concurrent requests are scheduled before any of them has filled the cache
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        self._fill(prompt_ids)
        output = self._output(prompt_ids, arguments, hit, read_cache)
        if self.spoil is not None:
            self.spoil(output)
        return output

    async def ping(self) -> None:
        if self.is_hung or self.is_dead:
            await asyncio.Event().wait()

    async def shutdown(self) -> None:
        self.is_shut_down = True

    def _hit(self, prompt_ids: list[int]) -> int:
        hit = 0
        while hit + BLOCK_SIZE <= len(prompt_ids) - 1 and tuple(prompt_ids[: hit + BLOCK_SIZE]) in self._cached:
            hit += BLOCK_SIZE
        return hit

    def _fill(self, prompt_ids: list[int]) -> None:
        self._cached.update(tuple(prompt_ids[:end]) for end in range(BLOCK_SIZE, len(prompt_ids) + 1, BLOCK_SIZE))

    def _output(self, prompt_ids: list[int], arguments: dict[str, Any], hit: int, read_cache: bool) -> Output:
        output = Output(num_cached_tokens=hit)
        if self.preempt_with is not None:
            output.metrics = Metrics(num_preemptions=1)
            hit = self.preempt_with if read_cache else 0
        if "prompt_logprob_token_ids" in arguments:
            output.prompt_token_id_logprobs = self._token_ids(prompt_ids, arguments, hit)
        else:
            output.prompt_logprobs = self._flat(prompt_ids, arguments["prompt_logprobs"], hit)
        return output

    def _token_ids(self, prompt_ids: list[int], arguments: dict[str, Any], hit: int) -> np.ndarray | None:
        start = arguments["prompt_logprob_start"]
        if hit > start:
            return None
        ids_TN = arguments["prompt_logprob_token_ids"]
        assert len(ids_TN) == len(prompt_ids) - 1 - start
        rows = [row_logprobs(prompt_ids[: start + 1 + t])[np.maximum(ids, 0)] for t, ids in enumerate(ids_TN)]
        return np.where(ids_TN < 0, -np.inf, np.stack(rows)).astype(np.float32)

    def _flat(self, prompt_ids: list[int], k: int, hit: int) -> Flat:
        shape = (len(prompt_ids), k)
        rows = []
        for position in range(1, len(prompt_ids)):
            logprobs_V = row_logprobs(prompt_ids[:position])
            ids = [prompt_ids[position], *np.argsort(-logprobs_V, kind="stable")[:k].tolist()]
            rows.append((ids, logprobs_V[ids].tolist()))
        if self.runner == "v1":  # one buffer for the whole prompt; what was not computed is what lay there before
            unwritten = ([-7] * (k + 1), [1e20] * (k + 1))
            rows[:hit] = self.stale.get(shape, [unwritten] * len(rows))[:hit]
            self.stale[shape] = rows
        else:
            rows = rows[hit:]
        flat = Flat()
        flat.append([], [])
        for ids, logprobs in rows:
            flat.append(ids, logprobs)
        return flat
