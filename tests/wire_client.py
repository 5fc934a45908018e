"""A client that speaks the wire contract and nothing else, over gRPC and HTTP, for tests of a teacher from outside.

`Question` is one completion as a test says it, `Answer` is what came back with its chunks put together.
Beside whole questions it sends messages and bytes that no sane client would.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import httpx2
import numpy as np
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from vopd_proto import MAX_MESSAGE_BYTES
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import Float32Array, IntArray, pack_uints, unpack_floats, unpack_uints

SERVICE = "/vopd.teacher.v1.Teacher/"
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
OCTET_STREAM = "application/octet-stream"
# docs/wire-contract.md, the other way round.
CODES_OF_STATUS = {
    401: {"UNAUTHENTICATED"},
    403: {"PERMISSION_DENIED"},
    404: {"NOT_FOUND"},
    405: {"UNIMPLEMENTED"},
    409: {"FAILED_PRECONDITION"},
    413: {"INVALID_ARGUMENT"},
    415: {"INVALID_ARGUMENT"},
    422: {"INVALID_ARGUMENT"},
    429: {"RESOURCE_EXHAUSTED"},
    500: {"INTERNAL"},
    503: {"UNAVAILABLE"},
    504: {"DEADLINE_EXCEEDED"},
}


@dataclass(frozen=True)
class Question:
    """One completion to score. `candidates`: a list of ids a row; `k`: the teacher's top-k; `hidden`: hidden states."""

    completion: Sequence[int]
    context: int = 0  # index into the contexts sent beside it
    k: int | None = None
    candidates: Sequence[Sequence[int]] | None = None
    hidden: bool = False
    name: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer as arrays; support arrays are flat for candidates, [T, k] for top-k. float_types: of the
    log-probabilities; hidden_types: of the hidden states."""

    name: str
    sampled_T: Float32Array
    support: Float32Array | None
    support_ids: IntArray | None
    float_types: frozenset[int]
    num_chunks: int
    hidden_TH: Float32Array | None = None
    hidden_types: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Refusal:
    """A status of either transport, or the failure of one sequence of a stream."""

    code: grpc.StatusCode
    message: str
    field: str = ""
    retry_delay_s: float | None = None
    request_id: str = ""
    name: str = ""
    http_status: int = 0


class RefusedError(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class WireClient:
    """Raw calls: bytes or messages out, bytes parsed on the way back. authorization: goes with every one."""

    def __init__(self, channel: aio.Channel, http: httpx2.AsyncClient | None, authorization: str = "") -> None:
        self.channel = channel
        self._http = http
        self._metadata = (("authorization", authorization),) if authorization else ()

    @property
    def http(self) -> httpx2.AsyncClient:
        assert self._http is not None, "connected without an HTTP address"
        return self._http

    def unary(self, method: str, message: Message | bytes, answer_type: Any, timeout_s: float | None = None) -> Any:
        call = self.channel.unary_unary(
            SERVICE + method, request_serializer=_to_bytes, response_deserializer=answer_type.FromString
        )
        return call(message, timeout=timeout_s, metadata=self._metadata)

    def stream(self, messages: AsyncIterator[Message | bytes] | None = None, timeout_s: float | None = None) -> Any:
        """An open ScoreStream, fed by `messages` or else by its `write` and `done_writing`."""
        return self.channel.stream_stream(
            SERVICE + "ScoreStream",
            request_serializer=_to_bytes,
            response_deserializer=pb.ScoreStreamResponse.FromString,
        )(messages, timeout=timeout_s, metadata=self._metadata)

    async def info(self) -> pb.GetInfoResponse:
        response: pb.GetInfoResponse = await self.unary("GetInfo", pb.GetInfoRequest(), pb.GetInfoResponse)
        return response

    def head_stream(self, data: bytes = b"", timeout_s: float | None = None) -> Any:
        """An open GetHead."""
        return self.channel.unary_stream(SERVICE + "GetHead", response_deserializer=pb.GetHeadResponse.FromString)(
            data, timeout=timeout_s, metadata=self._metadata
        )

    async def head(self) -> bytes:
        """The whole file that GetHead sends. Raises: RefusedError."""
        try:
            pieces = [piece async for piece in self.head_stream()]
        except aio.AioRpcError as error:
            raise RefusedError(refusal_of(error)) from error
        data = b"".join(piece.data for piece in pieces)
        assert [piece.num_bytes for piece in pieces] == [len(data)] + [0] * (len(pieces) - 1)
        return data

    async def head_http(self, **headers: str) -> httpx2.Response:
        """The answer of GET /v1/head. Raises: RefusedError for one that is neither the file nor a 304."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self.http.get("/v1/head", headers=named)
        return response if response.status_code == 304 else checked_response(response, OCTET_STREAM)

    async def score(
        self,
        contexts: Sequence[Sequence[int]],
        questions: Sequence[Question],
        *,
        temperature: float | None = None,
        float_type: int = pb.FLOAT_TYPE_UNSPECIFIED,
        request_id: str = "",
    ) -> list[Answer]:
        """Unary Score. Raises: RefusedError."""
        request = score_request(contexts, questions, temperature=temperature, float_type=float_type)
        request.request_id = request_id
        response = await self.send_score(request)
        assert request_id in ("", response.request_id)
        return [_answer([scores]) for scores in response.scores]

    async def send_score(self, message: Message | bytes, timeout_s: float | None = None) -> pb.ScoreResponse:
        try:
            response: pb.ScoreResponse = await self.unary("Score", message, pb.ScoreResponse, timeout_s)
        except aio.AioRpcError as error:
            raise RefusedError(refusal_of(error)) from error
        return response

    async def score_stream(
        self,
        contexts: Sequence[Sequence[int]],
        questions: Sequence[Question],
        *,
        temperature: float | None = None,
        float_type: int = pb.FLOAT_TYPE_UNSPECIFIED,
    ) -> list[Answer]:
        """The same over one stream; answers put into the order of the questions. Raises: RefusedError for the
        first failure, of a sequence or of the stream."""
        named = [replace(question, name=str(index)) for index, question in enumerate(questions)]
        outcomes = await self.send_stream(
            [
                stream_settings(temperature=temperature, float_type=float_type),
                *(stream_context(index, context) for index, context in enumerate(contexts)),
                *(stream_sequence(question, contexts) for question in named),
            ]
        )
        answers = []
        for question in named:
            outcome = outcomes[question.name]
            if isinstance(outcome, Refusal):
                raise RefusedError(outcome)
            answers.append(replace(outcome, name=questions[int(question.name)].name))
        return answers

    async def send_stream(self, messages: Iterable[Message | bytes]) -> dict[str, Answer | Refusal]:
        """Sends everything, then collects what became of each sequence. Raises: RefusedError when the stream ends
        with an error."""

        async def outgoing() -> AsyncIterator[Message | bytes]:
            for message in messages:
                yield message

        try:
            return await collect(self.stream(outgoing()))
        except aio.AioRpcError as error:
            raise RefusedError(refusal_of(error)) from error

    async def score_http_protobuf(
        self,
        contexts: Sequence[Sequence[int]],
        questions: Sequence[Question],
        *,
        temperature: float | None = None,
        float_type: int = pb.FLOAT_TYPE_UNSPECIFIED,
    ) -> list[Answer]:
        """The bytes of a unary Score as the body of a POST. Raises: RefusedError."""
        request = score_request(contexts, questions, temperature=temperature, float_type=float_type)
        return [_answer([scores]) for scores in (await self.post_score(request)).scores]

    async def score_http_json(
        self,
        contexts: Sequence[Sequence[int]],
        questions: Sequence[Question],
        *,
        temperature: float | None = None,
        float_type: int = pb.FLOAT_TYPE_UNSPECIFIED,
    ) -> list[Answer]:
        """The same as JSON, whose numbers are as wide as float32. Raises: RefusedError."""
        assert float_type == pb.FLOAT_TYPE_UNSPECIFIED, "JSON has one type of number"
        body = score_body(contexts, questions, temperature=temperature)
        # Not `json=`: NaN is no JSON, and for the server to say so.
        headers = {"Content-Type": JSON}
        response = await self.http.post("/v1/score", content=json.dumps(body), headers=headers)
        answered = checked_response(response).json()
        return [_json_answer(scores) for scores in answered["scores"]]

    async def post_score(self, message: Message | bytes, timeout_s: float | None = None) -> pb.ScoreResponse:
        """Raises: RefusedError."""
        headers = {"Content-Type": PROTOBUF} | ({} if timeout_s is None else {"Request-Timeout": str(timeout_s)})
        response = await self.http.post("/v1/score", content=_to_bytes(message), headers=headers)
        return pb.ScoreResponse.FromString(checked_response(response, PROTOBUF).content)


