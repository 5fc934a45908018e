"""An ASGI application on a socket, in the event loop of the teacher and under its signal handlers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from vopd_server.errors import ConfigError
from vopd_server.http_bodies import UnreadBodies
from vopd_server.tls import TlsFiles

BACKLOG = 2048
# Longer than clients keep an idle connection, so that none is closed while it is being used again.
KEEP_ALIVE_S = 75
SHUTDOWN_GRACE_S = 1


class HttpListener:
    """`start` binds and serves, `stop` ends it."""

    def __init__(self, app: FastAPI, *, host: str, port: int, tls: TlsFiles | None = None) -> None:
        self._host = host
        self._port = port
        self._scheme = "http" if tls is None else "https"
        self._server = _Server(
            uvicorn.Config(
                UnreadBodies(app),
                log_config=None,  # whoever starts this has set up logging
                access_log=False,  # `calls.answering` logs
                lifespan="off",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
                ssl_certfile=None if tls is None else str(tls.cert),
                ssl_keyfile=None if tls is None else str(tls.key),
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self) -> None:
        """Raises: ConfigError when the port cannot be had."""
        listening = bind(self._host, self._port)
        self.url = f"{self._scheme}://{bracketed(self._host)}:{listening.getsockname()[1]}"
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110  # uvicorn offers no event
            await asyncio.sleep(0.005)

    async def stop(self, *, is_idle: bool) -> None:
        """Closes every connection; calls that are still in flight are cancelled unless `is_idle`."""
        if self._serving is None:
            return
        self._server.should_exit = True
        self._server.force_exit = not is_idle
        await self._serving


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to `lifecycle`, which drains."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket that shares its port with nobody.

    Raises: ConfigError.
    """
    where = f"{bracketed(host)}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
    # Its connections inherit it. asyncio leaves it out for a socket that is not told its protocol; the last piece of
    # an answer would then wait, for 40 ms, until the client acknowledges the piece before.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def bracketed(host: str) -> str:
    """`host` as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
