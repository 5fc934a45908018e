"""An engine whose log-probabilities are a formula, for tests of everything around an engine.

The teacher's logit of id v at row t is 3 sin(0.37 s + 0.11 t + 1.7 v) with s = (sum of the context + sum of the
completion before t) mod 97, normalised over the vocabulary: it depends on the context, the position, the tokens
before it and the id, so a row, a sequence or an id out of place shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from vopd_proto.arrays import Float32Array, IntArray
from vopd_proto.fingerprint import tokenizer_fingerprint
from vopd_server.errors import EngineDeadError, UnavailableError
from vopd_server.types import (
    Candidates,
    EngineInfo,
    ScoreRequest,
    Scores,
    SupportKind,
    TeacherTopK,
    TokenizerInfo,
)

FAKE_VOCAB_SIZE = 300
ROWS_PER_CHUNK = 2048
QUEUE_TIME_S, ENGINE_TIME_S = 0.25, 0.5


def fake_logprobs_TV(
    context_ids: IntArray,
    completion_ids: IntArray,
    *,
    temperature: float = 1.0,
    vocab_size: int = FAKE_VOCAB_SIZE,
    rows: slice = slice(None),
) -> Float32Array:
    """[T, V] log q(v | context, completion before t) in nats, of some rows."""
    position_T = np.arange(len(completion_ids))[rows]
    before_T = (np.cumsum(completion_ids) - completion_ids)[rows]
    state_T = (context_ids.sum() + before_T) % 97
    logits_TV = 3 * np.sin((0.37 * state_T + 0.11 * position_T)[:, None] + 1.7 * np.arange(vocab_size)) / temperature
    logits_TV -= logits_TV.max(axis=1, keepdims=True)
    logprobs_TV: Float32Array = (logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))).astype(np.float32)
    return logprobs_TV


def fake_scores(request: ScoreRequest, vocab_size: int = FAKE_VOCAB_SIZE) -> Scores:
    """What the formula answers, a few thousand rows at a time."""
    num_rows = len(request.completion_ids)
    chunks = [slice(start, min(start + ROWS_PER_CHUNK, num_rows)) for start in range(0, num_rows, ROWS_PER_CHUNK)]
    sampled, support, support_ids = [], [], []
    for rows in chunks:
        logprobs_TV = fake_logprobs_TV(
            request.context_ids,
            request.completion_ids,
            temperature=request.temperature,
            vocab_size=vocab_size,
            rows=rows,
        )
        row_T = np.arange(rows.stop - rows.start)
        sampled.append(logprobs_TV[row_T, request.completion_ids[rows]])
        match request.support:
            case TeacherTopK(k=k):
                ids_TK = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :k]
                support_ids.append(ids_TK)
                support.append(np.take_along_axis(logprobs_TV, ids_TK, axis=1))
            case Candidates(ids=ids, counts_T=counts_T):
                first = counts_T[: rows.start].sum()
                chunk_ids = ids[first : first + counts_T[rows].sum()]
                support.append(logprobs_TV[np.repeat(row_T, counts_T[rows]), chunk_ids])
            case _:
                pass
    return Scores(
        sampled_logprobs_T=np.concatenate(sampled),
        support_logprobs=np.concatenate(support) if support else None,
        support_ids_TK=np.concatenate(support_ids) if support_ids else None,
        queue_time_s=QUEUE_TIME_S,
        engine_time_s=ENGINE_TIME_S,
    )


class FakeEngine:
    """Implements engines.base.Engine; says what was asked of it, and can be held or made to fail.

    requests: everything that reached the engine. num_running: calls that are in it now. num_cancelled: calls
    that were cancelled while they were in it.
    """

    def __init__(
        self,
        *,
        vocab_size: int = FAKE_VOCAB_SIZE,
        max_context_length: int = 65_536,
        supports: frozenset[SupportKind] = frozenset({"sampled", "teacher_top_k", "candidates"}),
        any_temperature: bool = True,
    ) -> None:
        self.info = EngineInfo(
            model_id="fake",
            model_revision="formula-1",
            engine="fake",
            engine_version="1",
            dtype="float32",
            vocab_size=vocab_size,
            hidden_size=8,
            max_context_length=max_context_length,
            supports=supports,
            any_temperature=any_temperature,
            deterministic=True,
        )
        tokens = tuple(f"<{index}>".encode() for index in range(vocab_size))
        self.tokenizer = TokenizerInfo(
            tokens=tokens,
            tokenizer_json="{}",
            chat_template="{{ messages }}",
            begin_id=0,
            end_ids=(1, 2),
            pad_id=None,
            fingerprint=tokenizer_fingerprint(tokens),
        )
        self.requests: list[ScoreRequest] = []
        self.num_running = 0
        self.num_cancelled = 0
        self.is_closed = False
        self._failure: Callable[[ScoreRequest], Exception | None] = lambda _: None
        self._answer: Callable[[ScoreRequest], Scores] = lambda request: fake_scores(request, vocab_size)
        self._going = asyncio.Event()
        self._going.set()
        self._dead: asyncio.Future[EngineDeadError] | None = None

    def hold(self) -> None:
        """Every call (and the start) waits in the engine until `let_go`."""
        self._going.clear()

    def let_go(self) -> None:
        self._going.set()

    def fail(self, failure: Callable[[ScoreRequest], Exception | None]) -> None:
        """From now on raises what `failure` returns, where it returns something."""
        self._failure = failure

    def answer(self, answer: Callable[[ScoreRequest], Scores]) -> None:
        """From now on answers this instead of the formula."""
        self._answer = answer

    async def start(self) -> None:
        await self._going.wait()

    async def score(self, request: ScoreRequest) -> Scores:
        if self.is_closed:
            raise UnavailableError("the engine is closed")
        self.requests.append(request)
        failure = self._failure(request)
        if failure is not None:
            raise failure
        self.num_running += 1
        try:
            await self._going.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        return self._answer(request)

    def die(self, reason: str) -> None:
        """As an engine whose process was killed: what is in it fails, and so does what comes."""
        assert self._dead is not None, "nobody watches"
        self.fail(lambda _: EngineDeadError(reason))
        self._answer = lambda _: _raise(EngineDeadError(reason))
        self._dead.set_result(EngineDeadError(reason))
        self.let_go()

    async def wait_until_dead(self) -> EngineDeadError:
        self._dead = asyncio.get_running_loop().create_future()
        return await self._dead

    async def close(self) -> None:
        self.is_closed = True


def _raise(error: Exception) -> Scores:
    raise error


async def until(condition: Callable[[], bool]) -> None:
    """Returns when `condition` holds; the test's own time-out ends a wait for what never comes."""
    while not condition():  # noqa: ASYNC110  # looks at what has no event, from outside
        await asyncio.sleep(0.002)
