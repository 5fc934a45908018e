"""Which replica is given which sequence: the balancer by itself, in every order that may happen."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from vopd_client.teacher.balance import Balancer, Job


def job(name: object, *, context: str = "", num_context: int = 0, num_completion: int = 10) -> Job:
    return Job(str(name), (context or str(name)).encode(), num_context, num_completion)


def hand_out(balancer: Balancer, jobs: list[Job]) -> list[int]:
    """Gives each job to whom the balancer says. Every one must find somebody."""
    given_to = []
    for each in jobs:
        replica = balancer.choose(each)
        assert replica is not None
        balancer.begin(replica, each)
        given_to.append(replica)
    return given_to


def test_equal_work_is_split_equally():
    given_to = hand_out(Balancer(3, window=99, is_up=True), [job(index) for index in range(99)])
    assert Counter(given_to) == {0: 33, 1: 33, 2: 33}


def test_tokens_are_what_is_split_and_not_sequences():
    balancer = Balancer(2, window=99, is_up=True)
    assert (
        hand_out(balancer, [job("long", num_completion=1000)] + [job(index) for index in range(20)]) == [0] + [1] * 20
    )


def test_idle_replicas_take_turns():
    balancer = Balancer(3, window=9, is_up=True)
    given_to = []
    for index in range(6):
        given_to += hand_out(balancer, [job(index)])
        balancer.end(given_to[-1], str(index))
    assert given_to == [0, 1, 2, 0, 1, 2]


def test_clients_that_do_not_know_of_each_other_begin_with_different_replicas():
    assert [hand_out(Balancer(3, window=9, is_up=True, favourite=each), [job("a")]) for each in range(3)] == [
        [0],
        [1],
        [2],
    ]


def test_a_group_stays_where_its_context_is_while_that_saves_tokens():
    balancer = Balancer(2, window=64, is_up=True)
    groups = [job(f"{name}{i}", context=name, num_context=200) for name in "abcd" for i in range(8)]
    assert hand_out(balancer, groups) == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8


def test_a_group_is_split_once_its_completions_are_ahead_by_more_than_the_context():
    balancer = Balancer(2, window=64, is_up=True)
    group = [job(index, context="a", num_context=25) for index in range(6)]
    assert hand_out(balancer, group) == [0, 0, 0, 1, 1, 1]


def test_a_context_that_nobody_has_any_more_binds_no_longer():
    balancer = Balancer(2, window=64, is_up=True)
    hand_out(balancer, [job("a", context="x", num_context=100), job("b", num_completion=5)])
    balancer.end(0, "a")
    balancer.end(1, "b")
    assert balancer.num_tokens(0) == balancer.num_tokens(1) == 0
    assert hand_out(balancer, [job("c", context="x", num_context=100)]) == [1]  # which had less so far


def test_the_window_is_split_among_those_that_are_up_and_rounded_up():
    balancer = Balancer(3, window=7, is_up=True)
    hand_out(balancer, [job(index) for index in range(9)])
    assert balancer.choose(job("one too many")) is None
    balancer.set_up(2, False)
    assert hand_out(balancer, [job("fourth a"), job("fourth b")]) == [0, 1]
    assert balancer.choose(job("one too many")) is None


def test_nobody_up_means_waiting():
    balancer = Balancer(2, window=8)
    assert balancer.choose(job("a")) is None
    balancer.set_up(1, True)
    assert hand_out(balancer, [job("a")]) == [1]


def test_a_slow_replica_gets_less_in_proportion():
    """Replica 0 answers a sequence a tick, replica 1 one every fourth, and 200 wait for a window of 8."""
    balancer = Balancer(2, window=8, is_up=True)
    waiting = [job(index) for index in range(200)]
    at_work: list[list[Job]] = [[], []]
    answered = Counter[int]()
    for tick in range(1000):
        while waiting and (replica := balancer.choose(waiting[0])) is not None:
            balancer.begin(replica, waiting[0])
            at_work[replica].append(waiting.pop(0))
        for replica, every in enumerate((1, 4)):
            if at_work[replica] and tick % every == 0:
                balancer.end(replica, at_work[replica].pop(0).sequence_id)
                answered[replica] += 1
    assert answered.total() == 200
    assert 3.5 < answered[0] / answered[1] < 4.5


# ---------------------------------------------------------------- any order

JOBS = st.builds(
    lambda context, length, tokens: (context, length, tokens),
    st.sampled_from("abc"),
    st.just(50),
    st.integers(0, 60),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), JOBS),
        st.tuples(st.just("answer"), st.integers(0, 10_000)),
        st.tuples(st.just("lose"), st.integers(0, 2)),
        st.tuples(st.just("join"), st.integers(0, 2)),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, window=st.integers(1, 9))
def test_whatever_happens_every_sequence_is_with_one_replica_or_waits_for_a_reason(events, window):
    """A model of the stream: a queue, first come first served, and replicas that come, answer and go."""
    balancer = Balancer(3, window=window)
    up: set[int] = set()
    waiting: list[Job] = []
    at_work: list[tuple[int, Job]] = []
    num_submitted = num_answered = 0
    for event, argument in events:
        if event == "submit":
            context, length, tokens = argument
            waiting.append(Job(str(num_submitted), context.encode(), length, tokens))
            num_submitted += 1
        elif event == "answer" and at_work:
            replica, done = at_work.pop(argument % len(at_work))
            balancer.end(replica, done.sequence_id)
            num_answered += 1
        elif event == "lose":
            up.discard(argument)
            balancer.set_up(argument, False)
            balancer.end_all(argument)
            waiting = [each for replica, each in at_work if replica == argument] + waiting
            at_work = [(replica, each) for replica, each in at_work if replica != argument]
        elif event == "join":
            up.add(argument)
            balancer.set_up(argument, True)
        while waiting and (replica := balancer.choose(waiting[0])) is not None:
            assert replica in up
            assert balancer.num_outstanding(replica) < math.ceil(window / len(up))
            balancer.begin(replica, waiting[0])
            at_work.append((replica, waiting.pop(0)))

        assert len(waiting) + len(at_work) + num_answered == num_submitted
        for replica, each in at_work:
            assert balancer.holders(each.sequence_id) == [replica]
        for replica in range(3):
            mine = [each for owner, each in at_work if owner == replica]
            contexts = {each.context_key for each in mine}
            assert balancer.num_tokens(replica) == sum(e.num_completion_tokens for e in mine) + 50 * len(contexts)
            assert balancer.is_idle(replica) == (replica in up and not mine)
        if waiting and any(balancer.is_idle(replica) for replica in up):  # not in vain: another is done sooner
            full = [each for each in up if balancer.num_outstanding(each) >= math.ceil(window / len(up))]
            assert min(balancer.num_tokens(each) for each in full) <= 2 * 50  # a context's time, and its saving


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(1, 100), min_size=1, max_size=60), num_replicas=st.integers(1, 4))
def test_nobody_is_ahead_by_more_than_one_sequence_where_contexts_differ(tokens, num_replicas):
    balancer = Balancer(num_replicas, window=10_000, is_up=True)
    hand_out(balancer, [job(index, num_context=7, num_completion=count) for index, count in enumerate(tokens)])
    loads = [balancer.num_tokens(replica) for replica in range(num_replicas)]
    assert max(loads) - min(loads) <= max(tokens) + 7
