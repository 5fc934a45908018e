"""A teacher over HTTP: protobuf bodies, many connections kept open side by side."""

from __future__ import annotations

import asyncio
import socket
import ssl
import urllib.request
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, TypeVar

import grpc
import httpx2

from vopd_client.errors import ConfigError, HandshakeError
from vopd_client.teacher.channel import Address, tls_context
from vopd_client.teacher.http_answers import OCTETS, PROTOBUF, HttpAnswer
from vopd_client.teacher.http_failures import failure_of_connection
from vopd_client.teacher.http_stream import HttpStreamCall
from vopd_client.teacher.status import Failure
from vopd_client.teacher.transport import CallFailed, Traffic
from vopd_proto import MAX_MESSAGE_BYTES
from vopd_proto import teacher_pb2 as pb

CONNECT_TIMEOUT_S = 30.0
# Shorter than the teacher's 75 s, so that it does not end a connection while that is being used again.
IDLE_CONNECTION_S = 60.0
# A machine that vanished sends no reset. Both limits, since probes are not sent while data is on its way.
KEEPALIVE_AFTER_S, KEEPALIVE_INTERVAL_S, NUM_KEEPALIVES = 20, 10, 3
UNACKNOWLEDGED_S = KEEPALIVE_AFTER_S + KEEPALIVE_INTERVAL_S * NUM_KEEPALIVES

Result = TypeVar("Result")


class HttpTransport:
    """Implements `transport.Transport`. A request that failed may be sent again: scoring changes nothing."""

    def __init__(
        self,
        address: Address,
        *,
        api_key: str | None,
        tls_roots: bytes | None,
        traffic: Traffic,
        max_connections: int,
    ) -> None:
        """Raises: ConfigError for an address that HTTP cannot be spoken with."""
        self._address = address
        self._traffic = traffic
        self._model_revision = ""
        self._calls: set[asyncio.Task[Any]] = set()
        self._closed = False
        try:
            self._client = httpx2.AsyncClient(
                base_url=address.url,
                headers=request_headers(api_key),
                # How long an answer may take is for the one who waits to say.
                timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
                transport=httpx2.AsyncHTTPTransport(
                    verify=_tls_context(address, tls_roots),
                    proxy=proxy_of(address),
                    limits=httpx2.Limits(
                        max_connections=max_connections,
                        max_keepalive_connections=max_connections,
                        keepalive_expiry=IDLE_CONNECTION_S,
                    ),
                    socket_options=socket_options(),
                ),
            )
        except (httpx2.InvalidURL, ValueError, ImportError) as error:
            raise ConfigError(f"teacher URL {address.url!r}, or the proxy in between: {error}") from error

    async def get_info(self, *, timeout_s: float) -> pb.GetInfoResponse:
        """Raises: CallFailed; HandshakeError where something else than a teacher answers."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._call("GET", "/v1/info")
        except TimeoutError as error:
            late = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {timeout_s:g} s")
            raise CallFailed(late) from error
        if not answer.may_be_a_teachers:
            raise HandshakeError(
                f"{self._address.url} does not look like a vopd teacher: "
                f"GET {self._address.prefix}/v1/info was answered with {answer.summary}"
            )
        info = answer.message(pb.GetInfoResponse)
        self._model_revision = info.model_revision
        return info

    async def get_tokenizer(self) -> pb.GetTokenizerResponse:
        answer = await self._call("GET", "/v1/tokenizer")
        return answer.message(pb.GetTokenizerResponse)

    async def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        body = request.SerializeToString()
        self._traffic.bytes_sent += len(body)
        answer = await self._call("POST", "/v1/score", body)
        self._traffic.bytes_received += len(answer.body)
        return answer.message(pb.ScoreResponse)

    async def get_head(self) -> AsyncGenerator[pb.GetHeadResponse, None]:
        async with aclosing(self._head_pieces()) as pieces:
            while (piece := await self._until_closed(_next_or_none(pieces))) is not None:
                yield piece

    def open_stream(self) -> HttpStreamCall:
        return HttpStreamCall(self.score, self._model_revision)

    async def close(self) -> None:
        self._closed = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._client.aclose()

    async def _call(self, method: str, path: str, body: bytes | None = None) -> HttpAnswer:
        return await self._until_closed(self._exchange(method, path, body))

    async def _until_closed(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` gives, in a task of its own so that `close` can end it."""
        if self._closed:
            work.close()
            raise CallFailed(Failure(grpc.StatusCode.CANCELLED, "the connection was closed"))
        task = asyncio.create_task(work)
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError as error:
            if self._closed:
                raise CallFailed(Failure(grpc.StatusCode.CANCELLED, "the connection was closed")) from error
            raise
        finally:
            self._calls.discard(task)

    async def _exchange(self, method: str, path: str, body: bytes | None) -> HttpAnswer:
        """Raises: CallFailed when there is no whole answer."""
        headers = {} if body is None else {"Content-Type": PROTOBUF}
        try:
            async with self._client.stream(method, path, content=body, headers=headers) as response:
                return await _whole_answer(response)
        except (httpx2.RequestError, OSError) as error:
            raise CallFailed(failure_of_connection(error, self._address)) from error

    async def _head_pieces(self) -> AsyncGenerator[pb.GetHeadResponse, None]:
        """Raises: CallFailed when it does not come, or not to its end."""
        try:
            async with self._client.stream("GET", "/v1/head", headers={"Accept": OCTETS}) as response:
                if not _answer_so_far(response).is_octets:
                    raise CallFailed((await _whole_answer(response)).failure())
                num_bytes = int(response.headers.get("Content-Length", 0))
                async for data in response.aiter_bytes():
                    yield pb.GetHeadResponse(data=data, num_bytes=num_bytes)
                    num_bytes = 0
        except (httpx2.RequestError, OSError) as error:
            raise CallFailed(failure_of_connection(error, self._address)) from error


