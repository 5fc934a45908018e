"""A teacher over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from vopd_client.teacher.channel import Address
from vopd_client.teacher.status import Failure
from vopd_client.teacher.transport import CallFailed, Traffic
from vopd_proto import MAX_MESSAGE_BYTES, teacher_pb2_grpc
from vopd_proto import teacher_pb2 as pb

Response = TypeVar("Response")

KEEPALIVE_INTERVAL_S = 20
KEEPALIVE_TIMEOUT_S = 10

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A machine that vanished sends no reset: without pings its connection looks idle for ever.
    ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # What ends a connection whose ping goes unanswered; without it gRPC 1.85 waits for longer than anyone would.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # A long prefill is minutes without a byte in either direction; the pings go on.
    ("grpc.http2.max_pings_without_data", 0),
    # Retries are ours: gRPC's stop at small buffered messages and know no overall time-out.
    ("grpc.enable_retries", 0),
    # A reconnect opens a new channel, which must not inherit the old one's back-off.
    ("grpc.use_local_subchannel_pool", 1),
)

# What grpc.aio makes of a write to a call that has just ended, in the place of the status it ended with. Trying
# again meets that status itself if it is there to stay. A teacher's own INTERNAL has words of its own.
_WRITE_FAILED = "Internal error from Core"


class GrpcTransport:
    """Implements `transport.Transport` over one channel."""

    def __init__(self, address: Address, *, api_key: str | None, tls_roots: bytes | None, traffic: Traffic) -> None:
        self._channel = open_channel(address, tls_roots=tls_roots)
        # The generated stub has no types for grpc.aio.
        self._stub: Any = teacher_pb2_grpc.TeacherStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = call_metadata(api_key)
        self._traffic = traffic
        self._closed = False

    async def get_info(self, *, timeout_s: float) -> pb.GetInfoResponse:
        return await self._answer(self._stub.GetInfo(pb.GetInfoRequest(), metadata=self._metadata, timeout=timeout_s))

    async def get_tokenizer(self) -> pb.GetTokenizerResponse:
        return await self._answer(self._stub.GetTokenizer(pb.GetTokenizerRequest(), metadata=self._metadata))

    async def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        self._traffic.bytes_sent += request.ByteSize()
        response: pb.ScoreResponse = await self._answer(self._stub.Score(request, metadata=self._metadata))
        self._traffic.bytes_received += response.ByteSize()
        return response

    async def get_head(self) -> AsyncGenerator[pb.GetHeadResponse, None]:
        call = self._stub.GetHead(pb.GetHeadRequest(), metadata=self._metadata)
        try:
            while (piece := await self._answer(call.read())) is not grpc.aio.EOF:
                yield piece
        finally:
            call.cancel()  # harmless when it is over

    def open_stream(self) -> GrpcStreamCall:
        return GrpcStreamCall(self._stub.ScoreStream(metadata=self._metadata), self._traffic)

    async def close(self) -> None:
        self._closed = True
        await self._channel.close()

    async def _answer(self, call: Awaitable[Response]) -> Response:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise CallFailed(failure_of_call(error)) from error
        except asyncio.CancelledError as error:
            if self._closed:  # closing a channel cancels its calls
                raise CallFailed(Failure(grpc.StatusCode.CANCELLED, "the connection was closed")) from error
            raise


class GrpcStreamCall:
    """Implements `transport.StreamCall` over gRPC's own stream."""

    def __init__(self, call: Any, traffic: Traffic) -> None:
        self._call = call
        self._traffic = traffic

    async def write(self, message: pb.ScoreStreamRequest) -> None:
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise CallFailed(failure_of_call(error)) from error
        except asyncio.InvalidStateError as error:
            raise CallFailed(Failure(grpc.StatusCode.UNAVAILABLE, "the stream is over")) from error
        self._traffic.bytes_sent += message.ByteSize()

    async def read(self) -> pb.ScoreStreamResponse | None:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise CallFailed(failure_of_call(error)) from error
        if response is grpc.aio.EOF:
            return None
        message: pb.ScoreStreamResponse = response
        self._traffic.bytes_received += message.ByteSize()
        return message

    async def cancel(self) -> None:
        self._call.cancel()


def open_channel(address: Address, *, tls_roots: bytes | None = None) -> grpc.aio.Channel:
    """A new channel; nothing is sent before the first call."""
    # gRPC would send loopback traffic, key included, to the proxy that `http_proxy` names.
    options = (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if address.is_loopback else CHANNEL_OPTIONS
    if not address.secure:
        return grpc.aio.insecure_channel(address.target, options=options)
    credentials = grpc.ssl_channel_credentials(root_certificates=tls_roots)
    return grpc.aio.secure_channel(address.target, credentials, options=options)


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def failure_of_call(error: grpc.aio.AioRpcError) -> Failure:
    """The failure of a whole call, with the delay in its google.rpc.RetryInfo where it has one."""
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _WRITE_FAILED:
        return Failure(grpc.StatusCode.UNAVAILABLE, "the connection broke while it was written to")
    return Failure(error.code(), error.details() or "", _retry_delay_s(error))


def _retry_delay_s(error: grpc.aio.AioRpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            return None  # a proxy's own details: the code alone decides
        for detail in status.details:
            retry_info = error_details_pb2.RetryInfo()
            if detail.Is(retry_info.DESCRIPTOR) and detail.Unpack(retry_info):
                return float(retry_info.retry_delay.seconds) + float(retry_info.retry_delay.nanos) / 1e9
    return None
