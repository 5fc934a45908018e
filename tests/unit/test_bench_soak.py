"""The soak's own judgement: whatever it is there to find is found when it is there. No server is started."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from soak_figures import Look, busy_shares, growth_figures, latencies, slope_a_minute, total
from soak_plan import MISDEEDS, TRANSPORTS, JobPlan, Tally, make_plans
from soak_process import ProcessSample
from soak_report import (
    BUDGETS,
    Check,
    check_answers,
    check_books,
    check_budgets,
    check_growth,
    check_log,
    check_power,
    check_rejections,
    check_shares,
    print_checks,
)
from soak_workload import (
    GROUP_SIZE,
    POOL,
    TOP_K,
    Reference,
    distance,
    draw,
    make_pool,
    power,
    shifted,
    units_of,
)
from vopd_client.types import Candidates, SequenceScores, SequenceToScore, TeacherTopK

VOCAB = 5000


def scores_of(sequence: SequenceToScore, rng: np.random.Generator) -> SequenceScores:
    """A teacher's answer: sampled ids of about 9 nats, a top-k of some 3 that is sorted."""
    num_rows = len(sequence.completion_ids)
    sampled = rng.normal(-9, 3, num_rows).astype(np.float32)
    match sequence.support:
        case TeacherTopK(k=k):
            ids = np.concatenate([rng.choice(VOCAB, k, replace=False) for _ in range(num_rows)])
            logprobs = np.sort(rng.normal(-3, 1, (num_rows, k)).astype(np.float32))[:, ::-1].ravel()
            return SequenceScores(sampled, ids, logprobs, np.full(num_rows, k))
        case Candidates(ids=ids, counts_T=counts_T):
            return SequenceScores(sampled, ids, rng.normal(-9, 3, len(ids)).astype(np.float32), counts_T)
        case _:
            nothing = np.zeros(0, np.int64)
            return SequenceScores(sampled, nothing, np.zeros(0, np.float32), np.zeros(num_rows, np.int64))


@pytest.fixture(scope="module")
def pool() -> list[Reference]:
    rng = np.random.default_rng(0)
    return [
        Reference(kind, group, sequence, scores_of(sequence, rng)) for kind, group, sequence in make_pool(rng, VOCAB)
    ]


def of(pool: list[Reference], support: type) -> list[Reference]:
    """Those with a support of this type and 16 rows, the last of which has some of it: there is something to shift."""
    found = [
        one for one in pool if isinstance(one.sequence.support, support) and len(one.sequence.completion_ids) == 16
    ]
    return [one for one in found if one.scores.counts_T[-1]]


# ---------------------------------------------------------------- the workload


def test_the_pool_is_as_large_as_it_says_with_every_support_and_length(pool: list[Reference]) -> None:
    assert len(pool) == sum(shape.groups * shape.group_size for shape in POOL)
    assert {len(one.sequence.completion_ids) for one in pool} >= {1, 256}
    assert max(one.num_tokens for one in pool) > 1900
    supports = Counter(type(one.sequence.support).__name__ for one in pool)
    assert min(supports.values()) > len(pool) / 5
    assert len(supports) == 3
    counts_T = np.concatenate([one.scores.counts_T for one in pool if isinstance(one.sequence.support, Candidates)])
    assert counts_T.min() == 0
    assert counts_T.max() == 100


def test_contexts_are_shared_by_groups_of_eight_and_by_nobody_else(pool: list[Reference]) -> None:
    contexts = Counter(one.sequence.context_ids.tobytes() for one in pool)
    assert Counter(contexts.values()) == {1: 75, GROUP_SIZE: 12}
    assert len(contexts) == len({one.group for one in pool})


def test_a_unit_is_one_sequence_or_some_of_one_group(pool: list[Reference]) -> None:
    units = units_of(pool, frozenset({"short", "few-shot"}))
    rng = np.random.default_rng(1)
    drawn = [draw(rng, units) for _ in range(200)]
    assert {pool[index].kind for unit in drawn for index in unit} == {"short", "few-shot"}
    assert all(len({pool[index].group for index in unit}) == 1 for unit in drawn)
    assert all(len(set(unit)) == len(unit) for unit in drawn)
    assert {len(unit) for unit in drawn if pool[unit[0]].kind == "few-shot"} == set(range(2, GROUP_SIZE + 1))


