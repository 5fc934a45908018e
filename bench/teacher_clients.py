"""One pass over a workload through each client: ours over its stream, and what users of stock vLLM have over HTTP.

Axes: T completion tokens, K ids that the teacher chose.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np

from vopd_client.teacher import RemoteTeacher
from vopd_client.types import SequenceScores, SequenceToScore


@dataclass(frozen=True, eq=False)
class Pass:
    """seconds: from the first sequence sent to the last answer read. latencies_s, scores: of every sequence."""

    seconds: float
    latencies_s: list[float]
    scores: list[SequenceScores]
    bytes_sent: int
    bytes_received: int

    @property
    def num_tokens(self) -> int:
        """Scored ones."""
        return sum(len(scores.sampled_logprobs_T) for scores in self.scores)


class OurClient:
    """All sequences are submitted at once; the stream's window holds back what is too many."""

    def __init__(self, url: str, *, window: int) -> None:
        self._teacher = RemoteTeacher.connect(url, window=window, float_type="float16")

    def play(self, sequences: Sequence[SequenceToScore]) -> Pass:
        teacher = self._teacher
        sent, received = teacher.bytes_sent, teacher.bytes_received
        ended_s = [0.0] * len(sequences)
        began_s = time.perf_counter()

        def submit(place: int) -> Future[SequenceScores]:
            def note(_: Future[SequenceScores]) -> None:
                ended_s[place] = time.perf_counter()

            future = teacher.submit(sequences[place])
            future.add_done_callback(note)
            return future

        futures = [submit(place) for place in range(len(sequences))]
        scores = [future.result() for future in futures]
        seconds = time.perf_counter() - began_s
        latencies_s = [one_s - began_s for one_s in ended_s]
        return Pass(seconds, latencies_s, scores, teacher.bytes_sent - sent, teacher.bytes_received - received)

    def close(self) -> None:
        self._teacher.close()


class StockClient:
    """Asks vLLM's `/v1/completions` for the k most likely ids of every token, as TRL's server distillation does.

    sequences_per_request: prompts that go in one request; the requests go side by side, up to `concurrency`.
    """

    def __init__(self, url: str, *, k: int, concurrency: int) -> None:
        self._http = httpx2.Client(base_url=url, timeout=None, trust_env=False)
        self._k = k
        self._concurrency = concurrency
        self._model = self._http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        self.sequences_per_request = 1

    def play(self, sequences: Sequence[SequenceToScore]) -> Pass:
        step = self.sequences_per_request
        parts = [sequences[start : start + step] for start in range(0, len(sequences), step)]
        began_s = time.perf_counter()
        threads = ThreadPoolExecutor(min(len(parts), self._concurrency))
        try:
            answers = list(threads.map(self._ask, parts))
        finally:
            # When it is interrupted nobody waits for answers: the server's end brings them.
            threads.shutdown(wait=False, cancel_futures=True)
        seconds = time.perf_counter() - began_s
        return Pass(
            seconds,
            [answer.ended_s - began_s for answer in answers for _ in answer.scores],
            [scores for answer in answers for scores in answer.scores],
            sum(answer.bytes_sent for answer in answers),
            sum(answer.bytes_received for answer in answers),
        )

    def _ask(self, sequences: Sequence[SequenceToScore]) -> _StockAnswer:
        prompts = [[*one.context_ids.tolist(), *one.completion_ids.tolist()] for one in sequences]
        asked = {"model": self._model, "prompt": prompts, "max_tokens": 1, "temperature": 1.0}
        body = json.dumps({**asked, "prompt_logprobs": self._k}).encode()
        response = self._http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        if response.status_code != httpx2.codes.OK:
            raise RuntimeError(f"stock vLLM answered {response.status_code}: {response.text[:1000]}")
        choices = sorted(json.loads(response.content)["choices"], key=lambda choice: choice["index"])
        scores = [stock_scores(choice, one, self._k) for choice, one in zip(choices, sequences, strict=True)]
        return _StockAnswer(time.perf_counter(), scores, len(body), len(response.content))

    def close(self) -> None:
        self._http.close()


@dataclass(frozen=True, eq=False)
class _StockAnswer:
    ended_s: float
    scores: list[SequenceScores]
    bytes_sent: int
    bytes_received: int


def stock_scores(choice: dict[str, Any], sequence: SequenceToScore, k: int) -> SequenceScores:
    """The rows of the completion out of a reply's dictionaries, which have one for every token of the prompt.

    Raises: ValueError for a row without k ids or without the actual token.
    """
    num_context, num_rows = len(sequence.context_ids), len(sequence.completion_ids)
    rows = choice["prompt_logprobs"][num_context : num_context + num_rows]
    sampled_T = np.empty(num_rows, np.float32)
    ids_TK = np.empty((num_rows, k), np.int64)
    logprobs_TK = np.empty((num_rows, k), np.float32)
    for row, (entries, token) in enumerate(zip(rows, sequence.completion_ids.tolist(), strict=True)):
        best = sorted(entries.items(), key=lambda item: item[1]["rank"])[:k]
        if len(best) < k or str(token) not in entries:
            raise ValueError(f"row {row} has {len(entries)} ids, of {k} and token {token}")
        sampled_T[row] = entries[str(token)]["logprob"]
        ids_TK[row] = [int(token_id) for token_id, _ in best]
        logprobs_TK[row] = [entry["logprob"] for _, entry in best]
    return SequenceScores(sampled_T, ids_TK.ravel(), logprobs_TK.ravel(), np.full(num_rows, k))
