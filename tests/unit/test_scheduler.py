"""The fair scheduler as a state machine: bounds, turns, shares, and budgets that come back."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vopd_server.scheduler import Demand, FairScheduler, Ticket, Work
from vopd_server.tenancy import Tenant, TenantLimits

WINDOW = 100


def scheduler_of(*tenants: Tenant, window_tokens: int = WINDOW, queue_tokens: int = 10**6) -> FairScheduler:
    scheduler = FairScheduler(window_tokens=window_tokens, queue_tokens=queue_tokens, queue_bytes=10**9)
    scheduler.set_tenants(tenants, 0.0)
    return scheduler


def ask(
    scheduler: FairScheduler,
    tenant_id: str,
    tokens: int,
    *,
    context: bytes = b"",
    context_tokens: int = 0,
    now_s: float = 0.0,
) -> Ticket:
    """Admits a sequence and queues it. Without a context, one of its own, of no tokens."""
    admitted = scheduler.admit_now(tenant_id, [Demand(tokens, tokens)], now_s)
    assert admitted is not None
    [ticket] = admitted
    key = context or repr(id(ticket)).encode()
    scheduler.queue(ticket, Work(key, context_tokens, tokens - context_tokens), now_s)
    return ticket


def finish(scheduler: FairScheduler, *tickets: Ticket, now_s: float = 0.0) -> None:
    for ticket in tickets:
        scheduler.answered(ticket, now_s)
        scheduler.leave(ticket, now_s)


# ---------------------------------------------------------------- the queue bound


def test_a_call_over_its_tenants_bound_is_refused_and_another_tenants_is_not() -> None:
    scheduler = scheduler_of(Tenant("a"), Tenant("b"), queue_tokens=10)
    assert scheduler.admit_now("a", [Demand(6, 1), Demand(4, 1)], 0.0) is not None
    assert scheduler.admit_now("a", [Demand(1, 1)], 0.0) is None
    assert scheduler.admit_now("b", [Demand(10, 1)], 0.0) is not None


def test_a_call_is_admitted_as_a_whole_or_not_at_all() -> None:
    scheduler = scheduler_of(Tenant("a"), queue_tokens=10)
    scheduler.admit_now("a", [Demand(5, 1)], 0.0)
    assert scheduler.admit_now("a", [Demand(3, 1), Demand(3, 1)], 0.0) is None
    assert scheduler.queues["a"].reserved_tokens == 5


def test_a_sequence_of_a_stream_is_held_until_its_own_tenant_has_room_and_calls_do_not_pass_it() -> None:
    scheduler = scheduler_of(Tenant("a"), queue_tokens=10)
    admitted = scheduler.admit_now("a", [Demand(8, 1)], 0.0)
    held = scheduler.admit_or_hold("a", Demand(5, 1), 0.0)
    behind = scheduler.admit_or_hold("a", Demand(1, 1), 0.0)
    assert (held.stage, behind.stage) == ("held", "held")
    assert scheduler.admit_now("a", [Demand(1, 1)], 0.0) is None
    assert admitted is not None
    assert scheduler.leave(admitted[0], 0.0) == [held, behind]


def test_bytes_bound_a_tenant_as_tokens_do_and_all_tenants_share_them_equally() -> None:
    scheduler = FairScheduler(window_tokens=WINDOW, queue_tokens=10**6, queue_bytes=100)
    scheduler.set_tenants([Tenant("a"), Tenant("b")], 0.0)
    assert scheduler.admit_now("a", [Demand(1, 50)], 0.0) is not None
    assert scheduler.admit_now("a", [Demand(1, 1)], 0.0) is None
    with pytest.raises(ValueError, match="1 tokens and 51 bytes > the bounds of 1000000 and 50"):
        scheduler.admit_now("b", [Demand(1, 51)], 0.0)


def test_wider_bounds_let_in_what_was_held() -> None:
    scheduler = scheduler_of(Tenant("a", TenantLimits(queue_tokens=5)))
    scheduler.admit_now("a", [Demand(5, 1)], 0.0)
    held = scheduler.admit_or_hold("a", Demand(5, 1), 0.0)
    assert scheduler.set_tenants([Tenant("a", TenantLimits(queue_tokens=10))], 0.0) == [held]


def test_a_tenant_that_is_gone_is_served_what_was_admitted_and_then_forgotten() -> None:
    scheduler = scheduler_of(Tenant("a"), Tenant("b"))
    ticket = ask(scheduler, "a", 5)
    scheduler.set_tenants([Tenant("b")], 0.0)
    assert scheduler.queues["a"].is_revoked
    assert scheduler.start_next(0.0) == [ticket]
    finish(scheduler, ticket)
    assert list(scheduler.queues) == ["b"]


def test_leaving_twice_is_an_error() -> None:
    scheduler = scheduler_of(Tenant("a"))
    ticket = ask(scheduler, "a", 3)
    scheduler.leave(ticket, 0.0)
    with pytest.raises(ValueError, match="3 tokens left twice"):
        scheduler.leave(ticket, 0.0)


# ---------------------------------------------------------------- the window


def test_the_window_bounds_what_runs_and_nobody_overtakes_whose_turn_it_is() -> None:
    scheduler = scheduler_of(Tenant("a"))
    first, large, small = ask(scheduler, "a", 60), ask(scheduler, "a", 80), ask(scheduler, "a", 1)
    assert scheduler.start_next(0.0) == [first]
    finish(scheduler, first)
    assert scheduler.start_next(0.0) == [large, small]


def test_a_sequence_larger_than_the_window_runs_alone() -> None:
    scheduler = scheduler_of(Tenant("a"))
    small, huge = ask(scheduler, "a", 1), ask(scheduler, "a", 10 * WINDOW)
    assert scheduler.start_next(0.0) == [small]
    finish(scheduler, small)
    assert scheduler.start_next(0.0) == [huge]
    assert scheduler.start_next(0.0) == []


def test_rollouts_of_one_context_enter_together_and_the_context_counts_once() -> None:
    scheduler = scheduler_of(Tenant("a"), Tenant("b"))
    group = [ask(scheduler, "a", 60, context=b"c", context_tokens=50) for _ in range(12)]
    other = ask(scheduler, "b", 20)
    started = scheduler.start_next(0.0)
    # 50 of the context and 10 a rollout: the context aside, ten fill the window, and the other tenant comes after.
    assert started == group[:10]
    assert scheduler.window_used == 150
    finish(scheduler, *started)
    assert scheduler.window_used == 0
    assert scheduler.start_next(0.0) == [other, *group[10:]]


def test_a_context_of_another_tenant_is_another_context() -> None:
    scheduler = scheduler_of(Tenant("a"), Tenant("b"))
    ask(scheduler, "a", 60, context=b"c", context_tokens=50)
    ask(scheduler, "b", 60, context=b"c", context_tokens=50)
    assert len(scheduler.start_next(0.0)) == 1


def test_a_limit_of_tokens_in_flight_holds_its_tenant_only() -> None:
    scheduler = scheduler_of(Tenant("a", TenantLimits(tokens_in_flight=15)), Tenant("b"))
    a = [ask(scheduler, "a", 10) for _ in range(3)]
    b = [ask(scheduler, "b", 10) for _ in range(3)]
    assert set(scheduler.start_next(0.0)) == {a[0], *b}
    assert scheduler.waits_for(scheduler.queues["a"], 0.0) == "tokens_in_flight"
    finish(scheduler, a[0])
    assert scheduler.start_next(0.0) == [a[1]]


def test_a_rate_lets_a_minutes_tokens_in_at_once_and_then_as_time_passes() -> None:
    scheduler = scheduler_of(Tenant("a", TenantLimits(tokens_per_minute=60)), window_tokens=10**6)
    tickets = [ask(scheduler, "a", 25) for _ in range(5)]
    assert scheduler.start_next(0.0) == tickets[:3], "the third takes more than is left, which is owed then"
    assert scheduler.waits_for(scheduler.queues["a"], 0.0) == "tokens_per_minute"
    next_s = scheduler.next_start_s(0.0)
    assert next_s == pytest.approx(15.0)
    assert scheduler.start_next(14.9) == []
    assert scheduler.start_next(15.1) == [tickets[3]]
    assert scheduler.start_next(16.0) == []
    assert scheduler.start_next(1000.0) == [tickets[4]]
    assert scheduler.next_start_s(1000.0) is None


# ---------------------------------------------------------------- shares


LARGEST = 90


def shares_when_all_are_busy(
    weights: dict[str, float], costs: dict[str, tuple[int, int]], *, seed: int
) -> Counter[str]:
    """Cost that entered while all had something queued, until the least had 40 large ones' worth of it."""
    rng = random.Random(seed)
    scheduler = scheduler_of(*(Tenant(name, TenantLimits(weight=weight)) for name, weight in weights.items()))
    running: list[Ticket] = []
    had: Counter[str] = Counter()
    while had.total() * min(weights.values()) < 40 * LARGEST * sum(weights.values()):
        for name in weights:
            while len(scheduler.queues[name].queued) <= WINDOW:  # never dry before the window is full
                ask(scheduler, name, rng.randint(*costs[name]))
        for ticket in scheduler.start_next(0.0):
            had[ticket.tenant_id] += round(ticket.cost)
            running.append(ticket)
        finish(scheduler, running.pop(rng.randrange(len(running))))
    return had