def test_thirty_two_jobs_have_every_transport_weight_and_role() -> None:
    plans = make_plans(32)
    assert Counter(plan.transport for plan in plans) == dict(zip(TRANSPORTS, (11, 11, 10), strict=True))
    assert {(plan.transport, plan.weight) for plan in plans if plan.role == "busy"} == {
        (transport, weight) for transport in TRANSPORTS for weight in (1, 2, 4)
    }
    assert {plan.transport for plan in plans if plan.role == "unruly"} == set(MISDEEDS)
    assert Counter(plan.role for plan in plans) == {"busy": 14, "unruly": 9, "calm": 6, "tight": 3}
    assert len({plan.tenant_id for plan in plans}) == 32


# ---------------------------------------------------------------- is it the right answer?


@pytest.mark.parametrize("support", [TeacherTopK, Candidates])
def test_noise_is_right_and_a_wrong_answer_is_not(pool: list[Reference], support: type) -> None:
    one, other = of(pool, support)[:2]
    right = one.scores
    rng = np.random.default_rng(2)

    def noisy(values: np.ndarray, scale: float) -> np.ndarray:
        return (values + rng.normal(0, scale, len(values))).astype(np.float32)

    answers = {
        "noise": replace(
            right,
            sampled_logprobs_T=noisy(right.sampled_logprobs_T, 0.05),
            support_logprobs=noisy(right.support_logprobs, 0.05),
        ),
        "another's": other.scores,
        "another's sampled ones alone": replace(right, sampled_logprobs_T=other.scores.sampled_logprobs_T),
        "shifted": shifted(right),
        "a shifted support alone": replace(right, support_logprobs=shifted(right).support_logprobs),
        "a row less": replace(right, sampled_logprobs_T=right.sampled_logprobs_T[1:], counts_T=right.counts_T[1:]),
        "NaN": replace(right, sampled_logprobs_T=np.full(16, np.nan, np.float32)),
    }
    verdicts = {name: distance(scores, one).is_right for name, scores in answers.items()}
    assert verdicts == {name: name == "noise" for name in answers}


def test_the_same_numbers_for_other_ids_are_wrong_where_the_teacher_names_them(pool: list[Reference]) -> None:
    one, other = of(pool, TeacherTopK)[:2]
    found = distance(replace(one.scores, support_ids=other.scores.support_ids), one)
    assert found.mean_nats == 0
    assert not found.is_right
    swapped = one.scores.support_ids.reshape(-1, TOP_K).copy()
    swapped[:, [18, 19]] = swapped[:, [19, 18]]  # near ties
    swapped[:, 19] = VOCAB
    assert distance(replace(one.scores, support_ids=swapped.ravel()), one).ids_shared == pytest.approx(0.95)


def test_power_counts_what_could_not_be_told_apart(pool: list[Reference]) -> None:
    found = power(pool)
    assert found.num_unnoticed == 0
    assert found.num_swapped > 100
    assert check_power(found).holds
    twins = [*pool, replace(pool[0], scores=pool[0].scores)]
    assert power(twins).num_unnoticed == 1
    assert power(twins).least_nats == 0
    assert not check_power(power(twins)).holds


def test_power_does_not_rely_on_ids_that_the_client_fills_in_itself(pool: list[Reference]) -> None:
    one = of(pool, Candidates)[0]
    other_ids = replace(one.scores, support_ids=one.scores.support_ids + 1)
    assert power([one, replace(one, scores=other_ids)]).num_unnoticed == 1


# ---------------------------------------------------------------- books


def plan(role: str = "busy", transport: str = "gRPC unary", tenant_id: str = "a") -> JobPlan:
    return JobPlan(0, tenant_id, transport, role, 1, 1)  # type: ignore[arg-type]


def status(scored: int = 10, rejections: dict[str, int] | None = None, **changed: Any) -> dict[str, Any]:
    tenant = dict.fromkeys(BUDGETS, 0) | {"id": "a", "sequences_scored": scored, "rejections": rejections or {}}
    return {"calls_in_flight": 0, "running_tokens": 0, "tenants": [tenant | changed]}


