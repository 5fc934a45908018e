"""The load processes of the soak: each runs some of the jobs on one event loop. Without torch."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import grpc
import grpc.aio
import httpx2
import numpy as np

from soak_plan import MISDEEDS, JobPlan, Misdeed, Tally
from soak_workload import Reference, draw, units_of
from vopd_client.errors import TeacherPermissionError, TeacherRequestError, TeacherUnavailableError
from vopd_client.teacher import TeacherClient
from vopd_client.teacher.channel import parse_url
from vopd_client.teacher.codec import FLOAT_TYPES, decode_scores
from vopd_client.teacher.grpc_transport import call_metadata, open_channel
from vopd_client.teacher.requests import score_request
from vopd_client.teacher.stream import ScoreStream
from vopd_client.types import NoSupport, SequenceScores, SequenceToScore
from vopd_proto import MAX_MESSAGE_BYTES, teacher_pb2_grpc
from vopd_proto import teacher_pb2 as pb

TIMEOUT_S = 600.0  # without any answer
GIVE_UP_WITHIN_S = (0.0, 1.0)
DEADLINES_S = (0.02, 0.5)
THINKS_S = (0.2, 1.5)
TOO_MANY_TOKENS = 20_000


@dataclass(frozen=True)
class Addresses:
    url: str
    http_url: str


def run_jobs(
    plans: Sequence[JobPlan], keys: dict[str, str], addresses: Addresses, pool: list[Reference], end_s: float
) -> dict[str, Tally]:
    """All of one process's jobs, until `end_s` of the machine's monotonic clock and what is then under way is answered.

    By tenant. Called in a process of its own.
    """

    async def run_all() -> list[Tally]:
        jobs = [Job(plan, keys[plan.tenant_id], addresses, pool, end_s) for plan in plans]
        return await asyncio.gather(*(job.run() for job in jobs))

    return {plan.tenant_id: tally for plan, tally in zip(plans, asyncio.run(run_all()), strict=True)}


def turn_tokens(sequences: Sequence[SequenceToScore]) -> int:
    """What the engine reads for sequences of one context."""
    return len(sequences[0].context_ids) + sum(len(sequence.completion_ids) for sequence in sequences)


class Job:
    """One tenant's load. Its client is replaced when it hangs up on purpose."""

    def __init__(self, plan: JobPlan, key: str, addresses: Addresses, pool: list[Reference], end_s: float) -> None:
        self._plan = plan
        self._key = key
        self._url = addresses.http_url if plan.transport == "HTTP" else addresses.url
        self._pool = pool
        self._units = units_of(pool, plan.kinds)
        self._end_s = end_s
        self._rng = np.random.default_rng(plan.number)
        self._misdeeds = MISDEEDS[plan.transport]
        self._num_units = 0
        self.tally = Tally()
        self._client: TeacherClient
        self._stream: ScoreStream

    async def run(self) -> Tally:
        await self._connect()
        await asyncio.gather(*(self._work() for _ in range(self._plan.workers)))
        await self._hang_up()
        return self.tally

    async def _connect(self) -> None:
        self._client = TeacherClient(self._url, api_key=self._key, timeout_s=TIMEOUT_S, window=256)
        await self._client.connect()
        self._stream = self._client.open_stream()

    async def _hang_up(self) -> None:
        await self._client.close()
        self.tally.bytes_sent += self._client.bytes_sent
        self.tally.bytes_received += self._client.bytes_received

    async def _work(self) -> None:
        while time.monotonic() < self._end_s:
            self._num_units += 1
            unit = [self._pool[index] for index in draw(self._rng, self._units)]
            if self._plan.role == "unruly" and self._num_units % 3:
                await self._misbehave(self._misdeeds[self.tally.misdeeds.total() % len(self._misdeeds)], unit)
            else:
                await self._ask(unit)
            if self._plan.role == "calm":
                await asyncio.sleep(self._rng.uniform(*THINKS_S))

    # ---------------------------------------------------------------- as it should be

    async def _ask(self, unit: list[Reference]) -> None:
        """Over a stream each by itself; in a call all of them; over HTTP now the one, now the other."""
        streams = self._plan.transport == "gRPC stream" or (self._plan.transport == "HTTP" and self._num_units % 4 < 2)
        if streams:
            await asyncio.gather(*(self._ask_call([one], streams=True) for one in unit))
        else:
            await self._ask_call(unit, streams=False)
        if time.monotonic() <= self._end_s:
            self.tally.turn_tokens += turn_tokens([one.sequence for one in unit])

    async def _ask_call(self, unit: list[Reference], *, streams: bool) -> None:
        self.tally.asked += len(unit)
        began_s = time.monotonic()
        try:
            answers = await self._answers(unit, streams=streams)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is written down, and fails the soak)
            self.tally.failed_with(error, len(unit))
            return
        self._take(unit, answers, began_s)

    async def _answers(self, unit: list[Reference], *, streams: bool) -> list[SequenceScores]:
        sequences = [one.sequence for one in unit]
        if streams:
            return list(await asyncio.gather(*(self._stream.submit(sequence) for sequence in sequences)))
        return await self._client.score(sequences)

    def _take(self, unit: list[Reference], answers: Sequence[SequenceScores], began_s: float) -> None:
        now_s = time.monotonic()
        for one, scores in zip(unit, answers, strict=True):
            self.tally.check(one, scores, seconds=now_s - began_s, in_time=now_s <= self._end_s)

    # ---------------------------------------------------------------- as it should not

    async def _misbehave(self, misdeed: Misdeed, unit: list[Reference]) -> None:
        self.tally.misdeeds[misdeed] += 1
        try:
            match misdeed:
                case "cancel":
                    await self._give_up(unit, hang_up=False)
                case "disconnect":
                    await self._give_up(unit, hang_up=True)
                case "deadline":
                    await self._with_deadline(unit)
                case "too long":
                    await self._too_long()
                case "wrong key":
                    await self._wrong_key()
                case "half a body":
                    await self._half_a_body()
        except Exception as error:  # noqa: BLE001
            self.tally.failed_with(error, 0)

    async def _give_up(self, unit: list[Reference], *, hang_up: bool) -> None:
        """Cancels what is under way, or closes the connection; what was answered before that is checked."""
        streams = self._plan.transport == "gRPC stream"
        self.tally.asked += len(unit)
        began_s = time.monotonic()
        asking = asyncio.ensure_future(self._answers(unit, streams=streams))
        await asyncio.wait({asking}, timeout=float(self._rng.uniform(*GIVE_UP_WITHIN_S)))
        if asking.done() and not asking.exception():
            self._take(unit, asking.result(), began_s)
        else:
            self.tally.given_up += len(unit)
        if hang_up:
            await self._hang_up()
            with suppress(TeacherUnavailableError, asyncio.CancelledError):
                await asking
            await self._connect()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def _with_deadline(self, unit: list[Reference]) -> None:
        """A call that the client library would not make: it waits for as long as there is progress."""
        sequences = [one.sequence for one in unit]
        request = score_request(
            sequences,
            request_id=uuid.uuid4().hex,
            temperature=1.0,
            float_type=FLOAT_TYPES["float32"],
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        self.tally.asked += len(unit)
        timeout_s, began_s = float(self._rng.uniform(*DEADLINES_S)), time.monotonic()
        if self._plan.transport == "HTTP":
            response = await self._http_with_deadline(request, timeout_s)
        else:
            response = await self._grpc_with_deadline(request, timeout_s)
        if response is None:
            self.tally.late += len(unit)
            return
        info = self._client.info
        answers = [
            decode_scores(sequence, [scores], vocab_size=info.vocab_size, hidden_size=info.hidden_size)
            for sequence, scores in zip(sequences, response.scores, strict=True)
        ]
        self._take(unit, answers, began_s)

    async def _grpc_with_deadline(self, request: pb.ScoreRequest, timeout_s: float) -> pb.ScoreResponse | None:
        """None: it passed. Either end may notice first, so how the teacher counts it is open."""
        async with open_channel(parse_url(self._url)) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)  # type: ignore[no-untyped-call]
            try:
                return await stub.Score(request, metadata=call_metadata(self._key), timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
                self.tally.untold["DEADLINE_EXCEEDED"] += 1
                return None

    async def _http_with_deadline(self, request: pb.ScoreRequest, timeout_s: float) -> pb.ScoreResponse | None:
        """None: the teacher said that it passed."""
        protobuf = "application/x-protobuf"
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": protobuf, "Accept": protobuf}
        headers["Request-Timeout"] = f"{timeout_s:.3f}"
        async with httpx2.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
            answer = await client.post(f"{self._url}/v1/score", content=request.SerializeToString(), headers=headers)
        if answer.status_code == 504:
            self.tally.told["DEADLINE_EXCEEDED"] += 1
            return None
        answer.raise_for_status()
        return pb.ScoreResponse.FromString(answer.content)

    async def _too_long(self) -> None:
        ids = np.ones(TOO_MANY_TOKENS, np.int64)
        sequence = SequenceToScore(ids, ids[:1], NoSupport())
        self.tally.asked += 1
        try:
            if self._plan.transport == "gRPC stream":
                await self._stream.submit(sequence)
            else:
                await self._client.score([sequence])
        except TeacherRequestError:
            self.tally.refused += 1
            self.tally.told["INVALID_ARGUMENT"] += 1
        else:
            self.tally.failed_with(ValueError("a sequence that is too long was answered"), 1)

    async def _wrong_key(self) -> None:
        """This tenant's id with another secret."""
        client = TeacherClient(self._url, api_key=f"{self._plan.tenant_id}.{'x' * 43}", timeout_s=TIMEOUT_S)
        try:
            await client.connect()
        except TeacherPermissionError:
            self.tally.strangers_refused += 1
        else:
            self.tally.failed_with(ValueError("a wrong key was let in"), 0)
        finally:
            await client.close()

    async def _half_a_body(self) -> None:
        """Announces a request, sends the beginning, and resets the connection."""
        parts = urlsplit(self._url)
        _reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        head = f"POST /v1/score HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {self._key}\r\n"
        head += "Content-Type: application/x-protobuf\r\nContent-Length: 100000\r\n\r\n"
        writer.write(head.encode() + bytes(1000))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()