@settings(max_examples=15, deadline=None)
@given(
    weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2),
    seed=st.integers(0, 10**6),
)
def test_shares_of_a_busy_engine_are_within_a_tenth_of_the_weights(weights: dict[str, float], seed: int) -> None:
    rng = random.Random(seed)
    costs = {name: rng.choice([(1, 5), (10, 40), (1, LARGEST), (60, LARGEST)]) for name in weights}
    had = shares_when_all_are_busy(weights, costs, seed=seed)
    for name, weight in weights.items():
        assert had[name] / had.total() == pytest.approx(weight / sum(weights.values()), rel=0.1)


def test_a_tenant_that_was_alone_for_long_is_not_made_to_wait_for_it_and_one_that_slept_saved_nothing_up() -> None:
    scheduler = scheduler_of(Tenant("a"), Tenant("b"))
    for _ in range(1000):
        finish(scheduler, ask_and_start(scheduler, "a", 50))
    had: Counter[str] = Counter()
    for _ in range(100):
        for name in ("a", "b"):
            if not scheduler.queues[name].queued:
                ask(scheduler, name, 50)
        started = scheduler.start_next(0.0)
        had.update(ticket.tenant_id for ticket in started)
        finish(scheduler, *started)
    assert had["a"] == pytest.approx(had["b"], abs=2)


