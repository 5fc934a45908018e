"""vLLM as a server in an environment, and on devices, of its own: OpenAI's server with vLLM's endpoints for training.

Token ids go in and token ids come out, through /inference/v1/generate. Any number of training processes may sample
from one server; one of them updates its weights.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

import httpx2
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from vopd_client.errors import ConfigError, RolloutEngineError, RolloutEngineUnavailableError
from vopd_client.rollouts.vllm_facts import WORKER_EXTENSION, EngineFacts
from vopd_client.rollouts.vllm_recording import Generation
from vopd_client.rollouts.vllm_request import Generate
from vopd_client.teacher.loop_thread import LoopThread

CONNECT_TIMEOUT_S = 30.0
LOOK_UP_EVERY_S = 0.2  # while waiting: for a signal
RETRY_AFTER_S = (0.5, 1.0, 2.0, 5.0)  # then again and again after the last


class _Logprob(BaseModel):
    model_config = ConfigDict(extra="ignore")
    token_id: int
    logprob: float
    rank: int | None = None


class _Position(_Logprob):
    top_logprobs: list[_Logprob]


class _Positions(BaseModel):
    content: list[_Position]


class _Span(BaseModel):
    model_config = ConfigDict(extra="ignore")
    version: str


class _Choice(BaseModel):
    model_config = ConfigDict(extra="ignore")
    token_ids: list[int]
    finish_reason: str
    logprobs: _Positions
    weight_versions: list[_Span] | None = None


class _Answer(BaseModel):
    """What of vLLM's GenerateResponse is read."""

    model_config = ConfigDict(extra="ignore")
    choices: list[_Choice]


