"""The life of one teacher process: listen, load, serve, drain.

The ports are bound and health answers NOT_SERVING before the model is loaded, so that a port in use is found at
once and a load balancer can watch. The first SIGTERM or SIGINT drains; the second one exits at once. An engine that
dies ends the process, for its supervisor to start another.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from vopd_server.admin_api import make_admin_app
from vopd_server.admission import Admission
from vopd_server.answer_codec import pack_tokenizer
from vopd_server.config import ServerConfig
from vopd_server.demand import MIN_TENANT_BYTES
from vopd_server.engines.base import Engine
from vopd_server.errors import ConfigError, EngineDeadError
from vopd_server.golden import run_golden_probe
from vopd_server.golden_record import check_golden_file
from vopd_server.grpc_api import SERVICE, TeacherRpc, add_teacher, server_options
from vopd_server.http_api import make_http_app
from vopd_server.http_listener import HttpListener, bracketed
from vopd_server.key_ring import open_doors
from vopd_server.scheduler import FairScheduler
from vopd_server.service import TeacherService
from vopd_server.tenancy import Tenant
from vopd_server.tls import TlsFiles, check_tls_files
from vopd_server.validation import Limits
from vopd_server.version import SERVER_VERSION
from vopd_server.watchdog import Watchdog

logger = logging.getLogger(__name__)

HEALTH_NAMES = ("", SERVICE.full_name)
# After the last answer was handed to gRPC: time for the bytes to leave.
FLUSH_GRACE_S = 1.0
# For those whose scores died with the engine to hear of it.
LAST_WORDS_S = 5.0

KEYS_REFRESH_S = 1.0

# Exit codes of `serve`; 2 is a wrong setting.
DRAINED, CUT_OFF, ENGINE_DEAD = 0, 1, 3


class TeacherServer:
    """An engine behind its ports. `start`, then `load`, then `drain`."""

    def __init__(self, config: ServerConfig, engine: Engine) -> None:
        """Raises: ConfigError for a certificate, a keys file or a golden file that cannot be used."""
        self._config = config
        if config.golden_file is not None:
            check_golden_file(config.golden_file)
        door, self._said_of_keys = open_doors(config, partial(check_tenants, config))
        scheduler = FairScheduler(
            window_tokens=config.engine_window_tokens or 0,  # until the engine has said what is best
            queue_tokens=config.queue_tokens,
            queue_bytes=config.queue_bytes,
        )
        self.service = TeacherService(
            engine,
            limits_of(config),
            Admission(scheduler),
            door=door,
            window_tokens=config.engine_window_tokens,
            max_calls=config.calls_per_tenant,
        )
        self._health = health_aio.HealthServicer()
        self._server = aio.server(options=server_options(config.max_message_bytes))
        self.url = ""
        self._tls = tls_files(config)
        self._http: HttpListener | None = None
        if config.http_port is not None:
            app = make_http_app(self.service, body_timeout_s=config.answer_timeout_s)
            self._http = HttpListener(app, host=config.host, port=config.http_port, tls=self._tls)
        self._refreshing: asyncio.Task[None] | None = None
        self._watchdog: Watchdog | None = None
        self._admin: HttpListener | None = None
        if config.admin_port is not None:
            self._admin = HttpListener(make_admin_app(self.service), host=config.admin_host, port=config.admin_port)

    @property
    def http_url(self) -> str:
        """Empty without HTTP, as `admin_url` is without an admin listener."""
        return self._http.url if self._http is not None else ""

    @property
    def admin_url(self) -> str:
        return self._admin.url if self._admin is not None else ""

    async def start(self) -> None:
        """Binds the ports. Raises: ConfigError when one cannot be had."""
        for name in HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_teacher(self._server, TeacherRpc(self.service, answer_timeout_s=self._config.answer_timeout_s))
        self.url = self._bind_grpc()
        await self._server.start()
        for listener in (self._http, self._admin):
            if listener is not None:
                await listener.start()
        self._refreshing = asyncio.create_task(self._refresh_tenants(), name="vopd-keys")

    async def _refresh_tenants(self) -> None:
        """Keys that were made or revoked count within a second or two."""
        while True:
            await asyncio.sleep(KEYS_REFRESH_S)
            self.service.refresh_tenants()

    def _bind_grpc(self) -> str:
        tls = self._tls
        host = bracketed(self._config.host)
        where = f"{host}:{self._config.port}"
        try:
            if tls is None:
                return f"grpc://{host}:{self._server.add_insecure_port(where)}"
            pair = (tls.key.read_bytes(), tls.cert.read_bytes())
            return f"grpcs://{host}:{self._server.add_secure_port(where, grpc.ssl_server_credentials([pair]))}"
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {where}: in use, or not ours to take") from error

    async def load(self) -> None:
        """Loads the model, probes it and says SERVING. Raises: ConfigError, and what the engine raises."""
        await self.service.start(self._probe)
        table_bytes = pack_tokenizer(self.service.tokenizer).ByteSize()
        if table_bytes > self._config.max_message_bytes:
            raise ConfigError(
                f"max_message_bytes {self._config.max_message_bytes} < {table_bytes}, the tokenizer's table, "
                "which every client may ask for"
            )
        for name in HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def _probe(self, engine: Engine) -> None:
        golden = await run_golden_probe(engine, record_file=self._config.golden_file)
        self.service.golden_probe = golden.description
        self._watchdog = Watchdog(
            engine,
            golden.reference,
            interval_s=self._config.watchdog_interval_s,
            hang_timeout_s=self._config.engine_hang_timeout_s,
            last_answer_s=lambda: self.service.last_answer_s,
        )

    async def wait_until_dead(self) -> EngineDeadError:
        """Returns when the engine can score nothing any more; health says NOT_SERVING then."""
        reason = await self.service.wait_until_dead(self._watchdog)
        await self._health.enter_graceful_shutdown()
        return reason

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
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        is_idle = self.service.is_idle
        ending = [self._server.stop(FLUSH_GRACE_S if is_idle else 0)]
        if self._http is not None:
            ending.append(self._http.stop(is_idle=is_idle))
        await asyncio.gather(*ending)
        await self.service.close()
        if self._admin is not None:  # the last: an operator may want to see what takes so long
            await self._admin.stop(is_idle=True)

    def describe(self) -> str:
        """One line for people, and for whoever waits for the address."""
        info, limits = self.service.info, self.service.limits
        http = f", {self.http_url}" if self.http_url else ""
        admin = f" (admin {self.admin_url})" if self.admin_url else ""
        return (
            f"vopd-server {SERVER_VERSION} ready at {self.url}{http}{admin}: "
            f"model {info.model_id} (revision {info.model_revision}), engine {info.engine} {info.engine_version}, "
            f"dtype {info.dtype}, {limits.max_context_length} tokens a sequence, "
            f"{limits.max_tokens_per_request} tokens and "
            f"{limits.max_sequences_per_request} sequences a request, support up to {limits.max_top_k} ids, "
            f"queue {self._config.queue_tokens} tokens a tenant, {self._said_of_tenants()}"
        )

    def _said_of_tenants(self) -> str:
        if self._config.keys_file is None:
            return "no API keys"
        said = f"{len(self.service.admission.scheduler.queues)} tenants with keys in {self._config.keys_file}"
        return f"{said} ({self._said_of_keys})" if self._said_of_keys else said


def check_tenants(config: ServerConfig, tenants: Sequence[Tenant]) -> None:
    """Raises: ConfigError for more tenants than there is memory for."""
    most = config.queue_bytes // MIN_TENANT_BYTES
    if len(tenants) > most:
        raise ConfigError(
            f"{len(tenants)} tenants > {most}: queue_bytes {config.queue_bytes} leaves each less than the "
            f"{MIN_TENANT_BYTES} bytes that a long completion needs"
        )


def tls_files(config: ServerConfig) -> TlsFiles | None:
    """None: no TLS. Raises: ConfigError for files that cannot be used."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    files = TlsFiles(config.tls_cert_file, config.tls_key_file)
    check_tls_files(files)
    return files


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
    """Serves until a signal, or until the engine dies; the exit code: DRAINED, CUT_OFF or ENGINE_DEAD.

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
            return DRAINED
        try:
            loading.result()
        except EngineDeadError as error:
            logger.error("the engine died before it could score, and so this process ends: %s", error)
            return ENGINE_DEAD
        announce(server.describe())
        dying = asyncio.create_task(server.wait_until_dead())
        await asyncio.wait({stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            logger.error("the engine cannot go on, and so this process ends: %s", dying.result())
            await server.drain(LAST_WORDS_S)
            return ENGINE_DEAD
        logger.info("draining", extra={"drain_timeout_s": config.drain_timeout_s})
        finished = await server.drain(config.drain_timeout_s)
        dying.cancel()
        return DRAINED if finished else CUT_OFF
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
    """Without waiting for the engine's threads. Its processes, which nobody else would end, are killed."""
    logger.warning("second %s: exiting at once", number.name)
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    os._exit(128 + number)