@asynccontextmanager
async def connect(url: str, http_url: str = "", *, authorization: str = "") -> AsyncIterator[WireClient]:
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", -1)]
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(url.removeprefix("grpc://"), options=options))
        headers = {"Authorization": authorization} if authorization else {}
        http = (
            httpx2.AsyncClient(base_url=http_url, timeout=None, trust_env=False, headers=headers) if http_url else None
        )
        if http is not None:
            await stack.enter_async_context(http)
        yield WireClient(channel, http, authorization)


# ---------------------------------------------------------------- messages


def ids(values: Sequence[int]) -> pb.UIntArray:
    return pack_uints(np.asarray(values, np.int64))


def score_request(
    contexts: Sequence[Sequence[int]],
    questions: Sequence[Question],
    *,
    temperature: float | None = None,
    float_type: int = pb.FLOAT_TYPE_UNSPECIFIED,
) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        temperature=temperature,
        float_type=float_type,  # type: ignore[arg-type]
        contexts=[ids(context) for context in contexts],
        sequences=[sequence_message(question, contexts) for question in questions],
    )


def score_body(
    contexts: Sequence[Sequence[int]], questions: Sequence[Question], *, temperature: float | None = None
) -> dict[str, Any]:
    """The JSON of `score_request`, without what is not set."""
    body: dict[str, Any] = {
        "contexts": [list(context) for context in contexts],
        "sequences": [_sequence_body(question) for question in questions],
    }
    return body if temperature is None else {**body, "temperature": temperature}


