"""Which of vLLM's answers become scores, and which are refused."""

from __future__ import annotations

import numpy as np
import pytest

from fake_vllm import VOCAB_SIZE, Flat, Metrics, Output, Part
from vopd_server.engines.vllm_scores import UnusableAnswerError, read_scores, times_s
from vopd_server.errors import EngineError
from vopd_server.types import Candidates, NoSupport, ScoreRequest, Scores, Support, TeacherTopK

CONTEXT = [3, 4, 5]
COMPLETION = [6, 7]


def request(support: Support | None = None) -> ScoreRequest:
    return ScoreRequest("r", np.array(CONTEXT), np.array(COMPLETION), support or NoSupport())


def flat(rows: list[tuple[list[int], list[float]]]) -> Flat:
    """Entry 0 is empty, as vLLM's is."""
    entries = Flat()
    entries.append([], [])
    for ids, logprobs in rows:
        entries.append(ids, logprobs)
    return entries


def top_2(**changes: tuple[list[int], list[float]]) -> Flat:
    """Rows 0 to 3 of the five prompt tokens; rows 2 and 3 are the completion's."""
    rows = {
        "row_0": ([4, 1, 2], [-9.0, -1.0, -2.0]),
        "row_1": ([5, 1, 2], [-9.0, -1.0, -2.0]),
        "row_2": ([6, 10, 11], [-3.0, -0.5, -1.5]),
        "row_3": ([7, 12, 13], [-4.0, -0.25, -2.5]),
    }
    return flat(list((rows | changes).values()))


def read(support: Support | None, answer: Output, *, read_cache: bool = True) -> Scores:
    return read_scores(request(support), answer, read_cache=read_cache, vocab_size=VOCAB_SIZE)


def test_the_completions_rows_are_read_and_no_others() -> None:
    scores = read(TeacherTopK(2), Output(prompt_logprobs=top_2()))
    assert scores.sampled_logprobs_T.tolist() == [-3.0, -4.0]
    assert scores.support_logprobs is not None
    assert scores.support_ids_TK is not None
    assert scores.support_logprobs.tolist() == [[-0.5, -1.5], [-0.25, -2.5]]
    assert scores.support_ids_TK.tolist() == [[10, 11], [12, 13]]
    assert scores.sampled_logprobs_T.dtype == scores.support_logprobs.dtype == np.float32


def test_entries_that_a_cache_hit_left_out_do_not_shift_the_rows() -> None:
    """The V2 runner after a hit of two tokens: rows 0 and 1 are not there."""
    rows = [([6], [-3.0]), ([7], [-4.0])]
    scores = read(None, Output(prompt_logprobs=flat(rows), num_cached_tokens=2))
    assert scores.sampled_logprobs_T.tolist() == [-3.0, -4.0]


def test_garbage_in_the_contexts_rows_does_no_harm() -> None:
    """The V1 runner after a hit of two tokens: rows 0 and 1 were never written."""
    garbage = ([-7, -7, -7], [float("nan"), 1e30, float("nan")])
    scores = read(TeacherTopK(2), Output(prompt_logprobs=top_2(row_0=garbage, row_1=garbage), num_cached_tokens=2))
    assert scores.sampled_logprobs_T.tolist() == [-3.0, -4.0]


def test_ragged_candidates_come_back_flat_and_in_order() -> None:
    support = Candidates(np.array([10, 11, 12]), np.array([1, 2]))
    answer = Output(prompt_token_id_logprobs=np.array([[-3, -1, -np.inf], [-4, -2, -2.5]], np.float32))
    scores = read(support, answer)
    assert scores.sampled_logprobs_T.tolist() == [-3.0, -4.0]
    assert scores.support_logprobs is not None
    assert scores.support_logprobs.tolist() == [-1.0, -2.0, -2.5]


def test_given_ids_without_candidates_are_the_sampled_logprobs() -> None:
    scores = read(None, Output(prompt_token_id_logprobs=np.array([[-3], [-4]], np.float32)))
    assert scores.sampled_logprobs_T.tolist() == [-3.0, -4.0]
    assert scores.support_logprobs is None


