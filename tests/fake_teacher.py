"""A scriptable Teacher service on a real socket, for faults that a real teacher does not have on demand.

Scores are a function of the request (`expected_scores`), so that a test can tell a right answer from another
sequence's. A `Script` says what goes wrong; everything that arrives is recorded.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK
from vopd_proto import MAX_MESSAGE_BYTES, teacher_pb2_grpc
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import IntArray, pack_floats, pack_uints, unpack_uints
from vopd_proto.fingerprint import tokenizer_fingerprint

VOCAB_SIZE = 1000
HIDDEN_SIZE = 6
HEAD = np.random.default_rng(0).bytes(10_000)  # whose file nobody opens here
HEAD_SHA256 = hashlib.sha256(HEAD).hexdigest()
TOKENS = [f"token-{index}".encode() for index in range(VOCAB_SIZE)]


def sampled_logprobs(context_ids: IntArray, completion_ids: IntArray, temperature: float) -> np.ndarray:
    """[T] -(position + id / 1000 + context / 1e6) / temperature: depends on everything it should depend on."""
    positions = np.arange(len(completion_ids))
    return (-(positions + completion_ids / 1000 + int(context_ids.sum()) / 1e6) / temperature).astype(np.float32)


def expected_scores(sequence: SequenceToScore, temperature: float = 1.0) -> SequenceScores:
    """What this teacher answers."""
    sampled = sampled_logprobs(sequence.context_ids, sequence.completion_ids, temperature)
    num_rows = len(sampled)
    match sequence.support:
        case TeacherTopK(k=k):
            ids = np.tile(np.arange(k), num_rows)
            return SequenceScores(sampled, ids, top_k_logprobs(num_rows, k), np.full(num_rows, k))
        case Candidates(ids=ids, counts_T=counts):
            return SequenceScores(sampled, ids, candidate_logprobs(ids), counts)
        case NoSupport() | HiddenStates() as support:
            nothing = np.empty(0, np.float32)
            hidden = hidden_states(sequence.completion_ids) if isinstance(support, HiddenStates) else None
            return SequenceScores(sampled, np.empty(0, np.int64), nothing, np.zeros(num_rows, np.int64), hidden)


def hidden_states(completion_ids: IntArray) -> np.ndarray:
    """[T, H] position * 1000 + id + dimension / 10."""
    rows_T = np.arange(len(completion_ids)) * 1000 + completion_ids
    return (rows_T[:, None] + np.arange(HIDDEN_SIZE) / 10).astype(np.float32)


def top_k_logprobs(num_rows: int, k: int) -> np.ndarray:
    return (-np.tile(np.arange(k), num_rows) / 10).astype(np.float32)


def candidate_logprobs(ids: IntArray) -> np.ndarray:
    return (-ids / 100).astype(np.float32)


@dataclass(frozen=True)
class Refusal:
    """A gRPC status to answer with instead of scores."""

    code: grpc.StatusCode
    message: str = "scripted"
    retry_delay_s: float | None = None
    field: str = ""

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        metadata: tuple[tuple[str, bytes], ...] = ()
        if self.retry_delay_s is not None:
            status = status_pb2.Status(code=self.code.value[0], message=self.message)
            retry_info = error_details_pb2.RetryInfo()
            retry_info.retry_delay.FromNanoseconds(round(self.retry_delay_s * 1e9))
            status.details.add().Pack(retry_info)
            metadata = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(self.code, self.message, metadata)


@dataclass
class Script:
    """What goes wrong. Lists are used up front to back; when one is empty, all is well."""

    info: dict[str, Any] = field(default_factory=dict)  # fields of GetInfoResponse to change
    model_revision: str = "revision-1"  # what answers say
    refuse_info: deque[Refusal] = field(default_factory=deque)
    refuse_score: deque[Refusal] = field(default_factory=deque)
    refuse_stream: deque[Refusal] = field(default_factory=deque)
    refuse_sequence: deque[Refusal] = field(default_factory=deque)  # a ScoreFailure
    end_stream_after: deque[int] = field(default_factory=deque)  # answers, then the stream ends with OK
    rows_per_chunk: int = 0  # 0: one chunk a sequence
    hold_answers_until: int = 0  # unanswered sequences; then all are answered
    answer_nothing: bool = False
    answer_in_reverse: bool = False  # only with hold_answers_until
    change_answer: Callable[[pb.SequenceScores], None] | None = None
    head: bytes = b""  # what GetHead sends; empty: not given away
    refuse_head: deque[Refusal] = field(default_factory=deque)
    break_head_after: deque[int] = field(default_factory=deque)  # bytes, then the connection breaks
    announce_head_bytes: int | None = None  # instead of how many there are
    head_piece_bytes: int = 4000
    head_piece_pause_s: float = 0.0


@dataclass
class Record:
    """What arrived."""

    metadata: list[dict[str, str]] = field(default_factory=list)
    num_info_calls: int = 0
    num_head_calls: int = 0
    num_probes: int = 0  # of whether replicas agree; counted nowhere else
    score_requests: list[pb.ScoreRequest] = field(default_factory=list)
    streams: list[list[pb.ScoreStreamRequest]] = field(default_factory=list)
    max_outstanding: int = 0
    max_contexts_held: int = 0
    num_sequences: int = 0  # by request and by stream
    bytes_in: int = 0  # of score requests
    bytes_out: int = 0  # of their answers

    def sequences(self, stream: int) -> list[pb.Sequence]:
        return [message.sequence for message in self.streams[stream] if message.HasField("sequence")]

    def contexts(self, stream: int) -> list[pb.StreamContext]:
        return [message.context for message in self.streams[stream] if message.HasField("context")]


class FakeTeacher(teacher_pb2_grpc.TeacherServicer):
    """`async with FakeTeacher() as teacher:` serves at `teacher.url`; `stop` and `start` keep the port."""

    def __init__(self, script: Script | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.script = script or Script()
        self.record = Record()
        self.port = 0
        self._max_message_bytes = max_message_bytes
        self._scheme = "grpc"
        self._server: grpc.aio.Server | None = None

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    async def start(self, tls: tuple[Path, Path] | None = None) -> None:
        """tls: files of the key and of the certificate."""
        options = [
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.aio.server(options=options)
        teacher_pb2_grpc.add_TeacherServicer_to_server(self, self._server)
        address = f"127.0.0.1:{self.port}"
        if tls is None:
            self.port = self._server.add_insecure_port(address)
        else:
            key, certificate = tls
            credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
            self.port = self._server.add_secure_port(address, credentials)
            self._scheme = "grpcs"
        await self._server.start()

    async def stop(self) -> None:
        """Drops every connection."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def __aenter__(self) -> FakeTeacher:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()

    # ------------------------------------------------------------ the service

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        self.record.num_info_calls += 1
        self._note_metadata(context)
        if self.script.refuse_info:
            await self.script.refuse_info.popleft().abort(context)
        return self.info()

    def info(self) -> pb.GetInfoResponse:
        response = pb.GetInfoResponse(
            model_id="fake",
            model_revision=self.script.model_revision,
            tokenizer=pb.TokenizerInfo(
                fingerprint=tokenizer_fingerprint(TOKENS), num_ids=VOCAB_SIZE, begin_id=0, end_ids=[1, 2]
            ),
            vocab_size=VOCAB_SIZE,
            max_context_length=4096,
            dtype="float32",
            engine="fake",
            engine_version="0",
            supports=pb.Supports(
                sampled=True, teacher_top_k=True, candidates=True, hidden_states=bool(self.script.head)
            ),
            hidden_size=HIDDEN_SIZE,
            head_sha256=hashlib.sha256(self.script.head).hexdigest() if self.script.head else "",
            any_temperature=True,
            limits=pb.Limits(
                max_sequences_per_request=8,
                max_tokens_per_request=4096,
                max_support_size=200,
                max_message_bytes=MAX_MESSAGE_BYTES,
            ),
            server_version="0",
        )
        for name, value in self.script.info.items():
            target, _, leaf = name.rpartition(".")
            setattr(getattr(response, target) if target else response, leaf, value)
        return response

    async def GetTokenizer(self, request: pb.GetTokenizerRequest, context: Any) -> pb.GetTokenizerResponse:
        return self.tokenizer()

    def tokenizer(self) -> pb.GetTokenizerResponse:
        return pb.GetTokenizerResponse(tokens=TOKENS, tokenizer_json="{}")

    async def GetHead(self, request: pb.GetHeadRequest, context: Any) -> AsyncIterator[pb.GetHeadResponse]:
        self.record.num_head_calls += 1
        self._note_metadata(context)
        if self.script.refuse_head:
            await self.script.refuse_head.popleft().abort(context)
        cut_after = self.script.break_head_after.popleft() if self.script.break_head_after else None
        num_bytes = self.num_head_bytes
        for first in range(0, len(self.script.head), self.script.head_piece_bytes):
            if cut_after is not None and first >= cut_after:
                await Refusal(grpc.StatusCode.UNAVAILABLE, "broken").abort(context)
            piece = self.script.head[first : first + self.script.head_piece_bytes]
            yield pb.GetHeadResponse(data=piece, num_bytes=num_bytes)
            num_bytes = 0
            await asyncio.sleep(self.script.head_piece_pause_s)

    @property
    def num_head_bytes(self) -> int:
        """As announced."""
        announced = self.script.announce_head_bytes
        return len(self.script.head) if announced is None else announced

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        if request.request_id == "golden":
            return await self.answer_probe(request)
        self.record.score_requests.append(request)
        self.record.num_sequences += len(request.sequences)
        self.record.bytes_in += request.ByteSize()
        self._note_metadata(context)
        if self.script.refuse_score:
            await self.script.refuse_score.popleft().abort(context)
        if self.script.answer_nothing:
            await asyncio.Event().wait()
        response = self.answers(request)
        self.record.bytes_out += response.ByteSize()
        return response

    async def answer_probe(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        self.record.num_probes += 1
        if self.script.answer_nothing:
            await asyncio.Event().wait()
        return self.answers(request)

    def answers(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        contexts = [unpack_uints(ids) for ids in request.contexts]
        scores = [self._answer(s, contexts[s.context_index], request.temperature) for s in request.sequences]
        return pb.ScoreResponse(request_id=request.request_id, model_revision=self.script.model_revision, scores=scores)

    async def ScoreStream(self, requests: AsyncIterator[pb.ScoreStreamRequest], context: Any) -> None:
        messages: list[pb.ScoreStreamRequest] = []
        self.record.streams.append(messages)
        self._note_metadata(context)
        if self.script.refuse_stream:
            await self.script.refuse_stream.popleft().abort(context)
        answers_left = self.script.end_stream_after.popleft() if self.script.end_stream_after else None
        contexts: dict[int, IntArray] = {}
        held: list[pb.Sequence] = []
        async for message in requests:
            messages.append(message)
            self.record.bytes_in += message.ByteSize()
            kind = message.WhichOneof("message")
            if kind == "settings":
                opened = pb.StreamOpened(model_revision=self.script.model_revision)
                await self._write(context, pb.ScoreStreamResponse(opened=opened))
            elif kind == "context":
                contexts[message.context.context_index] = unpack_uints(message.context.ids)
                self.record.max_contexts_held = max(self.record.max_contexts_held, len(contexts))
            elif kind == "release_context":
                del contexts[message.release_context.context_index]
            elif kind == "sequence":
                held.append(message.sequence)
                self.record.num_sequences += 1
                self.record.max_outstanding = max(self.record.max_outstanding, len(held))
                if self.script.answer_nothing or len(held) < self.script.hold_answers_until:
                    continue
                for sequence in reversed(held) if self.script.answer_in_reverse else held:
                    if answers_left == 0:
                        return
                    ids = contexts[sequence.context_index]
                    await self._answer_in_stream(sequence, ids, messages[0].settings.temperature, context)
                    answers_left = None if answers_left is None else answers_left - 1
                held.clear()

    # ------------------------------------------------------------ answers

    async def _answer_in_stream(
        self, sequence: pb.Sequence, context_ids: IntArray, temperature: float, context: Any
    ) -> None:
        if self.script.refuse_sequence:
            refusal = self.script.refuse_sequence.popleft()
            failure = pb.ScoreFailure(
                sequence_id=sequence.sequence_id,
                code=refusal.code.value[0],
                message=refusal.message,
                field=refusal.field,
                retry_delay_s=refusal.retry_delay_s or 0.0,
            )
            await self._write(context, pb.ScoreStreamResponse(failure=failure))
            return
        num_rows = sequence.completion_length
        step = self.script.rows_per_chunk or max(1, num_rows)
        for first_row in range(0, max(1, num_rows), step):
            rows = slice(first_row, min(first_row + step, num_rows))
            chunk = pb.ScoreChunk(
                scores=self._answer(sequence, context_ids, temperature, rows),
                first_row=first_row,
                is_last=first_row + step >= num_rows,
            )
            await self._write(context, pb.ScoreStreamResponse(chunk=chunk))

    async def _write(self, context: Any, response: pb.ScoreStreamResponse) -> None:
        await context.write(response)
        self.record.bytes_out += response.ByteSize()

    def _answer(
        self, sequence: pb.Sequence, context_ids: IntArray, temperature: float, rows: slice = slice(None)
    ) -> pb.SequenceScores:
        completion_ids = unpack_uints(sequence.completion_ids)
        sampled = sampled_logprobs(context_ids, completion_ids, temperature)[rows]
        scores = pb.SequenceScores(
            sequence_id=sequence.sequence_id,
            num_rows=len(sampled),
            sampled_logprobs=pack_floats(sampled, pb.FLOAT32),
        )
        if sequence.HasField("teacher_top_k"):
            k = sequence.teacher_top_k.k
            scores.k = k
            scores.support_ids.CopyFrom(pack_uints(np.tile(np.arange(k), len(sampled))))
            scores.support_logprobs.CopyFrom(pack_floats(top_k_logprobs(len(sampled), k), pb.FLOAT32))
        elif sequence.HasField("candidates"):
            counts = unpack_uints(sequence.candidates.counts)
            starts = np.concatenate([[0], np.cumsum(counts)])
            first, last, _ = rows.indices(len(counts))
            ids = unpack_uints(sequence.candidates.ids)[starts[first] : starts[last]]
            scores.support_logprobs.CopyFrom(pack_floats(candidate_logprobs(ids), pb.FLOAT32))
        elif sequence.HasField("hidden_states"):
            scores.hidden_states.CopyFrom(pack_floats(hidden_states(completion_ids)[rows], pb.FLOAT32))
        if self.script.change_answer is not None:
            self.script.change_answer(scores)
        return scores

    def _note_metadata(self, context: Any) -> None:
        self.record.metadata.append(dict(context.invocation_metadata()))
