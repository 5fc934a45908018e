"""What a tenant's sequences wait for: a reason for programs, and a sentence for people. Pure."""

from __future__ import annotations

from vopd_proto import teacher_pb2 as pb
from vopd_server.scheduler import FairScheduler

REASONS = {
    "tokens_in_flight": pb.StreamWaiting.TOKENS_IN_FLIGHT,
    "tokens_per_minute": pb.StreamWaiting.TOKENS_PER_MINUTE,
}


def why_waiting(scheduler: FairScheduler, tenant_id: str, now_s: float) -> pb.StreamWaiting:
    """Of what a tenant waits for, that which it could do something about comes first."""
    queue = scheduler.queues[tenant_id]
    limits = queue.limits
    waits_for = scheduler.waits_for(queue, now_s)
    reason = REASONS.get(waits_for, pb.StreamWaiting.ENGINE)
    match waits_for:
        case "tokens_per_minute":
            message = f"tenant {tenant_id} may have {limits.tokens_per_minute} tokens a minute scored, and has had them"
        case "tokens_in_flight":
            message = f"tenant {tenant_id} has {queue.running_tokens} of {limits.tokens_in_flight} tokens in the engine"
        case _ if queue.held:
            reason = pb.StreamWaiting.QUEUE_BOUND
            message = f"tenant {tenant_id} has {queue.reserved_tokens} of {queue.queue_tokens} tokens unanswered"
        case "engine":
            others = sum(other.is_busy for other in scheduler.queues.values()) - 1
            beside = f", beside {others} other tenant{'s' * (others != 1)}" if others else ""
            reason = pb.StreamWaiting.TURN
            message = f"sequences of tenant {tenant_id} in the queue: {len(queue.queued)}{beside}"
        case _:
            message = f"sequences of tenant {tenant_id} in the engine: {queue.num_running}"
    return pb.StreamWaiting(reason=reason, message=message)
