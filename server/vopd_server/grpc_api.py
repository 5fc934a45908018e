"""The gRPC transport: bytes to the codec, values to the service, errors to statuses. Nothing is decided here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio

from vopd_proto import teacher_pb2 as pb
from vopd_server.calls import Call, answering, get_info, get_tokenizer, head_pieces, score
from vopd_server.codec import check_no_unknown_fields, parse
from vopd_server.concurrency import unread_timeout
from vopd_server.errors import TeacherError
from vopd_server.grpc_errors import error_message, status_code, status_metadata
from vopd_server.grpc_stream import ScoreStream
from vopd_server.service import TeacherService

SERVICE = pb.DESCRIPTOR.services_by_name["Teacher"]
Context = aio.ServicerContext[Any, Any]


class TeacherRpc:
    """The methods of the service, by their names in teacher.proto. Requests arrive as bytes, since a message
    that cannot be parsed is to be answered like any other wrong one."""

    def __init__(self, service: TeacherService, *, answer_timeout_s: float) -> None:
        self._service = service
        self._answer_timeout_s = answer_timeout_s

    async def GetInfo(self, data: bytes, context: Context) -> pb.GetInfoResponse:
        async with self._answering("GetInfo", context):
            check_no_unknown_fields(parse(pb.GetInfoRequest, data))
            return get_info(self._service)

    async def GetTokenizer(self, data: bytes, context: Context) -> pb.GetTokenizerResponse:
        async with self._answering("GetTokenizer", context):
            check_no_unknown_fields(parse(pb.GetTokenizerRequest, data))
            return get_tokenizer(self._service)

    async def GetHead(self, data: bytes, context: Context) -> None:
        async with self._answering("GetHead", context):
            check_no_unknown_fields(parse(pb.GetHeadRequest, data))
            head = self._service.head_file
            num_bytes = head.num_bytes
            async for piece in head_pieces(head):
                async with unread_timeout(self._answer_timeout_s):
                    await context.write(pb.GetHeadResponse(data=piece, num_bytes=num_bytes))
                num_bytes = 0  # told once

    async def Score(self, data: bytes, context: Context) -> pb.ScoreResponse:
        async with self._answering("Score", context) as call:
            return await score(self._service, call, parse(pb.ScoreRequest, data))

    async def ScoreStream(self, _requests: object, context: Context) -> None:
        async def read() -> bytes | None:
            data = await context.read()
            return None if data is aio.EOF else data

        async with self._answering("ScoreStream", context) as call:
            stream = ScoreStream(self._service, read, context.write, answer_timeout_s=self._answer_timeout_s)
            try:
                await stream.run()
            finally:
                call.request_id, call.num_sequences = stream.request_id, stream.num_sequences
                call.num_tokens = stream.num_tokens

    @asynccontextmanager
    async def _answering(self, method: str, context: Context) -> AsyncIterator[Call]:
        """Around every call; its errors end it with their status."""
        call = Call("grpc", method)
        try:
            async with answering(self._service, call, timeout_s=context.time_remaining()):
                yield call
        except TeacherError as error:
            metadata = (status_metadata(error, call.request_id),)
            await context.abort(status_code(error), error_message(error), trailing_metadata=metadata)


def add_teacher(server: aio.Server, rpc: TeacherRpc) -> None:
    """Registers every method that teacher.proto names, unparsed on the way in."""
    handlers = {}
    for method in SERVICE.methods:
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
        handlers[method.name] = make_handler(getattr(rpc, method.name), response_serializer=_serialize)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


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
        # A client may ping this often, also between its calls (gRPC's own minimum is 5 minutes).
        ("grpc.http2.min_ping_interval_without_data_ms", min_ping_interval_ms),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