async def _next_or_none(pieces: AsyncGenerator[pb.GetHeadResponse, None]) -> pb.GetHeadResponse | None:
    return await anext(pieces, None)


def _answer_so_far(response: httpx2.Response, body: bytes = b"") -> HttpAnswer:
    """An answer as far as it has been read."""
    return HttpAnswer(
        response.status_code,
        body,
        content_type=response.headers.get("Content-Type", ""),
        retry_after=response.headers.get("Retry-After", ""),
        location=response.headers.get("Location", ""),
    )


async def _whole_answer(response: httpx2.Response) -> HttpAnswer:
    return _answer_so_far(response, await _read_body(response))


async def _read_body(response: httpx2.Response) -> bytes:
    """The body, as far as any message may be long."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_MESSAGE_BYTES:
            too_large = f"received an answer larger than max ({MAX_MESSAGE_BYTES} bytes)"
            raise CallFailed(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large))
    return bytes(body)


def request_headers(api_key: str | None) -> dict[str, str]:
    """What goes with every request."""
    headers = {
        "Accept": PROTOBUF,
        "Accept-Encoding": "identity",  # packed numbers hardly shrink
        "User-Agent": f"vopd-client/{version('vopd')}",
    }
    return headers | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def proxy_of(address: Address) -> str | None:
    """The proxy that the environment names for this address; none for loopback, as for gRPC."""
    if address.is_loopback or urllib.request.proxy_bypass(address.host):
        return None
    proxy = urllib.request.getproxies().get(address.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def socket_options() -> list[tuple[int, int, int]]:
    """TCP's own probes; systems differ in which of them can be set."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_AFTER_S),
        ("TCP_KEEPALIVE", KEEPALIVE_AFTER_S),  # macOS's name of the same
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", NUM_KEEPALIVES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_S * 1000),
    ):
        if (option := getattr(socket, name, None)) is not None:
            options.append((socket.IPPROTO_TCP, option, value))
    return options


def _tls_context(address: Address, roots: bytes | None) -> ssl.SSLContext | bool:
    if not address.secure:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used, and empty, since reading all roots takes a while
    return True if roots is None else tls_context(roots)
