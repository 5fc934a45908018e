"""The unary calls, whatever the transport: what they answer, and what goes on around them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vopd_proto import teacher_pb2 as pb
from vopd_server.answer_codec import (
    answer_format_of,
    check_answer_fits,
    json_format,
    pack_info,
    pack_response,
    pack_tokenizer,
)
from vopd_server.codec import (
    check_float_type,
    check_no_unknown_fields,
    request_id_of,
    shapes_of_request,
    temperature_of,
    unpack_request,
)
from vopd_server.concurrency import deadline
from vopd_server.errors import EngineError, TeacherError
from vopd_server.grpc_errors import status_code
from vopd_server.service import TeacherService
from vopd_server.tenancy import NOBODY, Tenant
from vopd_server.types import HeadFile, ScoreRequest
from vopd_server.version import SERVER_VERSION

logger = logging.getLogger(__name__)

HEAD_PIECE_BYTES = 2**20
_QUIET_METHODS = ("GetInfo", "GetTokenizer", "Models", "ModelInfo")  # every handshake's; logged for debugging only


@dataclass
class Call:
    """What the log and the metrics say of one call. `method` is its name in teacher.proto; tenant: nobody until it is
    known whose call it is."""

    transport: Literal["grpc", "http"]
    method: str
    tenant: Tenant = NOBODY
    request_id: str = ""
    num_sequences: int = 0
    num_tokens: int = 0


def get_info(service: TeacherService, call: Call) -> pb.GetInfoResponse:
    return pack_info(service.info, service.tokenizer, service.limits_for(call.tenant), SERVER_VERSION)


def get_tokenizer(service: TeacherService) -> pb.GetTokenizerResponse:
    return pack_tokenizer(service.tokenizer)


async def score(
    service: TeacherService, call: Call, request: pb.ScoreRequest, *, max_json_bytes: int | None = None
) -> pb.ScoreResponse:
    """Scores a small batch, all or nothing.

    max_json_bytes: bounds an answer that is going to be JSON, beside max_message_bytes.

    Raises: as `TeacherService.score_batch`.
    """
    call.request_id = request_id_of(request)
    check_no_unknown_fields(request)
    check_float_type(request.float_type)
    shapes = shapes_of_request(request)
    call.num_sequences = len(shapes)
    call.num_tokens = sum(shape.num_tokens for shape in shapes)

    def unpack() -> Sequence[ScoreRequest]:
        info = service.info
        check_answer_fits(shapes, answer_format_of(info, request.float_type), service.limits.max_message_bytes)
        if max_json_bytes is not None:
            check_answer_fits(shapes, json_format(info), max_json_bytes, limit="the bound on answers in JSON")
        return unpack_request(request, call.request_id)

    temperature = temperature_of(request)
    async with service.scored_batch(call.tenant, shapes, unpack, temperature=temperature) as scored:
        # In a thread: rounding the hidden states of a large answer takes tenths of a second.
        started_s = time.monotonic()
        response = await asyncio.to_thread(pack_response, request, call.request_id, service.info, scored)
        service.metrics.stage(call.tenant.id, "encode", time.monotonic() - started_s)
    return response


async def head_pieces(head: HeadFile) -> AsyncIterator[bytes]:
    """The file in pieces of HEAD_PIECE_BYTES, each read in a thread when it is asked for.

    Raises: EngineError when the file is not what it was.
    """
    for offset in range(0, head.num_bytes, HEAD_PIECE_BYTES):
        num_bytes = min(HEAD_PIECE_BYTES, head.num_bytes - offset)
        yield await asyncio.to_thread(_read_piece, head.path, offset, num_bytes)


def _read_piece(path: Path, offset: int, num_bytes: int) -> bytes:
    """Opens the file anew: a read that nobody waits for any more has nothing to close under it."""
    with path.open("rb") as file:
        file.seek(offset)
        piece = file.read(num_bytes)
    if len(piece) != num_bytes:
        raise EngineError(f"the file of the output head ends at byte {offset + len(piece)}")
    return piece


def bearer_token(authorization: str) -> str:
    """The key of an Authorization header; what is no bearer token is no key."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


@asynccontextmanager
async def answering(
    service: TeacherService, call: Call, *, api_key: str | None, timeout_s: float | None
) -> AsyncIterator[None]:
    """Around every call: told whose it is before anything of it is read, counted while it runs, cut at its deadline,
    logged and measured at its end.

    api_key: None: the call has none. timeout_s: until the caller's deadline; None: there is none.

    Raises: the TeacherErrors that come out of it; EngineError in the place of whatever else does, which is logged.
    """
    started_s = time.monotonic()
    code = "CANCELLED"  # what is left when the client goes away
    try:
        call.tenant = service.authenticate(api_key)
        async with deadline(timeout_s):
            with service.call(call.tenant):
                yield
        code = "OK"
    except TeacherError as error:
        code = status_code(error).name
        raise
    except Exception as error:
        logger.exception("%s failed", call.method, extra={"request_id": call.request_id})
        code = "INTERNAL"
        raise EngineError(
            f"internal error; the teacher's log tells more under request id {call.request_id!r}"
        ) from error
    finally:
        seconds = time.monotonic() - started_s
        service.metrics.call_ended(call.transport, call.method, code, seconds, call.tenant.id)
        if code not in ("OK", "CANCELLED"):  # who hangs up has not been rejected; a client may end its stream so
            service.rejected(call.tenant.id, code)
        logger.log(
            logging.DEBUG if call.method in _QUIET_METHODS else logging.INFO,
            call.method,
            extra={
                "transport": call.transport,
                "tenant": call.tenant.id,
                "request_id": call.request_id,
                "code": code,
                "num_sequences": call.num_sequences,
                "num_tokens": call.num_tokens,
                "seconds": seconds,
            },
        )
