"""The asynchronous teacher client."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc

from vopd_client.errors import AlignmentError, HandshakeError, TeacherUnavailableError
from vopd_client.handshake import check_revision
from vopd_client.teacher.channel import Address, check_key_may_travel, parse_urls, read_tls_roots
from vopd_client.teacher.codec import FLOAT_TYPES, FloatTypeName, decode_scores
from vopd_client.teacher.grpc_transport import GrpcTransport
from vopd_client.teacher.head_cache import HeadCache
from vopd_client.teacher.head_download import HeadDownload, require_head
from vopd_client.teacher.http_transport import HttpTransport
from vopd_client.teacher.patience import Patience, Timing
from vopd_client.teacher.replica import Connection, ReplicaUse
from vopd_client.teacher.replicas import Replicas
from vopd_client.teacher.requests import RequestLimits, plan_requests, score_request
from vopd_client.teacher.stream import ScoreStream
from vopd_client.teacher.transport import CallFailed, Traffic, Transport
from vopd_client.types import SequenceScores, SequenceToScore, TeacherInfo
from vopd_proto import teacher_pb2 as pb
from vopd_proto.fingerprint import tokenizer_fingerprint

Response = TypeVar("Response")

MAX_CONCURRENT_REQUESTS = 4  # of one `score`, a replica


class TeacherClient:
    """Asks one teacher, or replicas of one, for scores. Use it as `async with TeacherClient(url) as teacher:`.

    Only UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, with backoff and jitter, never sooner than the
    server asked for, until `timeout_s` pass without any answer while one is owed.
    """

    def __init__(
        self,
        urls: str | list[str] | tuple[str, ...],
        *,
        api_key: str | None = None,
        plaintext: bool = False,
        tls_ca_file: Path | None = None,
        timeout_s: float = 600.0,
        window: int = 64,
        float_type: FloatTypeName = "float32",
        expected_fingerprint: str | None = None,
        expected_revision: str | None = None,
        timing: Timing | None = None,
    ) -> None:
        """Checks the settings; `connect` is what reaches out.

        urls: `grpc://host:port` or `http://host[:port]`, over TLS `grpcs://` or `https://`; several are replicas of
            one teacher, which share the work, and need not speak the same.
        window: sequences of a stream that are sent and not yet answered, at most, of all replicas together.
        expected_fingerprint, expected_revision: tokenizer and weights to insist on from the first connection.

        Raises: ConfigError.
        """
        addresses = parse_urls(urls)
        if api_key is not None:
            check_key_may_travel(addresses, plaintext=plaintext)
        self._timing = timing or Timing()
        self._replicas = Replicas(
            addresses,
            open_transport=self._open_transport,
            expected_fingerprint=expected_fingerprint,
            expected_revision=expected_revision,
            timing=self._timing,
        )
        self._api_key = api_key
        self._tls_roots = read_tls_roots(tls_ca_file)
        self._timeout_s = timeout_s
        self._window = window
        self._float_type = FLOAT_TYPES[float_type]
        self._sequence_ids = itertools.count()
        self._streams: list[ScoreStream] = []
        self._waiting: list[Patience] = []
        self._closed = False

    @property
    def info(self) -> TeacherInfo:
        """What the teacher said of itself at the first handshake."""
        assert self._replicas.pinned is not None, "connect() comes first"
        return self._replicas.pinned

    @property
    def replicas(self) -> tuple[ReplicaUse, ...]:
        """What each replica has done so far, in the order of their URLs."""
        return tuple(replica.use for replica in self._replicas.all)

    @property
    def bytes_sent(self) -> int:
        """Bytes of score requests, resent ones included: gRPC's messages, HTTP's bodies."""
        return sum(replica.traffic.bytes_sent for replica in self._replicas.all)

    @property
    def bytes_received(self) -> int:
        """Bytes of their answers."""
        return sum(replica.traffic.bytes_received for replica in self._replicas.all)

    @property
    def head_bytes_received(self) -> int:
        """Bytes of the output head, broken downloads included."""
        return sum(replica.traffic.head_bytes_received for replica in self._replicas.all)

    @property
    def waiting_reason(self) -> str:
        """Why answers are late, for people to read; empty while all is well."""
        waiting: list[Patience | ScoreStream] = [*self._waiting, *self._streams]
        return next((reason for each in waiting if (reason := each.waiting_reason)), "")

    async def __aenter__(self) -> TeacherClient:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def connect(self) -> TeacherInfo:
        """Reaches the first replica that answers, waiting for one if need be, and those others that are there.

        One that is not joins later, and `replicas` says why.

        Raises: HandshakeError, TeacherPermissionError, TeacherUnavailableError.
        """
        with self._patience() as patience:
            return await self._until_progress(lambda: self._replicas.connect(patience), patience)

    async def tokenizer(self) -> tuple[list[bytes], str]:
        """The id -> token table and the tokenizer's JSON (empty when it has none).

        Raises: HandshakeError when the table does not have the fingerprint of the handshake.
        """

        async def fetch(connection: Connection) -> pb.GetTokenizerResponse:
            return await connection.transport.get_tokenizer()

        response = await self._call(fetch)
        tokens = list(response.tokens)
        if tokenizer_fingerprint(tokens) != self.info.fingerprint:
            raise HandshakeError(
                f"the teacher's table of {len(tokens)} tokens does not have the fingerprint that it announced"
            )
        return tokens, response.tokenizer_json

    async def head_file(self, cache_dir: Path | None = None) -> Path:
        """The safetensors file of the teacher's output head, laid out as teacher.proto says; fetched once a machine.

        cache_dir: where it is kept; None: `head_cache.default_cache_dir()`.

        Raises: TeacherUnsupportedError when it is not given away; HandshakeError when it is not what was announced;
            ConfigError when it cannot be kept; TeacherPermissionError, TeacherUnavailableError, TeacherInternalError.
        """
        sha256 = require_head(self.info)
        cache = HeadCache(cache_dir)
        if (found := await asyncio.to_thread(cache.find, sha256)) is not None:
            return found
        with self._patience() as patience:
            download = HeadDownload(cache, sha256, patience=patience)
            return await self._try_until_answered(download.attempt, patience)

    async def score(self, sequences: Sequence[SequenceToScore], *, temperature: float = 1.0) -> list[SequenceScores]:
        """Scores a list, in its order; split into requests by the teacher's limits. All or nothing.

        Raises: TeacherRequestError, TeacherUnsupportedError, AlignmentError, NonFiniteError,
            HandshakeError, TeacherPermissionError, TeacherUnavailableError, TeacherInternalError.
        """
        limits = RequestLimits(
            self.info.max_sequences_per_request,
            self.info.max_tokens_per_request,
            self._replicas.max_message_bytes,
            self.info.hidden_size,
        )
        plan = plan_requests(sequences, limits)
        requests = [
            score_request(
                [sequences[index] for index in indices],
                request_id=uuid.uuid4().hex,
                temperature=temperature,
                float_type=self._float_type,
                max_message_bytes=limits.max_message_bytes,
            )
            for indices in plan
        ]
        slots = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS * len(self._replicas.all))
        with self._patience() as patience:
            tasks = [
                asyncio.create_task(self._score_one_request(request, [sequences[i] for i in indices], slots, patience))
                for request, indices in zip(requests, plan, strict=True)
            ]
            answers = await _all_or_first_error(tasks)
        scores_by_index = {
            index: scores
            for indices, answer in zip(plan, answers, strict=True)
            for index, scores in zip(indices, answer, strict=True)
        }
        return [scores_by_index[index] for index in range(len(sequences))]

    def open_stream(self, *, temperature: float = 1.0) -> ScoreStream:
        """A stream at one temperature; it connects with the first `submit`."""
        stream = ScoreStream(
            self._replicas,
            self._new_patience(),
            settings=pb.StreamSettings(
                request_id=uuid.uuid4().hex, temperature=temperature, float_type=self._float_type
            ),
            window=self._window,
            # A teacher that takes a request of so many tokens holds as many for a stream.
            max_context_tokens=self.info.max_tokens_per_request,
            sequence_ids=self._sequence_ids,
            timing=self._timing,
        )
        self._streams.append(stream)
        return stream

    async def close(self) -> None:
        """Ends every stream and connection; what is unanswered raises TeacherUnavailableError."""
        self._closed = True
        for stream in self._streams:
            await stream.close()
        await self._replicas.close()

    def _open_transport(self, address: Address, traffic: Traffic) -> Transport:
        if not address.speaks_http:
            return GrpcTransport(address, api_key=self._api_key, tls_roots=self._tls_roots, traffic=traffic)
        return HttpTransport(
            address,
            api_key=self._api_key,
            tls_roots=self._tls_roots,
            traffic=traffic,
            max_connections=self._window + MAX_CONCURRENT_REQUESTS,
        )

    # ------------------------------------------------------------ unary calls

    async def _score_one_request(
        self,
        request: pb.ScoreRequest,
        sequences: list[SequenceToScore],
        slots: asyncio.Semaphore,
        patience: Patience,
    ) -> list[SequenceScores]:
        async def score(connection: Connection) -> pb.ScoreResponse:
            answer = await connection.transport.score(request)
            connection.replica.answered(sequences)
            return answer

        async with slots:
            response = await self._try_until_answered(score, patience)
        check_revision(self.info.model_revision, response.model_revision, where="score")
        ids = [scores.sequence_id for scores in response.scores]
        if ids != [sequence.sequence_id for sequence in request.sequences]:
            raise AlignmentError(f"asked for {len(request.sequences)} sequences, answered with ids {ids[:10]}")
        return [
            decode_scores(sequence, [scores], vocab_size=self.info.vocab_size, hidden_size=self.info.hidden_size)
            for sequence, scores in zip(sequences, response.scores, strict=True)
        ]

    async def _call(self, call: Callable[[Connection], Awaitable[Response]]) -> Response:
        with self._patience() as patience:
            return await self._try_until_answered(call, patience)

    async def _try_until_answered(
        self, call: Callable[[Connection], Awaitable[Response]], patience: Patience
    ) -> Response:
        """The answer to a call, tried again where that can help."""
        return await self._until_progress(lambda: self._attempts(call, patience), patience)

    async def _until_progress(
        self, work: Callable[[], Coroutine[object, object, Response]], patience: Patience
    ) -> Response:
        patience.clock.begin()
        try:
            response = await patience.run(work)
        finally:
            patience.clock.end()
        patience.progressed()
        return response

    async def _attempts(self, call: Callable[[Connection], Awaitable[Response]], patience: Patience) -> Response:
        while True:
            async with self._replicas.connection(patience) as connection:
                try:
                    return await call(connection)
                except CallFailed as error:
                    if self._closed:
                        raise TeacherUnavailableError("the teacher client was closed") from error
                    failure, cause = error.failure, error
                    if not failure.is_retryable:
                        raise failure.to_error() from error
                    if failure.code is grpc.StatusCode.UNAVAILABLE:
                        self._replicas.retire(connection, failure)
            await patience.back_off(failure, cause, num_replicas=len(self._replicas.all))

    def _new_patience(self) -> Patience:
        return Patience(self._timeout_s, self._timing, also=lambda: self._replicas.missing)

    @contextmanager
    def _patience(self) -> Iterator[Patience]:
        patience = self._new_patience()
        self._waiting.append(patience)
        try:
            yield patience
        finally:
            self._waiting.remove(patience)


async def _all_or_first_error(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """Every result, or the first error once the others are cancelled."""
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