def holds(check: Check) -> bool:
    assert check.holds is not None
    return check.holds


def test_a_wrong_a_missing_a_duplicated_and_a_failed_answer_fail(pool: list[Reference]) -> None:
    def verdicts(change: Any) -> list[bool]:
        tally = Tally(asked=2, right=1)
        tally.check(pool[0], pool[0].scores, seconds=0.1, in_time=True)
        change(tally)
        return [holds(check) for check in check_answers(tally, Tally(right=1))]

    assert verdicts(lambda tally: None) == [True, True, True]
    assert verdicts(lambda tally: setattr(tally, "asked", 3)) == [True, False, True]
    assert verdicts(lambda tally: tally.failed_with(OSError("gone"), 0)) == [True, False, True]
    twice = ValueError("the teacher answered sequence '3', which is not waiting for an answer")
    assert verdicts(lambda tally: tally.failed_with(twice, 0)) == [True, False, True]

    def wrong(tally: Tally) -> None:
        one = of(pool, Candidates)[0]
        tally.asked += 1
        tally.check(one, shifted(one.scores), seconds=0.1, in_time=True)

    assert verdicts(wrong) == [False, False, True]
    nothing = check_answers(Tally(), Tally())
    assert [check.holds for check in nothing] == [False, True, False]


def test_what_was_given_up_refused_late_or_failed_is_not_missing() -> None:
    accounted = ("right", "wrong", "given_up", "refused", "late", "failed")
    for name in accounted:
        assert Tally(asked=1, **{name: 1}).missing == 0
    assert Tally(asked=1).missing == 1


def test_the_teacher_scored_what_was_answered_and_at_most_what_was_given_up() -> None:
    tally = Tally(right=9, wrong=1, given_up=2, late=1)
    found = {scored: holds(check_books([plan()], {"a": tally}, status(scored))) for scored in (9, 10, 13, 14)}
    assert found == {9: False, 10: True, 13: True, 14: False}


def test_rejections_are_those_that_the_misdeeds_ask_for() -> None:
    tally = Tally(told=Counter(INVALID_ARGUMENT=2), untold=Counter(DEADLINE_EXCEEDED=3), strangers_refused=4)

    def verdict(rejections: dict[str, int], *, role: str = "unruly", strangers: int = 4) -> bool:
        last = status(rejections=rejections)
        return holds(check_rejections([plan(role)], {"a": tally}, last, {"UNAUTHENTICATED": strangers}))

    assert verdict({"INVALID_ARGUMENT": 2})
    assert verdict({"INVALID_ARGUMENT": 2, "DEADLINE_EXCEEDED": 3})
    assert not verdict({"INVALID_ARGUMENT": 2, "DEADLINE_EXCEEDED": 4})
    assert not verdict({"INVALID_ARGUMENT": 1})
    assert not verdict({})
    assert not verdict({"INVALID_ARGUMENT": 2, "INTERNAL": 1})
    assert not verdict({"INVALID_ARGUMENT": 2, "RESOURCE_EXHAUSTED": 1})
    assert verdict({"INVALID_ARGUMENT": 2, "RESOURCE_EXHAUSTED": 1}, role="tight")
    assert not verdict({"INVALID_ARGUMENT": 2}, strangers=3)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_that_is_left_is_found(name: str) -> None:
    assert holds(check_budgets(status()))
    check = check_budgets(status(**{name: 5}))
    assert not check.holds
    assert name in check.found
    assert not check_budgets(status() | {"calls_in_flight": 1}).holds


def test_all_jobs_together_are_sums_extremes_and_all_latencies() -> None:
    first = Tally(right=1, largest_nats=0.3, least_ids_shared=0.9, latencies_s={"short": [1.0]}, told=Counter(A=1))
    second = Tally(right=2, largest_nats=0.1, latencies_s={"short": [3.0], "few-shot": [2.0]}, told=Counter(A=2))
    both = total([first, second])
    assert (both.right, both.largest_nats, both.least_ids_shared, both.told) == (3, 0.3, 0.9, Counter(A=3))
    assert latencies(both.latencies_s)["short"] == {"sequences": 2, "p50_s": 2.0, "p95_s": 2.9}
    assert first.latencies_s == {"short": [1.0]}


# ---------------------------------------------------------------- leaks


