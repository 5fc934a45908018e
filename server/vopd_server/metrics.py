"""What Prometheus is told. The service and `calls.answering` record, each thing once, whatever the transport."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

# From a prefix that is cached whole to minutes of queueing behind other jobs.
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One teacher's numbers, in a registry of its own: tests start many teachers in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "vopd_calls", "Calls that have ended.", ["transport", "method", "code"], registry=self.registry
        )
        self._call_seconds = Histogram(
            "vopd_call_seconds",
            "Seconds from the start of a call to its end; a stream is one call.",
            ["transport", "method"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._sequences = Counter("vopd_sequences_scored", "Sequences scored.", registry=self.registry)
        self._tokens = Counter("vopd_tokens", "Tokens of the sequences scored.", ["part"], registry=self.registry)
        self._stage_seconds = Histogram(
            "vopd_stage_seconds",
            "Seconds of a scored sequence in the engine's queue, and in the engine.",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )

    def call_ended(self, transport: str, method: str, code: str, seconds: float) -> None:
        self._calls.labels(transport, method, code).inc()
        self._call_seconds.labels(transport, method).observe(seconds)

    def sequence_scored(
        self, *, context_tokens: int, completion_tokens: int, queue_time_s: float, engine_time_s: float
    ) -> None:
        self._sequences.inc()
        self._tokens.labels("context").inc(context_tokens)
        self._tokens.labels("completion").inc(completion_tokens)
        self._stage_seconds.labels("queue").observe(queue_time_s)
        self._stage_seconds.labels("engine").observe(engine_time_s)

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A number that is looked at when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def exposition(self) -> tuple[bytes, str]:
        """Everything in Prometheus's text format, and its content type.

        The process's global registry comes with it: Python's own numbers, and vLLM's (`vllm:*`) where it runs.
        """
        return generate_latest(self.registry) + generate_latest(REGISTRY), CONTENT_TYPE_LATEST
