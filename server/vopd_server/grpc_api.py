"""The gRPC transport: bytes to the codec, values to the service, errors to statuses. Nothing is decided here."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio

from vopd_proto import teacher_pb2 as pb
from vopd_server.answer_codec import check_answer_fits, pack_info, pack_response, pack_tokenizer
from vopd_server.codec import (
    check_float_type,
    check_no_unknown_fields,
    parse,
    request_id_of,
    shapes_of_request,
    temperature_of,
    unpack_request,
)
from vopd_server.concurrency import deadline
from vopd_server.errors import EngineError, TeacherError
from vopd_server.grpc_errors import error_message, status_code, status_metadata
from vopd_server.grpc_stream import ScoreStream
from vopd_server.service import TeacherService
from vopd_server.types import ScoreRequest

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Teacher"]
Context = aio.ServicerContext[Any, Any]


@dataclass
class Call:
    """What the log says of one call."""

    method: str
    request_id: str = ""
    num_sequences: int = 0
    num_tokens: int = 0


class TeacherRpc:
    """The methods of the service, by their names in teacher.proto. Requests arrive as bytes, since a message
    that cannot be parsed is to be answered like any other wrong one."""

    def __init__(self, service: TeacherService, *, server_version: str, answer_timeout_s: float) -> None:
        self._service = service
        self._server_version = server_version
        self._answer_timeout_s = answer_timeout_s

    async def GetInfo(self, data: bytes, context: Context) -> pb.GetInfoResponse:
        async with self._answering("GetInfo", context):
            check_no_unknown_fields(parse(pb.GetInfoRequest, data))
            service = self._service
            return pack_info(service.info, service.tokenizer, service.limits, self._server_version)

    async def GetTokenizer(self, data: bytes, context: Context) -> pb.GetTokenizerResponse:
        async with self._answering("GetTokenizer", context):
            check_no_unknown_fields(parse(pb.GetTokenizerRequest, data))
            return pack_tokenizer(self._service.tokenizer)

    async def GetHead(self, data: bytes, context: Context) -> None:
        async with self._answering("GetHead", context):
            check_no_unknown_fields(parse(pb.GetHeadRequest, data))
            self._service.check_head()

    async def Score(self, data: bytes, context: Context) -> pb.ScoreResponse:
        async with self._answering("Score", context) as call:
            request = parse(pb.ScoreRequest, data)
            call.request_id = request_id_of(request)
            check_no_unknown_fields(request)
            check_float_type(request.float_type)
            shapes = shapes_of_request(request)
            call.num_sequences = len(shapes)
            call.num_tokens = sum(shape.num_tokens for shape in shapes)

            def unpack() -> Sequence[ScoreRequest]:
                check_answer_fits(shapes, request.float_type, self._service.limits.max_message_bytes)
                return unpack_request(request, call.request_id)

            scored = await self._service.score_batch(shapes, unpack, temperature=temperature_of(request))
            return pack_response(request, call.request_id, self._service.info.model_revision, scored)

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
        """Around every call: counted while it runs, cut at its deadline, logged at its end, its errors told."""
        call = Call(method)
        started_s = time.monotonic()
        code = grpc.StatusCode.CANCELLED  # what is left when the client goes away
        try:
            async with deadline(context.time_remaining()):
                with self._service.call():
                    yield call
            code = grpc.StatusCode.OK
        except TeacherError as error:
            code = status_code(error)
            await self._abort(context, error, call.request_id)
        except Exception:
            logger.exception("%s failed", method, extra={"request_id": call.request_id})
            code = grpc.StatusCode.INTERNAL
            told = EngineError(f"internal error; the teacher's log tells more under request id {call.request_id!r}")
            await self._abort(context, told, call.request_id)
        finally:
            logger.log(
                logging.INFO if method.startswith("Score") else logging.DEBUG,
                method,
                extra={
                    "request_id": call.request_id,
                    "code": code.name,
                    "num_sequences": call.num_sequences,
                    "num_tokens": call.num_tokens,
                    "seconds": time.monotonic() - started_s,
                },
            )

    @staticmethod
    async def _abort(context: Context, error: TeacherError, request_id: str) -> None:
        metadata = (status_metadata(error, request_id),)
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
