"""An engine whose log-probabilities are a formula, for tests of everything around an engine.

The teacher's logit of id v at row t is 3 sin(0.37 s + 0.11 t + 1.7 v) with s = (sum of the context + sum of the
completion before t) mod 97, normalised over the vocabulary: it depends on the context, the position, the tokens
before it and the id, so a row, a sequence or an id out of place shows.

As the sine of a sum it is a product: of hidden states [sin, cos] of the row and an output head [cos, sin] of the id.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vopd_proto.arrays import Float32Array, IntArray
from vopd_proto.fingerprint import tokenizer_fingerprint
from vopd_server.errors import EngineDeadError, UnavailableError
from vopd_server.status import EngineCounters
from vopd_server.types import (
    Candidates,
    EngineInfo,
    HeadFile,
    HiddenStates,
    ScoreRequest,
    Scores,
    SupportKind,
    TeacherTopK,
    TokenizerInfo,
)

FAKE_VOCAB_SIZE = 300
FAKE_HIDDEN_SIZE = 8  # of which the formula needs two
FAKE_LOGIT_SCALE = 0.25  # the head's, so that one who forgets it is found out
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
    angle_T = _angle_T(context_ids, completion_ids, rows)
    logits_TV = 3 * np.sin(angle_T[:, None] + 1.7 * np.arange(vocab_size)) / temperature
    logits_TV -= logits_TV.max(axis=1, keepdims=True)
    logprobs_TV: Float32Array = (logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))).astype(np.float32)
    return logprobs_TV


def fake_hidden_TH(context_ids: IntArray, completion_ids: IntArray) -> Float32Array:
    """[T, H] what `fake_head` makes the same logits of."""
    angle_T = _angle_T(context_ids, completion_ids)
    hidden_TH = np.zeros((len(angle_T), FAKE_HIDDEN_SIZE), np.float32)
    hidden_TH[:, 0], hidden_TH[:, 1] = np.sin(angle_T), np.cos(angle_T)
    return hidden_TH


def fake_head(vocab_size: int, directory: Path) -> HeadFile:
    """The file of the output head."""
    angle_V = 1.7 * np.arange(vocab_size)
    weight_VH = np.zeros((vocab_size, FAKE_HIDDEN_SIZE), np.float32)
    weight_VH[:, 0], weight_VH[:, 1] = np.cos(angle_V), np.sin(angle_V)
    path = directory / "head.safetensors"
    save_file({"weight": weight_VH * np.float32(3 / FAKE_LOGIT_SCALE)}, path, {"logit_scale": repr(FAKE_LOGIT_SCALE)})
    data = path.read_bytes()
    return HeadFile(path, hashlib.sha256(data).hexdigest(), len(data))


def _angle_T(
    context_ids: IntArray, completion_ids: IntArray, rows: slice = slice(None)
) -> np.ndarray[Any, np.dtype[np.float64]]:
    position_T = np.arange(len(completion_ids))[rows]
    before_T = (np.cumsum(completion_ids) - completion_ids)[rows]
    state_T = (context_ids.sum() + before_T) % 97
    angle_T: np.ndarray[Any, np.dtype[np.float64]] = 0.37 * state_T + 0.11 * position_T
    return angle_T


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
    wants_hidden = isinstance(request.support, HiddenStates)
    return Scores(
        sampled_logprobs_T=np.concatenate(sampled),
        support_logprobs=np.concatenate(support) if support else None,
        support_ids_TK=np.concatenate(support_ids) if support_ids else None,
        hidden_states_TH=fake_hidden_TH(request.context_ids, request.completion_ids) if wants_hidden else None,
        queue_time_s=QUEUE_TIME_S,
        engine_time_s=ENGINE_TIME_S,
    )


class FakeEngine:
    """Implements engines.base.Engine; says what was asked of it, and can be held or made to fail.

    requests: everything that reached the engine. num_running: calls that are in it now. num_cancelled: calls
    that were cancelled while they were in it. gives_head: from its start to its close, as a real one.
    """

    def __init__(
        self,
        *,
        vocab_size: int = FAKE_VOCAB_SIZE,
        max_context_length: int = 65_536,
        supports: frozenset[SupportKind] = frozenset({"sampled", "teacher_top_k", "candidates"}),
        any_temperature: bool = True,
        dtype: str = "float32",
        gives_head: bool = False,
        window_tokens: int = 1_000_000,
    ) -> None:
        self.info = EngineInfo(
            model_id="fake",
            model_revision="formula-1",
            engine="fake",
            engine_version="1",
            dtype=dtype,
            vocab_size=vocab_size,
            hidden_size=FAKE_HIDDEN_SIZE,
            max_context_length=max_context_length,
            supports=supports,
            any_temperature=any_temperature,
            deterministic=True,
            window_tokens=window_tokens,
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
        self._gives_head = gives_head
        self._head_directory: TemporaryDirectory[str] | None = None
        self._failure: Callable[[ScoreRequest], Exception | None] = lambda _: None
        self._answer: Callable[[ScoreRequest], Scores] = lambda request: fake_scores(request, vocab_size)
        self._going = asyncio.Event()
        self._going.set()
        self._dead: asyncio.Future[EngineDeadError] | None = None

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters(batches=len(self.requests))

    def hold(self) -> None:
        """Every call (and the start) waits in the engine until `let_go`."""
        self._going.clear()

    @property
    def is_held(self) -> bool:
        return not self._going.is_set()

    def let_go(self) -> None:
        self._going.set()

    def lengthen_head(self, num_bytes: int) -> None:
        """Zeros behind its file, which takes a while to send then and is a head no more."""
        assert self.info.head is not None, "not started, or gives none away"
        os.truncate(self.info.head.path, num_bytes)
        self.info = replace(self.info, head=replace(self.info.head, num_bytes=num_bytes))

    def fail(self, failure: Callable[[ScoreRequest], Exception | None]) -> None:
        """From now on raises what `failure` returns, where it returns something."""
        self._failure = failure

    def answer(self, answer: Callable[[ScoreRequest], Scores]) -> None:
        """From now on answers this instead of the formula."""
        self._answer = answer

    async def start(self) -> None:
        await self._going.wait()
        if self._gives_head:
            self._head_directory = TemporaryDirectory(prefix="fake-head-")
            head = fake_head(self.info.vocab_size, Path(self._head_directory.name))
            self.info = replace(self.info, head=head, supports=self.info.supports | {"hidden_states"})

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
        if self._head_directory is not None:
            self._head_directory.cleanup()


def _raise(error: Exception) -> Scores:
    raise error


async def until(condition: Callable[[], bool]) -> None:
    """Returns when `condition` holds; the test's own time-out ends a wait for what never comes."""
    while not condition():  # noqa: ASYNC110  # looks at what has no event, from outside
        await asyncio.sleep(0.002)
