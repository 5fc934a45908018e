"""What Prometheus is told: what the service and the transports record, each thing once, and what a status holds.

`tenant` is the id of a known key, or "" where a call has none: a label's values never come from what strangers send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from vopd_server.status import ServiceStatus, TenantStatus

Stage = Literal["validate", "queue", "engine", "encode"]
Transport = Literal["grpc", "http"]
Direction = Literal["received", "sent"]

# From a prefix that is cached whole to minutes of queueing behind other jobs.
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STATES = ("starting", "ready", "draining", "dead")
WAITS_FOR = ("engine", "tokens_in_flight", "tokens_per_minute")


class Metrics:
    """One teacher's numbers, in a registry of its own: tests start many teachers in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "vopd_calls", "Calls that have ended.", ["transport", "method", "tenant", "code"], registry=self.registry
        )
        self._call_seconds = Histogram(
            "vopd_call_seconds",
            "Seconds from the start of a call to its end; a stream is one call.",
            ["transport", "method", "tenant"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._rejections = Counter(
            "vopd_rejections",
            "Calls, and sequences of streams, that ended with an error.",
            ["tenant", "code"],
            registry=self.registry,
        )
        self._sequences = Counter("vopd_sequences_scored", "Sequences scored.", ["tenant"], registry=self.registry)
        self._tokens = Counter(
            "vopd_tokens", "Tokens of the sequences scored.", ["tenant", "part"], registry=self.registry
        )
        self._stage_seconds = Histogram(
            "vopd_stage_seconds",
            "Seconds of a request in being validated, in the queue, in the engine and in being encoded.",
            ["tenant", "stage"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._bytes = Counter(
            "vopd_transport_bytes",
            "Bytes of the messages and bodies of calls.",
            ["tenant", "transport", "direction"],
            registry=self.registry,
        )

    def call_ended(self, transport: Transport, method: str, code: str, seconds: float, tenant: str) -> None:
        self._calls.labels(transport, method, tenant, code).inc()
        self._call_seconds.labels(transport, method, tenant).observe(seconds)

    def rejected(self, tenant: str, code: str) -> None:
        """A call, or a sequence of a stream that goes on, ended with an error, whose code its caller hears."""
        self._rejections.labels(tenant, code).inc()

    def sequence_scored(self, tenant: str, *, context_tokens: int, completion_tokens: int) -> None:
        self._sequences.labels(tenant).inc()
        self._tokens.labels(tenant, "context").inc(context_tokens)
        self._tokens.labels(tenant, "completion").inc(completion_tokens)

    def stage(self, tenant: str, stage: Stage, seconds: float) -> None:
        """How long one request, or one sequence of a stream, was in `stage`."""
        self._stage_seconds.labels(tenant, stage).observe(seconds)

    def bytes_moved(self, tenant: str, transport: Transport, direction: Direction, num_bytes: int) -> None:
        self._bytes.labels(tenant, transport, direction).inc(num_bytes)

    def exposition(self, status: ServiceStatus) -> tuple[bytes, str]:
        """Everything in Prometheus's text format, and its content type. Tens of milliseconds; any thread may do it.

        The process's global registry comes with it: Python's own numbers, and vLLM's (`vllm:*`) where it runs.
        """
        parts: tuple[Collector, ...] = (StatusCollector(lambda: status), self.registry, REGISTRY)
        return b"".join(generate_latest(part) for part in parts), CONTENT_TYPE_LATEST


# ---------------------------------------------------------------- the status

_Teacher = tuple[str, str, Callable[[ServiceStatus], float]]
_Tenant = tuple[str, str, Callable[[TenantStatus], float]]

_TEACHER_GAUGES: tuple[_Teacher, ...] = (
    ("vopd_ready", "1 when requests are answered.", lambda s: s.state == "ready"),
    ("vopd_uptime_seconds", "Seconds since the process began to serve.", lambda s: s.uptime_s),
    ("vopd_calls_in_flight", "Calls that have begun and not ended.", lambda s: s.calls_in_flight),
    (
        "vopd_reserved_tokens",
        "Tokens admitted and not yet answered.",
        lambda s: sum(tenant.reserved_tokens for tenant in s.tenants),
    ),
    (
        "vopd_waiting_sequences",
        "Sequences of streams held back.",
        lambda s: sum(tenant.held_sequences for tenant in s.tenants),
    ),
    (
        "vopd_keys_file_ok",
        "0 when the keys file could not be loaded again: the keys before it still hold.",
        lambda s: not s.keys_problem,
    ),
    ("vopd_engine_window_tokens", "Tokens that may run in the engine at a time.", lambda s: s.window_tokens),
    ("vopd_engine_running_tokens", "Tokens that run in the engine.", lambda s: s.running_tokens),
    (
        "vopd_engine_max_batch_tokens",
        "Tokens of one forward, padding included, at most; 0: unknown.",
        lambda s: s.max_batch_tokens,
    ),
)

_ENGINE_COUNTERS: tuple[_Teacher, ...] = (
    ("vopd_engine_batches", "Forwards.", lambda s: s.engine_counters.batches),
    ("vopd_engine_batch_tokens", "Tokens read, padding included.", lambda s: s.engine_counters.batch_tokens),
    ("vopd_engine_padding_tokens", "Padding in the tokens read.", lambda s: s.engine_counters.padding_tokens),
    (
        "vopd_engine_reused_context_tokens",
        "Context tokens read once for several sequences, or found in the prefix cache.",
        lambda s: s.engine_counters.context_tokens_reused,
    ),
)

_TENANT_GAUGES: tuple[_Tenant, ...] = (
    ("vopd_tenant_weight", "Of its share of a busy engine.", lambda t: t.weight),
    ("vopd_tenant_revoked", "1 when its key has been taken back.", lambda t: t.is_revoked),
    ("vopd_tenant_share_ratio", "Of the cost that entered the engine over the last minute.", lambda t: t.share),
    (
        "vopd_tenant_fair_share_ratio",
        "Its weight over that of all tenants with something queued or running; 0 when it has not.",
        lambda t: t.fair_share,
    ),
    ("vopd_tenant_held_sequences", "Sequences of streams held back at its bound.", lambda t: t.held_sequences),
    ("vopd_tenant_queued_sequences", "Sequences that wait for the engine.", lambda t: t.queued_sequences),
    ("vopd_tenant_queued_tokens", "Tokens that wait for the engine.", lambda t: t.queued_tokens),
    ("vopd_tenant_running_sequences", "Sequences in the engine.", lambda t: t.running_sequences),
    ("vopd_tenant_running_tokens", "Tokens in the engine.", lambda t: t.running_tokens),
    ("vopd_tenant_reserved_tokens", "Tokens admitted and not yet answered.", lambda t: t.reserved_tokens),
    ("vopd_tenant_reserved_limit_tokens", "The bound of its reserved tokens.", lambda t: t.queue_tokens),
    ("vopd_tenant_reserved_bytes", "Memory for what is admitted and not yet answered.", lambda t: t.reserved_bytes),
    ("vopd_tenant_reserved_limit_bytes", "The bound of its reserved bytes.", lambda t: t.queue_bytes),
    ("vopd_tenant_oldest_wait_seconds", "Of the first of its queue; 0: none.", lambda t: t.oldest_wait_s),
)


class StatusCollector(Collector):
    """A `ServiceStatus` as metrics. read: called in the thread that asks for them."""

    def __init__(self, read: Callable[[], ServiceStatus]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        status = self._read()
        yield from _about_the_teacher(status)
        yield from _about_tenants(status.tenants)


def _about_the_teacher(status: ServiceStatus) -> Iterator[Metric]:
    what = "What is served, by what."
    facts = {
        "model": status.model_id,
        "revision": status.model_revision,
        "engine": status.engine,
        "engine_version": status.engine_version,
        "dtype": status.dtype,
        "version": status.server_version,
    }
    yield InfoMetricFamily("vopd_build", what, facts)
    states = GaugeMetricFamily("vopd_state", "1 for the state that it is in.", labels=["state"])
    for state in STATES:
        states.add_metric([state], state == status.state)
    yield states
    for name, what, read in _TEACHER_GAUGES:
        yield GaugeMetricFamily(name, what, read(status))
    for name, what, read in _ENGINE_COUNTERS:
        yield CounterMetricFamily(name, what, read(status))


def _about_tenants(tenants: tuple[TenantStatus, ...]) -> Iterator[Metric]:
    for name, what, read in _TENANT_GAUGES:
        family = GaugeMetricFamily(name, what, labels=["tenant"])
        for tenant in tenants:
            family.add_metric([tenant.id], read(tenant))
        yield family
    waits = GaugeMetricFamily(
        "vopd_tenant_waits_for", "1 for what the first of its queue waits for.", labels=["tenant", "reason"]
    )
    for tenant in tenants:
        for reason in WAITS_FOR:
            waits.add_metric([tenant.id, reason], reason == tenant.waits_for)
    yield waits