def samples(*, leak_mib_a_minute: float = 0.0, descriptors_a_minute: float = 0.0) -> list[ProcessSample]:
    """Five minutes; the first of them a warm-up that takes 400 MiB."""
    rng = np.random.default_rng(3)
    return [
        ProcessSample(
            at_s=at_s,
            memory_mib=800 + 400 * min(1.0, at_s / 60) + leak_mib_a_minute * at_s / 60 + rng.normal(0, 2),
            descriptors=round(90 + rng.integers(-3, 4) + descriptors_a_minute * at_s / 60),
            threads=17,
            cpu_s=at_s,
        )
        for at_s in np.arange(0.0, 310.0, 2.0).tolist()
    ]


def growth_verdicts(found: list[ProcessSample], *, after: int = 15, seconds: float = 300) -> dict[str, bool | None]:
    quiet = replace(found[0], descriptors=15)
    growth = growth_figures(found, seconds)
    return {
        check.what: check.holds
        for check in check_growth(growth, quiet, replace(quiet, descriptors=after), seconds=seconds)
    }


def test_a_warm_up_is_no_leak() -> None:
    assert set(growth_verdicts(samples()).values()) == {True}


def test_leaks_are_found_and_named() -> None:
    def failing(found: list[ProcessSample], after: int = 15) -> list[str]:
        return [what for what, verdict in growth_verdicts(found, after=after).items() if not verdict]

    assert failing(samples(leak_mib_a_minute=30)) == ["memory"]
    assert failing(samples(descriptors_a_minute=12)) == ["file descriptors under load"]
    assert failing(samples(), after=16) == ["file descriptors when it is quiet"]
    assert growth_verdicts(samples(leak_mib_a_minute=30)[:30], seconds=60)["memory"] is None


def test_the_slope_is_that_of_what_came_after_the_warm_up() -> None:
    found = samples(leak_mib_a_minute=10)
    assert slope_a_minute(found, "memory_mib", from_s=60, to_s=300) == pytest.approx(10, abs=0.5)
    assert slope_a_minute(found, "memory_mib", from_s=0, to_s=300) > 30
    assert slope_a_minute(found[:1], "memory_mib", from_s=0, to_s=300) == 0


# ---------------------------------------------------------------- shares

WEIGHTS = {f"job-{number}": float(2 ** (number % 3)) for number in range(6)}


def looks(**changed: float) -> list[Look]:
    """Shares by weight, but for those that are named; half of the teacher went to somebody else."""
    fair = {name: 0.5 * weight / sum(WEIGHTS.values()) for name, weight in WEIGHTS.items()}
    share = {name: fair[name] * changed.get(name.replace("-", "_"), 1.0) for name in fair}
    return [Look(60.0 + place, share, dict.fromkeys(share, True)) for place in range(20)]


def test_fair_shares_hold_and_an_unfair_one_does_not() -> None:
    assert busy_shares(looks(), WEIGHTS) == pytest.approx(dict.fromkeys(WEIGHTS, 1.0))
    assert check_shares(busy_shares(looks(), WEIGHTS), WEIGHTS, 200_000).holds is True
    check = check_shares(busy_shares(looks(job_2=1.5), WEIGHTS), WEIGHTS, 200_000)
    assert check.holds is False
    assert "job-2" in check.found


def test_shares_are_not_judged_where_few_were_busy_or_little_was_had() -> None:
    idle_once = [*looks(), *(replace(look, is_queued=look.is_queued | {"job-0": False}) for look in looks()[:2])]
    shares = busy_shares(idle_once, WEIGHTS)
    assert sorted(shares) == sorted(set(WEIGHTS) - {"job-0"})
    assert check_shares(shares, WEIGHTS, 200_000).holds is None
    assert check_shares({}, WEIGHTS, 0).holds is None
    assert check_shares(busy_shares(looks(), WEIGHTS), WEIGHTS, 5_000).holds is None


def test_a_line_of_the_log_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks(Console(width=200), [check_log(["ERROR raised by servicer method [/vopd.teacher.v1.Teacher/Score]"])])
    printed = capsys.readouterr().out
    assert "[/vopd.teacher.v1.Teacher/Score]" in printed
    assert "FAILS" in printed
