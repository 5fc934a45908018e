"""The life of one teacher process: listen, load, serve, drain.

The port is bound and health answers NOT_SERVING before the model is loaded, so that a port in use is found at
once and a load balancer can watch. The first SIGTERM or SIGINT drains; the second one exits at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from importlib.metadata import version
from typing import NoReturn

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from vopd_server.admission import Admission, TokenBudget
from vopd_server.answer_codec import pack_tokenizer
from vopd_server.config import ServerConfig
from vopd_server.engines.base import Engine
from vopd_server.errors import ConfigError
from vopd_server.grpc_api import SERVICE, TeacherRpc, add_teacher, server_options
from vopd_server.service import TeacherService
from vopd_server.validation import Limits

logger = logging.getLogger(__name__)

SERVER_VERSION = version("vopd")
HEALTH_NAMES = ("", SERVICE.full_name)
# After the last answer was handed to gRPC: time for the bytes to leave.
FLUSH_GRACE_S = 1.0


class TeacherServer:
    """An engine behind a port. `start`, then `load`, then `drain`."""

    def __init__(self, config: ServerConfig, engine: Engine) -> None:
        self._config = config
        self.service = TeacherService(engine, limits_of(config), Admission(TokenBudget(config.queue_tokens)))
        self._health = health_aio.HealthServicer()
        self._server = aio.server(options=server_options(config.max_message_bytes))
        self.url = ""

    async def start(self) -> None:
        """Binds the port. Raises: ConfigError when that cannot be had."""
        for name in HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        rpc = TeacherRpc(self.service, server_version=SERVER_VERSION, answer_timeout_s=self._config.answer_timeout_s)
        add_teacher(self._server, rpc)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {host}:{self._config.port}: in use, or not ours to take") from error
        await self._server.start()
        self.url = f"grpc://{host}:{port}"

    async def load(self) -> None:
        """Loads the model and says SERVING. Raises: ConfigError, and what the engine raises."""
        await self.service.start()
        table_bytes = pack_tokenizer(self.service.tokenizer).ByteSize()
        if table_bytes > self._config.max_message_bytes:
            raise ConfigError(
                f"max_message_bytes {self._config.max_message_bytes} < {table_bytes}, the tokenizer's table, "
                "which every client may ask for"
            )
        for name in HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new, finishes what is in flight; whether it did within `timeout_s`."""
        await self._health.enter_graceful_shutdown()
        self.service.drain()
        try:
            await asyncio.wait_for(self.service.wait_until_idle(), timeout_s)
        except TimeoutError:
            logger.warning("drain_timeout_s %g is over: what is still in flight is cut off", timeout_s)
            return False
        return True

    async def close(self) -> None:
        """Ends what is left and frees the model."""
        await self._server.stop(FLUSH_GRACE_S if self.service.is_idle else 0)
        await self.service.close()

    def describe(self) -> str:
        """One line for people, and for whoever waits for the address."""
        info, limits = self.service.info, self.service.limits
        return (
            f"vopd-server {SERVER_VERSION} ready at {self.url}: "
            f"model {info.model_id} (revision {info.model_revision}), engine {info.engine} {info.engine_version}, "
            f"dtype {info.dtype}, {limits.max_context_length} tokens a sequence, "
            f"{limits.max_tokens_per_request} tokens and "
            f"{limits.max_sequences_per_request} sequences a request, support up to {limits.max_top_k} ids, "
            f"queue {self._config.queue_tokens} tokens"
        )


def limits_of(config: ServerConfig) -> Limits:
    """What clients may ask for, as far as it is known before the model is loaded."""
    return Limits(
        max_context_length=config.max_context_length or config.max_tokens_per_request,
        max_sequences_per_request=config.max_sequences_per_request,
        max_tokens_per_request=config.max_tokens_per_request,
        max_top_k=config.max_top_k,
        max_message_bytes=config.max_message_bytes,
    )


async def serve(config: ServerConfig, engine: Engine, *, announce: Callable[[str], None]) -> int:
    """Serves until a signal; the exit code: 0, or 1 when draining cut something off.

    announce: called once, with the line that holds the address, when the first request can be scored.
    Raises: ConfigError, and what the engine raises while it starts.
    """
    stop = _stop_on_signals()
    server = TeacherServer(config, engine)
    try:
        await server.start()
        loading = asyncio.create_task(server.load())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            logger.info("stopped while loading the model")
            loading.cancel()
            await asyncio.wait({loading})
            return 0
        loading.result()
        announce(server.describe())
        await stopping
        logger.info("draining", extra={"drain_timeout_s": config.drain_timeout_s})
        finished = await server.drain(config.drain_timeout_s)
        return 0 if finished else 1
    finally:
        await server.close()


def _stop_on_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second one ends the process there and then."""
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            _exit_now(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


def _exit_now(number: signal.Signals) -> NoReturn:
    """Without waiting for the engine's threads."""
    logger.warning("second %s: exiting at once", number.name)
    logging.shutdown()
    os._exit(128 + number)
