"""What an operator sees of a running teacher: plain values, taken at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vopd_server.scheduler import FairScheduler, TenantQueue
from vopd_server.usage import UsageBook


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """One tenant. Tokens are context + completion tokens.

    share: of the cost that entered the engine over the last minute, in [0, 1]; 0 when nothing did.
    fair_share: its weight over the weights of the tenants that have something queued or running; 0 when it has not.
    held_sequences: of streams, waiting to be admitted since the tenant is at its queue bound.
    queued_sequences, queued_tokens: admitted, waiting for a place in the engine.
    running_sequences, running_tokens: in the engine.
    reserved_tokens, reserved_bytes: admitted and not yet answered: queued, running, and answers that are unread.
    queue_tokens, queue_bytes: the bounds of those two.
    waits_for: "" | "engine" | "tokens_in_flight" | "tokens_per_minute": what the first of its queue waits for.
    oldest_wait_s: of the first of its queue, in seconds; 0 when none is queued.
    tokens_per_s, sequences_per_s: answered, over the last half minute.
    sequences_scored, tokens_scored: since the start.
    rejections: since the start, by error code (RESOURCE_EXHAUSTED, INVALID_ARGUMENT, ...).
    """

    id: str
    weight: float
    is_revoked: bool
    share: float
    fair_share: float
    held_sequences: int
    queued_sequences: int
    queued_tokens: int
    running_sequences: int
    running_tokens: int
    reserved_tokens: int
    reserved_bytes: int
    queue_tokens: int
    queue_bytes: int
    waits_for: str
    oldest_wait_s: float
    tokens_per_s: float
    sequences_per_s: float
    sequences_scored: int
    tokens_scored: int
    rejections: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """What an engine has done since its start; every number only grows. What it cannot know stays 0.

    batches: forwards (vLLM: 0, its own metrics tell).
    batch_tokens: tokens that those read, padding included. padding_tokens: the padding in them.
    context_tokens_reused: read once for several sequences, or found in the prefix cache.
    """

    batches: int = 0
    batch_tokens: int = 0
    padding_tokens: int = 0
    context_tokens_reused: int = 0


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """The teacher as a whole.

    state: "starting" | "ready" | "draining" | "dead".
    window_tokens: what may run in the engine at a time. max_batch_tokens: of one forward; 0 where unknown.
    golden_probe: what the probe at the start found, in words; "" before it has run.
    keys_problem: why the keys file could not be loaded again; "" while all is well.
    """

    state: str
    uptime_s: float
    model_id: str
    model_revision: str
    engine: str
    engine_version: str
    dtype: str
    server_version: str
    calls_in_flight: int
    window_tokens: int
    running_tokens: int
    max_batch_tokens: int
    engine_counters: EngineCounters
    golden_probe: str
    tenants: tuple[TenantStatus, ...]
    keys_problem: str = ""


def tenants_status(scheduler: FairScheduler, usage: UsageBook, now_s: float) -> tuple[TenantStatus, ...]:
    """Every tenant there is, and those that are gone and still have something in flight."""
    queues = scheduler.queues
    cost_of = {tenant_id: usage.of(tenant_id).recent_cost(now_s) for tenant_id in queues}
    all_cost = sum(cost_of.values())
    busy_weight = sum(queue.limits.weight for queue in queues.values() if queue.is_busy)

    def status(tenant_id: str, queue: TenantQueue) -> TenantStatus:
        had = usage.of(tenant_id)
        return TenantStatus(
            id=tenant_id,
            weight=queue.limits.weight,
            is_revoked=queue.is_revoked,
            share=cost_of[tenant_id] / all_cost if all_cost else 0.0,
            fair_share=queue.limits.weight / busy_weight if queue.is_busy else 0.0,
            held_sequences=len(queue.held),
            queued_sequences=len(queue.queued),
            queued_tokens=queue.queued_tokens,
            running_sequences=queue.num_running,
            running_tokens=queue.running_tokens,
            reserved_tokens=queue.reserved_tokens,
            reserved_bytes=queue.reserved_bytes,
            queue_tokens=queue.queue_tokens,
            queue_bytes=queue.queue_bytes,
            waits_for=scheduler.waits_for(queue, now_s),
            oldest_wait_s=now_s - queue.queued[0].since_s if queue.queued else 0.0,
            tokens_per_s=had.tokens_per_s(now_s),
            sequences_per_s=had.sequences_per_s(now_s),
            sequences_scored=had.sequences_scored,
            tokens_scored=had.tokens_scored,
            rejections=dict(had.rejections),
        )

    return tuple(status(tenant_id, queue) for tenant_id, queue in queues.items())
