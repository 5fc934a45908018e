"""The scripted teacher over HTTP: the same script, the same answers, on sockets that a test can break at will.

Over HTTP a stream is what follows a handshake: a sequence that comes in a request of its own is recorded as if it had
come in a stream. What the script says of row chunks has no meaning here.
"""

from __future__ import annotations

import asyncio
import json
import math
import ssl
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import h11

from fake_teacher import FakeTeacher, Refusal, Script
from vopd_proto import MAX_MESSAGE_BYTES
from vopd_proto import teacher_pb2 as pb

STATUS_OF_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: 422,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

OCTETS = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Reply:
    """What goes back. cut_after: bytes of the body after which the connection is dropped, or with cut_all every one.

    chunked: without a Content-Length. piece_bytes: written at a time, with a pause in between; 0: all at once.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/x-protobuf"})
    cut_after: int | None = None
    cut_all: bool = False
    chunked: bool = False
    piece_bytes: int = 0
    pause_s: float = 0.0

    @property
    def framing(self) -> dict[str, str]:
        return {"Transfer-Encoding": "chunked"} if self.chunked else {"Content-Length": str(len(self.body))}

    @property
    def pieces(self) -> list[bytes]:
        body = self.body[: self.cut_after]
        step = self.piece_bytes or max(1, len(body))
        return [body[first : first + step] for first in range(0, len(body), step)]


def error_reply(refusal: Refusal) -> Reply:
    """As the contract has it."""
    error = {
        "code": refusal.code.name,
        "message": refusal.message,
        "field": refusal.field,
        "retry_delay_s": refusal.retry_delay_s,
        "request_id": "",
    }
    headers = {"Content-Type": "application/json"}
    if refusal.retry_delay_s is not None:
        headers["Retry-After"] = str(math.ceil(refusal.retry_delay_s))
    return Reply(json.dumps({"error": error}).encode(), STATUS_OF_CODE[refusal.code], headers)


class FakeHttpTeacher(FakeTeacher):
    """As `FakeTeacher`. `gateway`: what to answer instead, by path and the first first, as something on the way would.

    prefix: of every path.
    """

    def __init__(
        self, script: Script | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES, prefix: str = ""
    ) -> None:
        super().__init__(script, max_message_bytes=max_message_bytes)
        self.gateway: defaultdict[str, deque[Reply]] = defaultdict(deque)
        self._prefix = prefix
        self.num_connections = 0
        self.num_cut = 0
        self._scheme = "http"
        self._listener: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._new_stream = True
        self._answers_left: int | None = None
        self._held: list[asyncio.Event] = []

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    async def start(self, tls: tuple[Path, Path] | None = None) -> None:
        context = None
        if tls is not None:
            key, certificate = tls
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self._scheme = "https"
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=context)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._listener is not None:
            for listening in self._listener.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            # What was accepted just now is not among the connections yet, and would be leaked by asyncio, with a
            # warning at some later time, if its server were closed before.
            await asyncio.sleep(0.01)
            self._listener.close()
            connections = list(self._connections)
            self.drop_connections()
            for connection in connections:
                connection.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            self._listener = None
            self._held.clear()

    def drop_connections(self) -> None:
        """Resets every connection there is."""
        for writer in self._connections.values():
            writer.transport.abort()

    @property
    def num_held(self) -> int:
        return len(self._held)

    def release(self) -> None:
        """Answers what is held, and everything that comes at once."""
        self.script.hold_answers_until = 0
        self._let_go()

    # ------------------------------------------------------------ HTTP

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        self.num_connections += 1
        try:
            await self._serve(h11.Connection(h11.SERVER), reader, writer)
        except (ConnectionError, h11.RemoteProtocolError, asyncio.CancelledError):
            pass  # the client has gone, or this teacher was stopped
        finally:
            del self._connections[task]
            writer.close()

    async def _serve(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while (asked := await _receive(connection, reader)) is not None:
            request, body = asked
            self.record.metadata.append({name.decode(): value.decode() for name, value in request.headers})
            path = request.target.decode().removeprefix(self._prefix)
            reply = await self._reply(path, body)
            headers = reply.headers | reply.framing
            writer.write(connection.send(h11.Response(status_code=reply.status, headers=list(headers.items()))))
            for piece in reply.pieces:
                writer.write(connection.send(h11.Data(data=piece)))
                await writer.drain()
                await asyncio.sleep(reply.pause_s)
            if reply.cut_after is not None:
                cut = list(self._connections.values()) if reply.cut_all else [writer]  # none that is made meanwhile
                await asyncio.sleep(0.01)  # so that what was written is not thrown away with the connection
                for each in cut:
                    each.transport.abort()
                self.num_cut += 1
                return
            writer.write(connection.send(h11.EndOfMessage()))
            connection.start_next_cycle()

    # ------------------------------------------------------------ the service

    async def _reply(self, path: str, body: bytes) -> Reply:
        if path == "/v1/score":
            return await self._score(body)
        if self.gateway[path]:
            return self.gateway[path].popleft()
        match path:
            case "/v1/info":
                self.record.num_info_calls += 1
                if self.script.refuse_info:
                    return error_reply(self.script.refuse_info.popleft())
                self._new_stream = True
                return Reply(self.info().SerializeToString())
            case "/v1/tokenizer":
                return Reply(self.tokenizer().SerializeToString())
            case "/v1/head":
                return self._head()
        return Reply(b'{"detail":"Not Found"}', 404, {"Content-Type": "application/json"})

    def _head(self) -> Reply:
        self.record.num_head_calls += 1
        script = self.script
        if script.refuse_head:
            return error_reply(script.refuse_head.popleft())
        return Reply(
            script.head,
            headers=OCTETS,
            cut_after=script.break_head_after.popleft() if script.break_head_after else None,
            piece_bytes=script.head_piece_bytes,
            pause_s=script.head_piece_pause_s,
        )

    async def _score(self, body: bytes) -> Reply:
        if len(body) > self._max_message_bytes:
            return error_reply(Refusal(grpc.StatusCode.INVALID_ARGUMENT, "body: larger than max"))
        request = pb.ScoreRequest.FromString(body)
        if request.request_id == "golden":
            return Reply((await self.answer_probe(request)).SerializeToString())
        self.record.bytes_in += len(body)
        self.record.score_requests.append(request)
        self.record.num_sequences += len(request.sequences)
        if len(request.sequences) == 1:
            self._record_in_stream(request)
        reply = self._scripted_reply() or await self._answer_request(request)
        self.record.bytes_out += len(reply.body) if reply.cut_after is None else 0
        return reply

    def _record_in_stream(self, request: pb.ScoreRequest) -> None:
        if self._new_stream:
            self._new_stream = False
            self.record.streams.append([])
            self._answers_left = self.script.end_stream_after.popleft() if self.script.end_stream_after else None
        self.record.streams[-1].append(pb.ScoreStreamRequest(sequence=request.sequences[0]))

    def _scripted_reply(self) -> Reply | None:
        if self.gateway["/v1/score"]:
            return self.gateway["/v1/score"].popleft()
        for refusals in (self.script.refuse_score, self.script.refuse_stream, self.script.refuse_sequence):
            if refusals:
                return error_reply(refusals.popleft())
        return None

    async def _answer_request(self, request: pb.ScoreRequest) -> Reply:
        if self.script.answer_nothing:
            await asyncio.Event().wait()
        await self._hold()
        body = self.answers(request).SerializeToString()
        if self._answers_left == 0:
            return Reply(body, cut_after=len(body) // 2, cut_all=True)
        self._answers_left = None if self._answers_left is None else self._answers_left - 1
        return Reply(body)

    async def _hold(self) -> None:
        """Until so many are held as the script says; then all are let go."""
        released = asyncio.Event()
        self._held.append(released)
        self.record.max_outstanding = max(self.record.max_outstanding, len(self._held))
        if len(self._held) >= self.script.hold_answers_until:
            self._let_go()
        await released.wait()

    def _let_go(self) -> None:
        for event in reversed(self._held) if self.script.answer_in_reverse else self._held:
            event.set()
        self._held.clear()


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request, bytes] | None:
    """The next request with its body; None when the client has hung up."""
    request, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            return request, body
        else:
            return None