class ServerEngine:
    """Implements `RolloutEngine` and `weight_sync.WeightControl`.

    Args:
        url: http://host:port of the server.
        max_in_flight: requests of this process at a time, at most.
        timeout_s: seconds without any answer after which the server counts as gone.
        tell: hears once that the server is waited for, and why.
        transport: another way to the server, for tests.

    Raises: ConfigError when what answers is not a vLLM server that was started for this; RolloutEngineUnavailableError.
    """

    def __init__(
        self,
        url: str,
        *,
        max_in_flight: int,
        timeout_s: float,
        tell: Callable[[str], None],
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._tell = tell
        self._last_answer_at = time.monotonic()
        self._room = asyncio.Semaphore(max_in_flight)
        self._loop = LoopThread("vopd-rollouts")
        try:
            self._client = httpx2.AsyncClient(
                base_url=self.url,
                timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=max_in_flight),
                transport=transport,
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise ConfigError(f"rollouts_url {url!r}: {error}") from error
        self._vocab_size = 0  # until the server has said it
        try:
            self._check_endpoints()
            self._facts = self._ask_facts()
        except BaseException:
            self.close()
            raise
        self._vocab_size = self._facts.vocab_size

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def generate(
        self, wanted: Sequence[Generate], *, while_waiting: Callable[[], None]
    ) -> Iterator[tuple[int, Generation]]:
        indices = {self._loop.start(self._generate(item)): item.index for item in wanted}
        try:
            pending = set(indices)
            while pending:
                finished, pending = wait(pending, timeout=LOOK_UP_EVERY_S, return_when=FIRST_COMPLETED)
                while_waiting()
                for future in finished:
                    yield indices[future], future.result()
        finally:
            for future in indices:
                future.cancel()

    async def _generate(self, wanted: Generate) -> Generation:
        num_logprobs: int = wanted.parameters["logprobs"]
        # The server puts the sampled id first and cuts the list at what was asked for: with one id more, none of the
        # most likely ones is lost, whichever was sampled.
        parameters = {**wanted.parameters, "logprobs": min(num_logprobs + 1, self._vocab_size)}
        body = {"token_ids": wanted.prompt_ids.tolist(), "sampling_params": parameters, "stream": False}
        async with self._room:
            answer = await self._post("/inference/v1/generate", json=body)
        return generation_of(answer, num_logprobs=num_logprobs)

    def close(self) -> None:
        """Ends this side's connections, and with them its requests; harmless when done before."""
        if not self._loop.is_closing:
            self._loop.run(self._client.aclose())
            self._loop.close()

    # --- control of the weights, see vLLM's routers `rl/online` and `serve/dev`

    def pause(self) -> None:
        """Requests of a run that was broken off are aborted; those of this one have ended."""
        self._call("/pause", params={"mode": "abort"})

    def resume(self) -> None:
        self._call("/resume")

    def can_read(self, path: str) -> bool:
        return all(answer["can_read"] for answer in self._workers("vopd_can_read", path=path))

    def reload(self, path: str) -> None:
        self._workers("vopd_reload", path=path)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("/finish_weight_update")
        self._workers("vopd_pack_again")

    def reset_prefix_cache(self) -> bool:
        return bool(self._call("/reset_prefix_cache").get("success"))

    def set_weight_version(self, version: str) -> None:
        self._call("/update_weight_version", json={"new_version": version})

    def _workers(self, method: str, **arguments: Any) -> list[Any]:
        return list(self._call("/collective_rpc", json={"method": method, "kwargs": arguments})["results"])

    def _call(self, path: str, **parts: Any) -> dict[str, Any]:
        return dict(self._loop.run(self._post(path, **parts)))

    # --- the start

    def _check_endpoints(self) -> None:
        """Raises: ConfigError naming the flag that is missing."""
        try:
            paths = self._loop.run(self._answer("GET", "/openapi.json")).get("paths", {})
        except RolloutEngineError:  # a server without documentation: the first call will tell
            return
        missing = []
        if "/collective_rpc" not in paths or "/update_weight_version" not in paths:
            missing.append("VLLM_SERVER_DEV_MODE=1 in its environment")
        if "/inference/v1/generate" not in paths:
            missing.append("--enable-scale-out")
        if missing:
            raise ConfigError(f"the rollout server at {self.url} must be started with {' and '.join(missing)}")

    def _ask_facts(self) -> EngineFacts:
        try:
            return EngineFacts(**self._workers("vopd_facts")[0])
        except (RolloutEngineError, ValidationError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"the rollout server at {self.url} must be started with --worker-extension-cls {WORKER_EXTENSION}, "
                f"and have this version of the package vopd in its environment ({error})"
            ) from error

    # --- requests, again and again while the server is away: each changes nothing or does the same twice

    async def _post(self, path: str, **parts: Any) -> Any:
        return await self._answer("POST", path, **parts)

    async def _answer(self, method: str, path: str, **parts: Any) -> Any:
        """The JSON of an answer.

        Raises: RolloutEngineError for a request that the server refuses or fails on; RolloutEngineUnavailableError
            when nothing has answered for `timeout_s`.
        """
        asked_at = time.monotonic()
        delays = iter(RETRY_AFTER_S)
        delay_s = 0.0
        while True:
            try:
                response = await self._client.request(method, path, **parts)
                if response.status_code not in (502, 503, 504):
                    self._last_answer_at = time.monotonic()
                    return self._json_of(response, path)
                reason = f"HTTP {response.status_code}"
            except (httpx2.RequestError, OSError) as error:
                reason = f"{type(error).__name__} {error}".strip()
            silent_s = time.monotonic() - max(asked_at, self._last_answer_at)
            if silent_s > self._timeout_s:
                raise RolloutEngineUnavailableError(
                    f"the rollout server at {self.url} gave no answer for {silent_s:.0f} s: {reason}"
                )
            if delay_s == 0.0:
                self._tell(f"waiting for the rollout server at {self.url}: {reason}")
            delay_s = next(delays, RETRY_AFTER_S[-1])
            await asyncio.sleep(min(delay_s, max(self._timeout_s - silent_s, 0.05)))

    def _json_of(self, response: httpx2.Response, path: str) -> Any:
        if response.status_code >= 400:
            raise RolloutEngineError(
                f"the rollout server at {self.url} answered {path} with HTTP {response.status_code}: "
                f"{response.text.strip()[:500]}"
            )
        try:
            return response.json() if response.content else {}
        except ValueError as error:
            raise RolloutEngineError(
                f"the rollout server at {self.url} answered {path} with something else than JSON: "
                f"{response.text[:200]!r}"
            ) from error


def generation_of(answer: Any, *, num_logprobs: int) -> Generation:
    """A generation from vLLM's GenerateResponse.

    The K most likely ids of a position are those of rank 1 to K: the server names the sampled id first, but with the
    rank that it has among them. So they are a function of the logits alone, ties included.

    Raises: RolloutEngineError for an answer that holds something else.
    """
    try:
        [choice] = _Answer.model_validate(answer).choices
        positions = choice.logprobs.content
        top = [
            sorted((entry.rank or 0, entry.token_id, entry.logprob) for entry in position.top_logprobs)
            for position in positions
        ]
        ranked = [[entry for entry in entries if 1 <= entry[0] <= num_logprobs] for entries in top]
        expected = list(range(1, num_logprobs + 1))
        is_broken = [not np.isfinite(position.logprob) or position.rank is None for position in positions]
        for entries, broken in zip(ranked, is_broken, strict=True):
            if not broken and [rank for rank, _, _ in entries] != expected:
                raise ValueError(f"ranks {[rank for rank, _, _ in entries]} instead of 1 to {num_logprobs}")
        if len(positions) != len(choice.token_ids) or any(
            position.token_id != token_id for position, token_id in zip(positions, choice.token_ids, strict=True)
        ):
            raise ValueError("log-probabilities that do not line up with the token ids")
    except (ValidationError, ValueError) as error:
        raise RolloutEngineError(f"the rollout server's answer cannot be read: {str(error)[:300]}") from error
    num_tokens = len(positions)
    ids_TK = np.zeros((num_tokens, num_logprobs), np.int64)
    logprobs_TK = np.full((num_tokens, num_logprobs), -np.inf, np.float32)
    for row, (entries, broken) in enumerate(zip(ranked, is_broken, strict=True)):
        if not broken:
            ids_TK[row] = [token_id for _, token_id, _ in entries]
            logprobs_TK[row] = [logprob for _, _, logprob in entries]
    return Generation(
        token_ids_T=np.array(choice.token_ids, np.int64),
        sampled_logprobs_T=np.array(
            [np.nan if broken else position.logprob for position, broken in zip(positions, is_broken, strict=True)],
            np.float32,
        ),
        top_ids_TK=ids_TK,
        top_logprobs_TK=logprobs_TK,
        finish_reason=choice.finish_reason,
        weight_versions=tuple(span.version for span in choice.weight_versions or ()),
    )
