"""What a tenant that waits is told."""

from __future__ import annotations

from vopd_proto import teacher_pb2 as pb
from vopd_server.scheduler import Demand, FairScheduler, Work
from vopd_server.tenancy import Tenant, TenantLimits
from vopd_server.waiting import why_waiting

Reason = pb.StreamWaiting.Reason


def scheduler_of(limits: TenantLimits, *, window_tokens: int = 100) -> FairScheduler:
    scheduler = FairScheduler(window_tokens=window_tokens, queue_tokens=1000, queue_bytes=10**6)
    scheduler.set_tenants([Tenant("a", limits), Tenant("b")], 0.0)
    return scheduler


def queue(scheduler: FairScheduler, tenant_id: str, *tokens: int) -> None:
    for each in tokens:
        admitted = scheduler.admit_now(tenant_id, [Demand(each, 0)], 0.0)
        assert admitted is not None
        scheduler.queue(admitted[0], Work(repr(object()).encode(), 0, each), 0.0)
    scheduler.start_next(0.0)


def test_one_at_its_rate_is_told_the_rate() -> None:
    scheduler = scheduler_of(TenantLimits(tokens_per_minute=60))
    queue(scheduler, "a", 70, 5)
    assert why_waiting(scheduler, "a", 0.0) == pb.StreamWaiting(
        reason=Reason.TOKENS_PER_MINUTE, message="tenant a may have 60 tokens a minute scored, and has had them"
    )


def test_one_with_all_it_may_have_in_the_engine_is_told_the_limit() -> None:
    scheduler = scheduler_of(TenantLimits(tokens_in_flight=50))
    queue(scheduler, "a", 40, 20)
    assert why_waiting(scheduler, "a", 0.0) == pb.StreamWaiting(
        reason=Reason.TOKENS_IN_FLIGHT, message="tenant a has 40 of 50 tokens in the engine"
    )


def test_one_at_its_queue_bound_is_told_the_bound() -> None:
    scheduler = scheduler_of(TenantLimits(queue_tokens=50))
    queue(scheduler, "a", 40)
    scheduler.admit_or_hold("a", Demand(20, 0), 0.0)
    assert why_waiting(scheduler, "a", 0.0) == pb.StreamWaiting(
        reason=Reason.QUEUE_BOUND, message="tenant a has 40 of 50 tokens unanswered"
    )


def test_one_whose_turn_it_is_not_is_told_how_many_are_before_it() -> None:
    scheduler = scheduler_of(TenantLimits())
    queue(scheduler, "b", 90)
    queue(scheduler, "a", 30, 30)
    assert why_waiting(scheduler, "a", 0.0) == pb.StreamWaiting(
        reason=Reason.TURN, message="sequences of tenant a in the queue: 2, beside 1 other tenant"
    )


def test_one_whose_work_runs_is_told_so() -> None:
    scheduler = scheduler_of(TenantLimits())
    queue(scheduler, "a", 30)
    assert why_waiting(scheduler, "a", 0.0) == pb.StreamWaiting(
        reason=Reason.ENGINE, message="sequences of tenant a in the engine: 1"
    )
