"""What a sequence is taken to need, from its lengths alone, and what it really takes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vopd_server.demand import BYTES_PER_SUPPORT_LOGPROB, MIN_TENANT_BYTES, demand_of, work_of
from vopd_server.types import Candidates, HiddenStates, NoSupport, ScoreRequest, Support, TeacherTopK
from vopd_server.validation import SequenceShape


def request_of(support: Support, *, context: int = 10, completion: int = 4) -> ScoreRequest:
    return ScoreRequest("r", np.arange(context), np.arange(completion), support)


def test_tokens_are_those_of_context_and_completion() -> None:
    assert demand_of(SequenceShape("s", 10, 4), hidden_size=8).tokens == 14


@pytest.mark.parametrize(
    ("shape", "num_logprobs"),
    [
        (SequenceShape("s", 10, 4), 0),
        (SequenceShape("s", 10, 4, kind="teacher_top_k", k=100), 400),
        (SequenceShape("s", 10, 4, kind="candidates", num_candidates=37), 37),
    ],
)
def test_bytes_grow_with_every_logprob_of_the_support(shape: SequenceShape, num_logprobs: int) -> None:
    plain = demand_of(SequenceShape("s", 10, 4), hidden_size=8).num_bytes
    assert demand_of(shape, hidden_size=8).num_bytes == plain + BYTES_PER_SUPPORT_LOGPROB * num_logprobs


def test_the_estimate_covers_the_arrays_that_really_are_there() -> None:
    """The message's ids at 4 bytes each, what they are unpacked to, the float32 answer, and its packed form."""
    num_rows, k = 1000, 100
    ids = np.arange(num_rows * k) % 50_000
    support = Candidates(ids, np.full(num_rows, k))
    request = request_of(support, context=200, completion=num_rows)
    unpacked = ids.nbytes + request.context_ids.nbytes + request.completion_ids.nbytes
    answer = np.zeros(num_rows * k + num_rows, np.float32)
    really = sys.getsizeof(b"") + 4 * (len(ids) + 1200) + unpacked + 2 * answer.nbytes
    shape = SequenceShape("s", 200, num_rows, kind="candidates", num_candidates=len(ids))
    assert really == pytest.approx(demand_of(shape, hidden_size=8).num_bytes, rel=0.05)


def test_hidden_states_take_bytes_by_their_size() -> None:
    shape = SequenceShape("s", 10, 4, kind="hidden_states")
    assert demand_of(shape, hidden_size=1000).num_bytes - demand_of(shape, hidden_size=0).num_bytes == 8 * 1000 * 4


def test_what_every_tenant_has_holds_a_long_completion_with_a_hundred_candidates_a_position() -> None:
    shape = SequenceShape("s", 1000, 16_384, kind="candidates", num_candidates=100 * 16_384)
    assert demand_of(shape, hidden_size=4096).num_bytes < MIN_TENANT_BYTES


def test_work_counts_the_context_apart_and_rows_by_what_is_asked_of_them() -> None:
    plain = work_of(request_of(NoSupport()))
    assert (plain.context_tokens, plain.own_tokens, plain.row_cost) == (10, 4, 1.0)
    assert work_of(request_of(TeacherTopK(50))).row_cost == 1.0 + 0.01 * 4 * 50
    assert work_of(request_of(Candidates(np.arange(7), np.asarray([7, 0, 0, 0])))).row_cost == 1.0 + 0.01 * 7
    assert work_of(request_of(HiddenStates())).row_cost == 1.0


def test_equal_contexts_have_equal_keys_and_others_do_not() -> None:
    one, same, longer = (work_of(request_of(NoSupport(), context=context)) for context in (10, 10, 11))
    assert one.context_key == same.context_key != longer.context_key