def ask_and_start(scheduler: FairScheduler, tenant_id: str, tokens: int) -> Ticket:
    ticket = ask(scheduler, tenant_id, tokens)
    assert scheduler.start_next(0.0) == [ticket]
    return ticket


def test_whoever_comes_into_a_flood_is_next_when_there_is_room() -> None:
    scheduler = scheduler_of(Tenant("flood"), Tenant("small"))
    flood = [ask(scheduler, "flood", 50) for _ in range(64)]
    assert scheduler.start_next(0.0) == flood[:2]
    small = ask(scheduler, "small", 5)
    assert scheduler.start_next(0.0) == []
    finish(scheduler, flood[0])
    assert scheduler.start_next(0.0)[0] is small


# ---------------------------------------------------------------- whatever happens


class AnyMix(RuleBasedStateMachine):
    """Calls, streams, cancellations, failures, revoked and new keys in any order: the invariants hold throughout."""

    @initialize()
    def start(self) -> None:
        self.now_s = 0.0
        self.names = ["a", "b", "c"]
        self.scheduler = FairScheduler(window_tokens=40, queue_tokens=60, queue_bytes=3 * 500)
        self.tickets: list[Ticket] = []
        self.set_tenants(["a", "b", "c"], 1)

    @rule(names=st.lists(st.sampled_from("abc"), unique=True, min_size=1), weight=st.integers(1, 3))
    def set_tenants(self, names: list[str], weight: int) -> None:
        limits = [TenantLimits(weight=weight), TenantLimits(tokens_in_flight=25), TenantLimits(tokens_per_minute=120)]
        self.names = names
        self.scheduler.set_tenants([Tenant(name, limits["abc".index(name)]) for name in names], self.now_s)

    @rule(seconds=st.floats(0.01, 20))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(which=st.integers(0, 2), tokens=st.lists(st.integers(0, 20), min_size=1, max_size=3))
    def call(self, which: int, tokens: list[int]) -> None:
        name = self.names[which % len(self.names)]
        demands = [Demand(each, each) for each in tokens]
        self.tickets += self.scheduler.admit_now(name, demands, self.now_s) or []

    @rule(which=st.integers(0, 2), tokens=st.integers(0, 60))
    def stream(self, which: int, tokens: int) -> None:
        name = self.names[which % len(self.names)]
        self.tickets.append(self.scheduler.admit_or_hold(name, Demand(tokens, tokens), self.now_s))

    @rule(context=st.sampled_from([b"", b"x", b"y"]))
    def queue_all(self, context: bytes) -> None:
        for ticket in self.in_stage("admitted"):
            tokens = ticket.demand.tokens
            context_tokens = min(tokens, 7) if context else 0
            key = context + bytes([context_tokens]) if context else repr(id(ticket)).encode()
            self.scheduler.queue(ticket, Work(key, context_tokens, tokens - context_tokens), self.now_s)

    @rule()
    def start_next(self) -> None:
        for ticket in self.scheduler.start_next(self.now_s):
            assert ticket.stage == "running"
        ready = [
            queue for queue in self.scheduler.queues.values() if self.scheduler.waits_for(queue, self.now_s) == "engine"
        ]
        assert not ready or self.in_stage("running"), "somebody could run and nobody does"

    @rule(which=st.integers(0, 99))
    def answer_one(self, which: int) -> None:
        if running := self.in_stage("running"):
            self.scheduler.answered(running[which % len(running)], self.now_s)

    @rule(which=st.integers(0, 99))
    def one_leaves(self, which: int) -> None:
        if self.tickets:
            self.scheduler.leave(self.tickets.pop(which % len(self.tickets)), self.now_s)

    def in_stage(self, *stages: str) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.stage in stages]

    @invariant()
    def sums_are_those_of_the_tickets(self) -> None:
        for name, queue in self.scheduler.queues.items():
            own = [ticket for ticket in self.tickets if ticket.tenant_id == name]
            inside = [ticket for ticket in own if ticket.stage not in ("held", "left")]
            running = [ticket for ticket in own if ticket.stage == "running"]
            assert queue.reserved_tokens == sum(ticket.demand.tokens for ticket in inside)
            assert queue.reserved_bytes == sum(ticket.demand.num_bytes for ticket in inside)
            assert queue.running_tokens == sum(ticket.demand.tokens for ticket in running)
            assert queue.num_running == len(running)
            assert queue.reserved_tokens <= queue.queue_tokens
            if queue.held:
                first = queue.held[0].demand
                assert not queue.fits(first.tokens, first.num_bytes), "the first could have come in"

    @invariant()
    def the_window_holds(self) -> None:
        running = self.in_stage("running")
        contexts = {(t.tenant_id, t.work.context_key): t.work.context_tokens for t in running if t.work is not None}
        own = sum(ticket.work.own_tokens for ticket in running if ticket.work is not None)
        assert self.scheduler.window_used == own + sum(contexts.values())
        largest = max((ticket.demand.tokens for ticket in running), default=0)
        assert self.scheduler.window_used <= self.scheduler.window_tokens + largest

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for ticket in self.tickets:
            self.scheduler.leave(ticket, self.now_s)
        assert self.scheduler.window_used == 0
        for queue in self.scheduler.queues.values():
            sums = (queue.reserved_tokens, queue.reserved_bytes, queue.running_tokens, queue.num_running)
            assert sums == (0, 0, 0, 0)
            assert (len(queue.held), len(queue.queued), len(queue.running_contexts)) == (0, 0, 0)