def test_a_masked_candidate_keeps_its_minus_infinity() -> None:
    support = Candidates(np.array([10, 11]), np.array([1, 1]))
    scores = read(support, Output(prompt_token_id_logprobs=np.array([[-3, -np.inf], [-4, -2]], np.float32)))
    assert scores.support_logprobs is not None
    assert scores.support_logprobs.tolist() == [-np.inf, -2.0]


@pytest.mark.parametrize(
    ("support", "answer", "reason"),
    [
        (None, Output(), "no scores"),
        (None, Output(prompt_logprobs=flat([([7], [-4.0])])), "2 entries for 2 completion tokens"),
        (TeacherTopK(2), Output(prompt_logprobs=top_2(row_3=([9, 1, 2], [-4.0, -1, -2]))), "other tokens"),
        (TeacherTopK(2), Output(prompt_logprobs=top_2(row_3=([7, 1], [-4.0, -1]))), "3 log-probabilities each"),
        (TeacherTopK(2), Output(prompt_logprobs=top_2(row_2=([6, -7, 2], [-4.0, -1, -2]))), "outside"),
        (TeacherTopK(2), Output(prompt_logprobs=top_2(row_2=([6, VOCAB_SIZE, 2], [-4.0, -1, -2]))), "outside"),
        (TeacherTopK(2), Output(prompt_logprobs=top_2(row_2=([6, 1, 2], [np.nan, -1, -2]))), "NaN"),
        (TeacherTopK(2), Output(prompt_logprobs=top_2(row_2=([6, 1, 2], [-4, -1, np.nan]))), "NaN"),
        (TeacherTopK(2), Output(prompt_logprobs=top_2(row_2=([6, 1, 2], [-4, 1e20, -2]))), "above 0"),
        (None, Output(prompt_token_id_logprobs=np.array([[-3]], np.float32)), r"shape \(1, 1\) instead of \(2, 1\)"),
        (None, Output(prompt_token_id_logprobs=np.array([[-3], [np.nan]], np.float32)), "NaN"),
    ],
)
def test_an_answer_that_is_not_wholly_there_is_refused(support: Support | None, answer: Output, reason: str) -> None:
    with pytest.raises(UnusableAnswerError, match=reason):
        read(support, answer)


@pytest.mark.parametrize(
    "answer",
    [
        Output(prompt_logprobs=top_2(), num_cached_tokens=3),  # row 2 was in the cache
        Output(prompt_logprobs=top_2(), num_cached_tokens=None),
        Output(prompt_logprobs=top_2(), metrics=Metrics(num_preemptions=1)),
        Output(prompt_logprobs=top_2(), metrics=None),
    ],
)
def test_plausible_numbers_are_refused_where_rows_may_never_have_been_computed(answer: Output) -> None:
    """Unwritten memory may hold another request's numbers for the same tokens."""
    with pytest.raises(UnusableAnswerError):
        read(TeacherTopK(2), answer)
    assert read(TeacherTopK(2), answer, read_cache=False).sampled_logprobs_T.tolist() == [-3.0, -4.0]


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_a_request_that_vllm_gave_up_is_an_error_and_not_asked_again(reason: str | None) -> None:
    with pytest.raises(EngineError, match=f"finish_reason {reason!r}") as raised:
        read(TeacherTopK(2), Output(prompt_logprobs=top_2(), outputs=[Part(reason)]))
    assert not isinstance(raised.value, UnusableAnswerError)


def test_times_are_vllms_own() -> None:
    assert times_s(Output()) == (2.0, 0.5)


@pytest.mark.parametrize("metrics", [None, Metrics(queued_ts=0.0), Metrics(scheduled_ts=0.0)])
def test_times_that_are_not_known_are_zero(metrics: Metrics | None) -> None:
    assert times_s(Output(metrics=metrics)) == (0.0, 0.0)
