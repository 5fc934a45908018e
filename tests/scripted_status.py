"""A made-up teacher at work: what its status says at any second, for tests of what shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vopd_server.metrics import Metrics
from vopd_server.status import EngineCounters, ServiceStatus, TenantStatus

WINDOW_TOKENS = 196_608
QUEUE_TOKENS, QUEUE_BYTES = 524_288, 2_000_000_000


@dataclass(frozen=True)
class Job:
    """A tenant whose load goes up and down. tokens_per_s: on average; swing: of it, in [0, 1]."""

    id: str
    tokens_per_s: float
    weight: float = 1.0
    swing: float = 0.2
    period_s: float = 90.0
    held: int = 0
    queued: int = 0
    running: int = 0
    waits_for: str = "engine"
    oldest_wait_s: float = 0.0
    reserved_part: float = 0.1
    rejections: Mapping[str, int] = field(default_factory=dict)


BUSY_JOBS = (
    Job(
        "math-7b-ablation",
        9_400,
        weight=2,
        swing=0.12,
        held=14,
        queued=96,
        running=31,
        oldest_wait_s=6.4,
        reserved_part=0.97,
        rejections={"RESOURCE_EXHAUSTED": 128, "DEADLINE_EXCEEDED": 3},
    ),
    Job(
        "code-rl",
        5_150,
        swing=0.35,
        period_s=70,
        queued=41,
        running=18,
        oldest_wait_s=9.8,
        reserved_part=0.62,
        rejections={"RESOURCE_EXHAUSTED": 7},
    ),
    Job("anna-thesis", 3_020, swing=0.8, period_s=150, queued=3, running=11, oldest_wait_s=0.42, reserved_part=0.21),
    Job(
        "nightly-eval",
        1_180,
        weight=0.5,
        swing=0.25,
        queued=12,
        running=4,
        waits_for="tokens_per_minute",
        oldest_wait_s=48.0,
        reserved_part=0.34,
        rejections={"INVALID_ARGUMENT": 2},
    ),
    Job("sandbox", 0, swing=0, reserved_part=0),
)


def tenant(job: Job, t_s: float, *, tenants: Sequence[Job] = BUSY_JOBS) -> TenantStatus:
    """`job` after `t_s` seconds; its shares are against `tenants`."""
    phase = sum(ord(letter) for letter in job.id)
    now = job.tokens_per_s * _level(job, t_s, phase)
    busy = [other for other in tenants if other.queued or other.running]
    reserved = round(QUEUE_TOKENS * job.reserved_part * (1 + 0.02 * math.sin(t_s / 3 + phase)))
    tokens_scored = round(job.tokens_per_s * (3 * 3600 + t_s))
    running_tokens = round(WINDOW_TOKENS * 0.94 * job.running / max(sum(other.running for other in tenants), 1))
    return TenantStatus(
        id=job.id,
        weight=job.weight,
        is_revoked=False,
        share=now / max(sum(o.tokens_per_s * _level(o, t_s, sum(map(ord, o.id))) for o in tenants), 1),
        fair_share=job.weight / sum(other.weight for other in busy) if job in busy else 0.0,
        held_sequences=job.held,
        queued_sequences=job.queued,
        queued_tokens=job.queued * 1_900,
        running_sequences=job.running,
        running_tokens=running_tokens,
        reserved_tokens=min(reserved, QUEUE_TOKENS),
        reserved_bytes=reserved * 640,
        queue_tokens=QUEUE_TOKENS,
        queue_bytes=QUEUE_BYTES,
        waits_for=job.waits_for if job.queued else "",
        oldest_wait_s=job.oldest_wait_s * (1 + 0.3 * math.sin(t_s / 4 + phase)),
        tokens_per_s=now,
        sequences_per_s=now / 1_900,
        sequences_scored=tokens_scored // 1_900,
        tokens_scored=tokens_scored,
        rejections=job.rejections,
    )


def _level(job: Job, t_s: float, phase: float) -> float:
    """Around 1: what a rate over half a minute looks like, and the same at the same second."""
    waves = ((1.0, 1.0), (0.61, 0.5), (0.43, 0.3), (0.29, 0.15))  # period and height, as parts of the job's
    swell = sum(height * math.sin(2 * math.pi * t_s / (job.period_s * part) + phase / part) for part, height in waves)
    return max(1 + job.swing * swell, 0)


def busy_status(t_s: float = 0.0, *, jobs: Sequence[Job] = BUSY_JOBS) -> ServiceStatus:
    """`jobs` at work on an 8B model, `t_s` seconds after the first look."""
    tenants = tuple(tenant(job, t_s, tenants=jobs) for job in jobs)
    batches = round(400 * (3 * 3600 + t_s) / 60)
    batch_tokens = batches * 11_700
    return ServiceStatus(
        state="ready",
        uptime_s=3 * 86_400 + 4 * 3600 + t_s,
        model_id="Qwen/Qwen3-8B",
        model_revision="b968826d9c46",
        engine="transformers",
        engine_version="5.19.0",
        dtype="bfloat16",
        server_version="0.1.0",
        calls_in_flight=sum(1 for job in jobs if job.running) + 2,
        window_tokens=WINDOW_TOKENS,
        running_tokens=sum(one.running_tokens for one in tenants),
        max_batch_tokens=16_384,
        engine_counters=EngineCounters(
            batches=batches,
            batch_tokens=batch_tokens,
            padding_tokens=round(batch_tokens * 0.041),
            context_tokens_reused=round(batch_tokens * 1.18),
        ),
        golden_probe="alone and in company the same to 0.00021 nats at most; as on 2026-11-21",
        tenants=tenants,
    )


class ScriptedTeacher:
    """What the admin listener shows: `status_now` is handed out until the test puts another one there."""

    def __init__(self, status: ServiceStatus) -> None:
        self.metrics = Metrics()
        self.status_now = status
        self.num_asked = 0

    @property
    def state(self) -> str:
        return self.status_now.state

    def status(self) -> ServiceStatus:
        self.num_asked += 1
        return self.status_now


def idle_status() -> ServiceStatus:
    """A teacher that nobody has called."""
    return replace(
        busy_status(jobs=()), running_tokens=0, calls_in_flight=0, uptime_s=42.0, engine_counters=EngineCounters()
    )