TestAnyMix = AnyMix.TestCase
TestAnyMix.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_nobody_starves_whatever_the_others_ask(data: st.DataObject) -> None:
    """A queued sequence enters before the others have had more than the window, a sequence each, and its own share."""
    weights = {name: data.draw(st.sampled_from([0.2, 1, 4]), label=name) for name in "abc"}
    scheduler = scheduler_of(*(Tenant(name, TenantLimits(weight=weight)) for name, weight in weights.items()))
    rng = random.Random(data.draw(st.integers(0, 10**6), label="seed"))
    running: list[Ticket] = []

    def step() -> list[Ticket]:
        for name in "bc":
            while len(scheduler.queues[name].queued) < 5:
                ask(scheduler, name, rng.randint(1, 90))
        started = scheduler.start_next(0.0)
        running.extend(started)
        finish(scheduler, running.pop(rng.randrange(len(running))))
        return started

    for _ in range(20):
        step()
    waiting = ask(scheduler, "a", 90)
    others_had = 0.0
    for _ in range(1000):
        started = step()
        others_had += sum(ticket.cost for ticket in started if ticket is not waiting)
        if waiting in started:
            break
    else:
        pytest.fail(f"still waiting after the others had {others_had} tokens")
    assert others_had <= WINDOW + 3 * 90 * (1 + math.ceil(max(weights.values()) / weights["a"]))