def _sequence_body(question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {"context_index": question.context, "completion_ids": list(question.completion)}
    if question.name:
        body["sequence_id"] = question.name
    if question.k is not None:
        body["teacher_top_k"] = question.k
    if question.candidates is not None:
        body["candidates"] = [list(row) for row in question.candidates]
    if question.hidden:
        body["hidden_states"] = True
    return body


def sequence_message(question: Question, contexts: Sequence[Sequence[int]]) -> pb.Sequence:
    """The question with lengths that agree with its arrays."""
    context_length = len(contexts[question.context]) if question.context < len(contexts) else 0
    message = pb.Sequence(
        sequence_id=question.name,
        context_index=question.context,
        context_length=context_length,
        completion_length=len(question.completion),
        completion_ids=ids(question.completion),
    )
    if question.k is not None:
        message.teacher_top_k.k = question.k
    if question.candidates is not None:
        flat = [candidate for row in question.candidates for candidate in row]
        message.num_candidates = len(flat)
        message.candidates.ids.CopyFrom(ids(flat))
        message.candidates.counts.CopyFrom(ids([len(row) for row in question.candidates]))
    if question.hidden:
        message.hidden_states.SetInParent()
    return message


def stream_settings(
    *, temperature: float | None = None, float_type: int = pb.FLOAT_TYPE_UNSPECIFIED, request_id: str = ""
) -> pb.ScoreStreamRequest:
    settings = pb.StreamSettings(temperature=temperature, float_type=float_type, request_id=request_id)  # type: ignore[arg-type]
    return pb.ScoreStreamRequest(settings=settings)


def stream_context(index: int, context: Sequence[int]) -> pb.ScoreStreamRequest:
    return pb.ScoreStreamRequest(context=pb.StreamContext(context_index=index, ids=ids(context)))


def stream_sequence(question: Question, contexts: Sequence[Sequence[int]]) -> pb.ScoreStreamRequest:
    return pb.ScoreStreamRequest(sequence=sequence_message(question, contexts))


def _to_bytes(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


# ---------------------------------------------------------------- answers


async def collect(call: Any) -> dict[str, Answer | Refusal]:
    """What became of each sequence of a stream, by its name."""
    chunks: dict[str, list[pb.SequenceScores]] = {}
    outcomes: dict[str, Answer | Refusal] = {}
    responses = aiter(call)
    opened = await anext(responses)
    assert opened.WhichOneof("message") == "opened", opened
    async for response in responses:
        if response.WhichOneof("message") == "failure":
            failure = response.failure
            outcomes[failure.sequence_id] = Refusal(
                code=next(code for code in grpc.StatusCode if code.value[0] == failure.code),
                message=failure.message,
                field=failure.field,
                retry_delay_s=failure.retry_delay_s or None,
                name=failure.sequence_id,
            )
            continue
        if response.WhichOneof("message") == "waiting":
            continue
        chunk = response.chunk
        rows = chunks.setdefault(chunk.scores.sequence_id, [])
        assert chunk.first_row == sum(part.num_rows for part in rows), "chunks out of order"
        rows.append(chunk.scores)
        if chunk.is_last:
            outcomes[chunk.scores.sequence_id] = _answer(chunks.pop(chunk.scores.sequence_id))
    assert not chunks, f"without a last chunk: {sorted(chunks)}"
    return outcomes


def _answer(parts: Sequence[pb.SequenceScores]) -> Answer:
    """Row chunks, or the one whole answer, put together."""
    sampled_T = np.concatenate([unpack_floats(part.sampled_logprobs) for part in parts])
    assert len(sampled_T) == sum(part.num_rows for part in parts)
    k = parts[0].k
    has_support = any(part.HasField("support_logprobs") for part in parts)
    support = np.concatenate([unpack_floats(part.support_logprobs) for part in parts])
    support_ids = np.concatenate([unpack_uints(part.support_ids) for part in parts])
    has_hidden = any(part.HasField("hidden_states") for part in parts)
    hidden = np.concatenate([unpack_floats(part.hidden_states) for part in parts])
    hidden_size = len(hidden) // max(len(sampled_T), 1)
    return Answer(
        name=parts[0].sequence_id,
        sampled_T=sampled_T,
        support=(support.reshape(-1, k) if k else support) if has_support else None,
        support_ids=support_ids.reshape(-1, k) if k else None,
        float_types=frozenset(part.sampled_logprobs.type for part in parts),
        num_chunks=len(parts),
        hidden_TH=hidden.reshape(len(sampled_T), hidden_size) if has_hidden else None,
        hidden_types=frozenset(part.hidden_states.type for part in parts if has_hidden),
    )


def _json_answer(scores: dict[str, Any]) -> Answer:
    """Candidates come a list a position; here they are flat, as protobuf has them."""
    support, support_ids = scores["support_logprobs"], scores["support_ids"]
    if support is not None and support_ids is None:
        support = [logprob for row in support for logprob in row]
    sampled_T = np.asarray([float(logprob) for logprob in scores["sampled_logprobs"]], np.float32)
    if support_ids is None:
        width: tuple[int, ...] = (-1,)
    else:
        width = (len(sampled_T), -1 if len(sampled_T) else 0)
    hidden = scores["hidden_states"]
    return Answer(
        name=scores["sequence_id"],
        sampled_T=sampled_T,
        support=None if support is None else np.asarray(support, np.float32).reshape(width),
        support_ids=None if support_ids is None else np.asarray(support_ids, np.int64).reshape(width),
        float_types=frozenset({pb.FLOAT32}),
        num_chunks=1,
        hidden_TH=None
        if hidden is None
        else np.asarray(hidden, np.float32).reshape(len(sampled_T), -1 if hidden else 0),
        hidden_types=frozenset() if hidden is None else frozenset({pb.FLOAT32}),
    )


def checked_response(response: httpx2.Response, media_type: str = JSON) -> httpx2.Response:
    """A 200 of the expected type. Raises: RefusedError for anything else, whose body is our JSON and nothing more."""
    if response.status_code == 200:
        assert response.headers["content-type"] == media_type
        return response
    assert response.headers["content-type"] == JSON, response.text
    told = response.json()["error"]
    assert set(told) == {"code", "message", "field", "retry_delay_s", "request_id"}
    assert told["code"] in CODES_OF_STATUS[response.status_code]
    delay_s = told["retry_delay_s"]
    assert response.headers.get("retry-after") == (None if delay_s is None else str(math.ceil(delay_s)))
    raise RefusedError(
        Refusal(
            code=grpc.StatusCode[told["code"]],
            message=told["message"],
            field=told["field"],
            retry_delay_s=delay_s,
            request_id=told["request_id"],
            http_status=response.status_code,
        )
    )


def refusal_of_response(response: httpx2.Response) -> Refusal:
    """What an answer that must not be a 200 says."""
    try:
        checked_response(response)
    except RefusedError as error:
        return error.refusal
    raise AssertionError(f"answered: {response.text[:200]}")


def refusal_of(error: aio.AioRpcError) -> Refusal:
    """The status with what google.rpc.Status says beside it."""
    fields: dict[str, Any] = {}
    trailing = dict(error.trailing_metadata() or ())
    for detail in status_pb2.Status.FromString(trailing.get("grpc-status-details-bin", b"")).details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            fields["field"] = _unpack(detail, error_details_pb2.BadRequest()).field_violations[0].field
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = _unpack(detail, error_details_pb2.RetryInfo()).retry_delay
            fields["retry_delay_s"] = delay.seconds + delay.nanos / 1e9
        elif detail.Is(error_details_pb2.RequestInfo.DESCRIPTOR):
            fields["request_id"] = _unpack(detail, error_details_pb2.RequestInfo()).request_id
    return Refusal(code=error.code(), message=error.details() or "", **fields)


def _unpack(detail: Any, message: Any) -> Any:
    detail.Unpack(message)
    return message
