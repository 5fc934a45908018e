"""The gRPC transport: bytes to the codec, values to the service, errors to statuses. Nothing is decided here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio

from vopd_proto import teacher_pb2 as pb
from vopd_server.calls import Call, answering, bearer_token, get_info, get_tokenizer, head_pieces, score
from vopd_server.codec import check_no_unknown_fields, parse
from vopd_server.concurrency import unread_timeout, unsent_timeout
from vopd_server.errors import ClientGoneError, TeacherError
from vopd_server.grpc_errors import error_message, status_code, status_metadata
from vopd_server.grpc_stream import ScoreStream
from vopd_server.service import TeacherService

SERVICE = pb.DESCRIPTOR.services_by_name["Teacher"]
Context = aio.ServicerContext[Any, Any]


class TeacherRpc:
    """The methods of the service, by their names in teacher.proto.

    Every one is registered as a stream both ways, which is the same on the wire: a unary call's message is then read
    when it is known whose it is, so that a stranger's megabytes are never taken in. Messages arrive as bytes, since
    one that cannot be parsed is to be answered like any other wrong one.
    """

    def __init__(self, service: TeacherService, *, answer_timeout_s: float) -> None:
        self._service = service
        self._answer_timeout_s = answer_timeout_s

    async def GetInfo(self, _requests: object, context: Context) -> None:
        async with self._answering("GetInfo", context) as call:
            check_no_unknown_fields(parse(pb.GetInfoRequest, await self._read_only(call, context)))
            await self._write(call, context, get_info(self._service, call))

    async def GetTokenizer(self, _requests: object, context: Context) -> None:
        async with self._answering("GetTokenizer", context) as call:
            check_no_unknown_fields(parse(pb.GetTokenizerRequest, await self._read_only(call, context)))
            await self._write(call, context, get_tokenizer(self._service))

    async def GetHead(self, _requests: object, context: Context) -> None:
        async with self._answering("GetHead", context) as call:
            check_no_unknown_fields(parse(pb.GetHeadRequest, await self._read_only(call, context)))
            head = self._service.head_file
            num_bytes = head.num_bytes
            async for piece in head_pieces(head):
                await self._write(call, context, pb.GetHeadResponse(data=piece, num_bytes=num_bytes))
                num_bytes = 0  # told once

    async def Score(self, _requests: object, context: Context) -> None:
        async with self._answering("Score", context) as call:
            request = parse(pb.ScoreRequest, await self._read_only(call, context))
            await self._write(call, context, await score(self._service, call, request))

    async def ScoreStream(self, _requests: object, context: Context) -> None:
        async with self._answering("ScoreStream", context) as call:
            stream = ScoreStream(
                self._service,
                call.tenant,
                partial(self._read, call, context),
                partial(self._put, call, context),
                answer_timeout_s=self._answer_timeout_s,
            )
            try:
                await stream.run()
            finally:
                call.request_id, call.num_sequences = stream.request_id, stream.num_sequences
                call.num_tokens = stream.num_tokens

    async def _read(self, call: Call, context: Context) -> bytes | None:
        """The next message; None: there is none any more."""
        data = await context.read()
        if data is aio.EOF:
            return None
        self._service.metrics.bytes_moved(call.tenant.id, "grpc", "received", len(data))
        return bytes(data)

    async def _read_only(self, call: Call, context: Context) -> bytes:
        """A unary call's message. Raises: DeadlineError when it does not arrive."""
        async with unsent_timeout(self._answer_timeout_s):
            return await self._read(call, context) or b""

    async def _write(self, call: Call, context: Context, message: Message) -> None:
        """Raises: DeadlineError when the client does not take it."""
        async with unread_timeout(self._answer_timeout_s):
            await self._put(call, context, message)

    async def _put(self, call: Call, context: Context, message: Message) -> None:
        data = message.SerializeToString()
        try:
            await context.write(data)
        except aio.InternalError as error:  # gRPC's word for a call that has ended meanwhile
            raise ClientGoneError("the client hung up in the middle of its answer") from error
        self._service.metrics.bytes_moved(call.tenant.id, "grpc", "sent", len(data))

    @asynccontextmanager
    async def _answering(self, method: str, context: Context) -> AsyncIterator[Call]:
        """Around every call; its errors end it with their status."""
        call = Call("grpc", method)
        try:
            api_key = api_key_of(context)
            async with answering(self._service, call, api_key=api_key, timeout_s=context.time_remaining()):
                yield call
        except TeacherError as error:
            metadata = (status_metadata(error, call.request_id),)
            with suppress(aio.InternalError):  # the call has ended meanwhile: by its deadline, at both ends at once
                await context.abort(status_code(error), error_message(error), trailing_metadata=metadata)


def add_teacher(server: aio.Server, rpc: TeacherRpc) -> None:
    """Registers every method that teacher.proto names, as bytes both ways."""
    handlers: dict[str, Any] = {
        method.name: grpc.stream_stream_rpc_method_handler(getattr(rpc, method.name)) for method in SERVICE.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))


def api_key_of(context: Context) -> str | None:
    """What the call's metadata has as a bearer token; None: nothing."""
    for name, value in context.invocation_metadata() or ():
        if name == "authorization" and isinstance(value, str):
            return bearer_token(value)
    return None


def server_options(max_message_bytes: int, *, min_ping_interval_ms: int = 10_000) -> list[tuple[str, int]]:
    """Limits and keepalive, said rather than inherited."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A second server on the port would silently take half of the connections.
        ("grpc.so_reuseport", 0),
        # Find a client whose machine is gone: its sequences hold tokens of the budget.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),  # without it gRPC 1.85 does not end a connection that is silent
        # A client may ping this often, also between its calls (gRPC's own minimum is 5 minutes).
        ("grpc.http2.min_ping_interval_without_data_ms", min_ping_interval_ms),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
