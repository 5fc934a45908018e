"""The soak's own judgement: a wrong answer, a leak, an unfair share and a budget that is left are found."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from soak_process import ProcessSample
from soak_report import busy_shares, checks_of, figures_of, minute_after_warm_up
from soak_workload import TOLERANCE_NATS, Reference, Tally, distance_nats, draw, make_pool, smallest_distance
from vopd_client.types import Candidates, SequenceScores, SequenceToScore, TeacherTopK


def scores_of(sequence: SequenceToScore, rng: np.random.Generator) -> SequenceScores:
    num_rows = len(sequence.completion_ids)
    match sequence.support:
        case TeacherTopK(k=k):
            counts_T = np.full(num_rows, k)
        case Candidates(counts_T=counts):
            counts_T = counts
        case _:
            counts_T = np.zeros(num_rows, np.int64)
    size = int(counts_T.sum())
    sampled, support = rng.normal(-9, 3, num_rows), rng.normal(-9, 3, size)
    return SequenceScores(sampled.astype(np.float32), np.zeros(size, np.int64), support.astype(np.float32), counts_T)


@pytest.fixture(scope="module")
def pool() -> list[Reference]:
    rng = np.random.default_rng(0)
    return [Reference(sequence, scores_of(sequence, rng)) for sequence in make_pool(rng, 1000)]


def test_the_pool_has_every_support_and_groups_that_share_a_context(pool: list[Reference]) -> None:
    supports = Counter(type(one.sequence.support).__name__ for one in pool)
    assert set(supports) == {"NoSupport", "TeacherTopK", "Candidates"}
    contexts = Counter(one.sequence.context_ids.tobytes() for one in pool)
    assert set(contexts.values()) == {1, 4, 8}
    batch = draw(np.random.default_rng(1), pool)
    assert 1 <= len(batch) <= 12


def test_noise_is_right_and_another_answer_a_shifted_or_a_shorter_one_is_wrong(pool: list[Reference]) -> None:
    reference = next(one for one in pool if len(one.sequence.completion_ids) == 48)
    right = reference.scores
    noise = np.random.default_rng(2).normal(0, 0.05, len(right.sampled_logprobs_T)).astype(np.float32)
    other = next(one for one in pool if one is not reference and len(one.sequence.completion_ids) == 48)
    answers = {
        "noise": replace(right, sampled_logprobs_T=right.sampled_logprobs_T + noise),
        "another": replace(right, sampled_logprobs_T=other.scores.sampled_logprobs_T),
        "shifted": replace(right, sampled_logprobs_T=np.roll(right.sampled_logprobs_T, 1)),
        "shorter": replace(right, sampled_logprobs_T=right.sampled_logprobs_T[1:]),
        "nan": replace(right, sampled_logprobs_T=right.sampled_logprobs_T * np.float32(np.nan)),
    }
    verdicts = {}
    for name, scores in answers.items():
        tally = Tally(Counter())
        tally.check(reference, scores)
        verdicts[name] = tally.num_right == 1 and tally.num_wrong == 0
    assert verdicts == {"noise": True, "another": False, "shifted": False, "shorter": False, "nan": False}


def test_references_are_further_apart_than_the_tolerance(pool: list[Reference]) -> None:
    assert smallest_distance(pool) > TOLERANCE_NATS
    assert distance_nats(pool[0].scores, pool[0].scores) == 0


def samples(growth: float = 0.0, descriptors: int = 0) -> list[ProcessSample]:
    return [
        ProcessSample(at_s, int(10**9 * (1 + growth * at_s / 300)), 40 + int(descriptors * at_s / 300), 9, at_s)
        for at_s in range(0, 300, 5)
    ]


def tenant(tenant_id: str, share: float = 0.0, **changed: Any) -> dict[str, Any]:
    zeros = dict.fromkeys(
        ("held_sequences", "queued_sequences", "running_sequences", "reserved_tokens", "reserved_bytes"), 0
    )
    return {"id": tenant_id, "share": share, **zeros, **changed}


WEIGHTS = {"a": 1.0, "b": 3.0}
IDLE = {"calls_in_flight": 0, "running_tokens": 0, "tenants": [tenant("a"), tenant("b")]}


def busy(share_of_a: float) -> list[dict[str, Any]]:
    both = [tenant("a", share_of_a, queued_sequences=2), tenant("b", 1 - share_of_a, queued_sequences=2)]
    return [{"tenants": both}] * 8


def failing(
    *,
    wrong: int = 0,
    process: list[ProcessSample] | None = None,
    share_of_a: float = 0.25,
    last: dict[str, Any] = IDLE,
    distance: float = 3.0,
) -> list[str]:
    """The checks that do not hold."""
    tally = Tally(Counter(), num_right=100, num_wrong=wrong, refused=Counter({"wrong key": 1, "too long": 1}))
    tally.took("HTTP", 1.0)
    figures = figures_of(tally, process or samples(), busy(share_of_a), seconds=300, weights=WEIGHTS)
    figures["smallest_distance_between_references_nats"] = distance
    return [check.what for check in checks_of(figures, last) if not check.holds]


def test_all_is_well_when_it_is() -> None:
    assert failing() == []


def test_each_thing_that_is_not_well_is_found() -> None:
    assert failing(wrong=1) == ["answers"]
    assert failing(distance=0.1) == ["another sequence's answer would show"]
    assert failing(process=samples(growth=0.2)) == ["memory"]
    assert failing(process=samples(descriptors=30)) == ["file descriptors"]
    assert failing(share_of_a=0.4) == ["shares of those that were always busy"]
    left = {**IDLE, "tenants": [tenant("a", reserved_tokens=5), tenant("b")]}
    assert failing(last=left) == ["budgets at the end"]
    assert failing(last={**IDLE, "calls_in_flight": 1}) == ["budgets at the end"]


def test_one_that_was_idle_now_and_then_is_not_compared() -> None:
    statuses = busy(0.25)
    statuses[-1] = {"tenants": [tenant("a", 0.9, queued_sequences=0), tenant("b", 0.1, queued_sequences=1)]}
    assert list(busy_shares(statuses, WEIGHTS)) == ["b"]


def test_the_warm_up_is_not_a_leak() -> None:
    assert [sample.at_s for sample in minute_after_warm_up(samples())][:2] == [60, 65]
    assert [sample.at_s for sample in minute_after_warm_up(samples()[:9])] == [0, 5, 10]
