"""Everything that Prometheus is told, from a made-up status and from what the service records."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from scripted_status import busy_status
from vopd_server.metrics import Metrics, StatusCollector
from vopd_server.status import EngineCounters, ServiceStatus

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def told(metrics: Metrics, status: ServiceStatus | None = None) -> Samples:
    body, content_type = metrics.exposition(status or busy_status())
    assert content_type.startswith("text/plain")
    return samples_of(body.decode())


def number(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_call_counts_once_with_whose_it_is_and_how_it_ended() -> None:
    metrics = Metrics()
    metrics.call_ended("grpc", "Score", "OK", 0.25, "alice")
    metrics.call_ended("grpc", "Score", "OK", 0.75, "alice")
    metrics.call_ended("http", "Score", "UNAUTHENTICATED", 0.001, "")
    samples = told(metrics)
    alice = {"transport": "grpc", "method": "Score", "tenant": "alice"}
    assert number(samples, "vopd_calls_total", **alice, code="OK") == 2
    assert number(samples, "vopd_call_seconds_sum", **alice) == 1
    assert number(samples, "vopd_call_seconds_bucket", **alice, le="0.5") == 1
    nobody = {"transport": "http", "method": "Score", "tenant": ""}
    assert number(samples, "vopd_calls_total", **nobody, code="UNAUTHENTICATED") == 1


def test_what_was_scored_is_counted_by_tenant() -> None:
    metrics = Metrics()
    metrics.sequence_scored("alice", context_tokens=100, completion_tokens=30)
    metrics.sequence_scored("alice", context_tokens=100, completion_tokens=10)
    metrics.sequence_scored("bob", context_tokens=1, completion_tokens=1)
    samples = told(metrics)
    assert number(samples, "vopd_sequences_scored_total", tenant="alice") == 2
    assert number(samples, "vopd_tokens_total", tenant="alice", part="context") == 200
    assert number(samples, "vopd_tokens_total", tenant="alice", part="completion") == 40
    assert number(samples, "vopd_sequences_scored_total", tenant="bob") == 1


def test_stages_rejections_and_bytes_are_counted_by_tenant() -> None:
    metrics = Metrics()
    metrics.stage("alice", "validate", 0.002)
    metrics.stage("alice", "queue", 2.0)
    metrics.stage("alice", "queue", 700.0)
    metrics.stage("alice", "engine", 0.5)
    metrics.stage("alice", "encode", 0.01)
    metrics.rejected("alice", "RESOURCE_EXHAUSTED")
    metrics.rejected("", "UNAUTHENTICATED")
    metrics.bytes_moved("alice", "grpc", "received", 1000)
    metrics.bytes_moved("alice", "grpc", "sent", 64)
    metrics.bytes_moved("alice", "grpc", "sent", 36)
    samples = told(metrics)
    for stage, seconds in (("validate", 0.002), ("queue", 702.0), ("engine", 0.5), ("encode", 0.01)):
        assert number(samples, "vopd_stage_seconds_sum", tenant="alice", stage=stage) == seconds
    assert number(samples, "vopd_stage_seconds_bucket", tenant="alice", stage="queue", le="600.0") == 1
    assert number(samples, "vopd_rejections_total", tenant="alice", code="RESOURCE_EXHAUSTED") == 1
    assert number(samples, "vopd_rejections_total", tenant="", code="UNAUTHENTICATED") == 1
    assert number(samples, "vopd_transport_bytes_total", tenant="alice", transport="grpc", direction="received") == 1000
    assert number(samples, "vopd_transport_bytes_total", tenant="alice", transport="grpc", direction="sent") == 100


def test_the_teacher_as_a_whole() -> None:
    counters = EngineCounters(batches=7, batch_tokens=70_000, padding_tokens=700, context_tokens_reused=12_345)
    status = replace(busy_status(), engine_counters=counters, uptime_s=12.5, running_tokens=99, calls_in_flight=3)
    samples = told(Metrics(), status)
    assert {name: number(samples, name) for name, labels in samples if name.startswith("vopd_") and not labels} == {
        "vopd_ready": 1,
        "vopd_uptime_seconds": 12.5,
        "vopd_calls_in_flight": 3,
        "vopd_reserved_tokens": sum(tenant.reserved_tokens for tenant in status.tenants),
        "vopd_waiting_sequences": 14,
        "vopd_keys_file_ok": 1,
        "vopd_engine_window_tokens": 196_608,
        "vopd_engine_running_tokens": 99,
        "vopd_engine_max_batch_tokens": 16_384,
        "vopd_engine_batches_total": 7,
        "vopd_engine_batch_tokens_total": 70_000,
        "vopd_engine_padding_tokens_total": 700,
        "vopd_engine_reused_context_tokens_total": 12_345,
    }
    build = {
        "model": "Qwen/Qwen3-8B",
        "revision": "b968826d9c46",
        "engine": "transformers",
        "engine_version": "5.19.0",
        "dtype": "bfloat16",
        "version": "0.1.0",
    }
    assert number(samples, "vopd_build_info", **build) == 1


@pytest.mark.parametrize("state", ["starting", "ready", "draining", "dead"])
def test_the_state_is_one_of_four_and_ready_is_one_of_them(state: str) -> None:
    samples = told(Metrics(), replace(busy_status(), state=state))
    states = {dict(labels)["state"]: value for (name, labels), value in samples.items() if name == "vopd_state"}
    assert states == {**dict.fromkeys(("starting", "ready", "draining", "dead"), 0.0), state: 1.0}
    assert number(samples, "vopd_ready") == (state == "ready")


def test_a_broken_keys_file_shows() -> None:
    assert number(told(Metrics(), replace(busy_status(), keys_problem="no JSON")), "vopd_keys_file_ok") == 0


def test_a_tenant_is_told_with_all_its_numbers() -> None:
    status = busy_status()
    math, *_ = status.tenants
    samples = told(Metrics(), replace(status, tenants=(replace(math, is_revoked=True), *status.tenants[1:])))
    mine = {name: value for (name, labels), value in samples.items() if labels == {("tenant", "math-7b-ablation")}}
    assert mine == {
        "vopd_tenant_weight": 2,
        "vopd_tenant_revoked": 1,
        "vopd_tenant_share_ratio": math.share,
        "vopd_tenant_fair_share_ratio": 2 / 4.5,
        "vopd_tenant_held_sequences": 14,
        "vopd_tenant_queued_sequences": 96,
        "vopd_tenant_queued_tokens": math.queued_tokens,
        "vopd_tenant_running_sequences": 31,
        "vopd_tenant_running_tokens": math.running_tokens,
        "vopd_tenant_reserved_tokens": math.reserved_tokens,
        "vopd_tenant_reserved_limit_tokens": math.queue_tokens,
        "vopd_tenant_reserved_bytes": math.reserved_bytes,
        "vopd_tenant_reserved_limit_bytes": math.queue_bytes,
        "vopd_tenant_oldest_wait_seconds": math.oldest_wait_s,
    }
    waits = {
        dict(labels)["reason"]: value
        for (name, labels), value in samples.items()
        if name == "vopd_tenant_waits_for" and ("tenant", "nightly-eval") in labels
    }
    assert waits == {"engine": 0, "tokens_in_flight": 0, "tokens_per_minute": 1}


def test_the_status_is_read_when_it_is_asked_for() -> None:
    status = busy_status()
    collector = StatusCollector(lambda: status)
    registry = CollectorRegistry()
    registry.register(collector)
    assert registry.get_sample_value("vopd_uptime_seconds") == status.uptime_s
    status = replace(status, uptime_s=1.0)
    assert registry.get_sample_value("vopd_uptime_seconds") == 1.0


def test_strangers_do_not_make_new_series() -> None:
    metrics = Metrics()

    def stranger_calls() -> int:
        metrics.call_ended("http", "Score", "UNAUTHENTICATED", 0.001, "")
        metrics.rejected("", "UNAUTHENTICATED")
        metrics.bytes_moved("", "http", "sent", 200)
        return len(told(metrics))

    first = stranger_calls()
    assert {stranger_calls() for _ in range(20)} == {first}


def test_names_say_their_units_and_every_metric_has_help() -> None:
    metrics = Metrics()
    metrics.sequence_scored("alice", context_tokens=1, completion_tokens=1)
    body, _ = metrics.exposition(busy_status())
    families = [family for family in text_string_to_metric_families(body.decode()) if family.name.startswith("vopd_")]
    assert len(families) > 30
    for family in families:
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|s|millis|kb|mb|percent)(_|$)", family.name), family.name
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total", f"{family.name}_created"}


def test_the_processs_own_numbers_come_with_them() -> None:
    assert number(told(Metrics()), "process_resident_memory_bytes") > 0
