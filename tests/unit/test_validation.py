"""What is refused before an engine sees it, and what the refusal says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fake_engine import FakeEngine
from vopd_server.errors import EngineError, InvalidRequestError, UnsupportedError
from vopd_server.types import (
    Candidates,
    HiddenStates,
    NoSupport,
    ScoreRequest,
    Scores,
    Support,
    TeacherTopK,
    empty_scores,
)
from vopd_server.validation import (
    Limits,
    SequenceShape,
    check_request,
    check_scores,
    check_shapes,
    check_temperature,
)

H = 6  # hidden size
INFO = dataclasses.replace(FakeEngine(vocab_size=50).info, max_context_length=8192)
LIMITS = Limits(
    max_context_length=8192,
    max_sequences_per_request=3,
    max_tokens_per_request=16_000,
    max_top_k=20,
    max_message_bytes=2**20,
)


def array(*values: int) -> Any:
    return np.asarray(values, np.int64)


def shape(context_length: int = 4, completion_length: int = 3, **rest: Any) -> SequenceShape:
    return SequenceShape("sequences[0]", context_length, completion_length, **rest)


def request(context_ids: Any = None, completion_ids: Any = None, support: Support | None = None) -> ScoreRequest:
    """Two tokens of context and two of completion, unless told otherwise."""
    context_ids = array(1, 2) if context_ids is None else context_ids
    completion_ids = array(3, 4) if completion_ids is None else completion_ids
    return ScoreRequest("r", context_ids, completion_ids, support or NoSupport())


@pytest.mark.parametrize(
    "legal",
    [
        shape(),
        shape(context_length=1, completion_length=0),
        shape(context_length=8000, completion_length=192),
        shape(kind="teacher_top_k", k=1),
        shape(kind="teacher_top_k", k=20),
        shape(kind="candidates", num_candidates=0),
        shape(kind="candidates", num_candidates=60),
    ],
)
def test_lengths_within_the_limits_pass(legal: SequenceShape) -> None:
    check_shapes([legal], info=INFO, limits=LIMITS)


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        (shape(context_length=0), "sequences[0].context_ids", "empty"),
        (shape(9120, 512), "sequences[0]", "context 9120 + completion 512 tokens > max_context_length 8192"),
        (shape(kind="teacher_top_k", k=0), "sequences[0].teacher_top_k.k", r"0; it must lie in [1, 20]"),
        (shape(kind="teacher_top_k", k=21), "sequences[0].teacher_top_k.k", r"21; it must lie in [1, 20]"),
        (
            shape(kind="candidates", num_candidates=61),
            "sequences[0].num_candidates",
            "61 candidates > 3 positions x max_top_k 20",
        ),
    ],
)
def test_lengths_beyond_the_limits_are_refused_with_the_numbers(wrong: SequenceShape, field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_shapes([wrong], info=INFO, limits=LIMITS)
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")
    assert words in str(refused.value)


def test_k_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"k: 51; it must lie in \[1, 50\]"):
        check_shapes([shape(kind="teacher_top_k", k=51)], info=INFO, limits=dataclasses.replace(LIMITS, max_top_k=1000))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([], "holds none"),
        ([shape()] * 4, "4 sequences > max_sequences_per_request 3"),
        ([shape(8000)] * 2, "16006 tokens > max_tokens_per_request 16000"),
    ],
)
def test_a_request_is_neither_empty_nor_too_large(shapes: list[SequenceShape], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refused:
        check_shapes(shapes, info=INFO, limits=LIMITS)
    assert refused.value.field == "sequences"


def test_a_support_that_the_engine_lacks_is_refused_by_naming_those_it_has() -> None:
    info = dataclasses.replace(INFO, supports=frozenset({"sampled", "teacher_top_k"}))
    with pytest.raises(UnsupportedError, match="no candidates support; it has sampled, teacher_top_k"):
        check_shapes([shape(kind="candidates")], info=info, limits=LIMITS)


def test_where_hidden_states_could_be_had_the_refusal_says_how() -> None:
    hidden = shape(kind="hidden_states")
    with pytest.raises(UnsupportedError, match=r"no hidden_states support; it has candidates, sampled, teacher_top_k$"):
        check_shapes([hidden], info=INFO, limits=LIMITS)
    with pytest.raises(UnsupportedError, match=r"teacher_top_k; whoever starts it can allow .* --allow-full-vocab$"):
        check_shapes([hidden], info=dataclasses.replace(INFO, engine="transformers"), limits=LIMITS)
    check_shapes([hidden], info=dataclasses.replace(INFO, supports=frozenset({"hidden_states"})), limits=LIMITS)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-5])
def test_what_is_no_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        check_temperature(temperature, INFO)


def test_only_an_engine_that_can_gets_another_temperature() -> None:
    check_temperature(0.7, INFO)
    fixed = dataclasses.replace(INFO, any_temperature=False)
    check_temperature(1.0, fixed)
    with pytest.raises(UnsupportedError, match=r"temperature 0\.7: engine fake scores at temperature 1 only"):
        check_temperature(0.7, fixed)


@pytest.mark.parametrize(
    "legal",
    [
        request(array(0), array(49)),
        request(completion_ids=array()),
        request(support=Candidates(array(7, 7, 7), array(3, 0))),
        request(support=Candidates(array(), array(0, 0))),
        request(completion_ids=array(), support=Candidates(array(), array())),
    ],
    ids=["both ends of the vocabulary", "empty completion", "duplicates", "empty positions", "nothing at all"],
)
def test_what_is_odd_but_legal_passes(legal: ScoreRequest) -> None:
    check_request(legal, field="sequence", info=INFO, limits=LIMITS)


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        (request(array(1, 50)), "s.context_ids", r"id 50 at position 1 is not in [0, 50)"),
        (request(completion_ids=array(3, 4, -1)), "s.completion_ids", r"id -1 at position 2 is not in [0, 50)"),
        (request(support=Candidates(array(1, 99), array(1, 1))), "s.candidates.ids", "id 99 at position 1"),
        (
            request(support=Candidates(array(1, 2, 3), array(1, 1))),
            "s.candidates.counts",
            "they add up to 2; there are 3 candidate ids",
        ),
        (request(support=Candidates(array(1), array(1))), "s.candidates.counts", "1 counts for 2 completion tokens"),
        (
            request(support=Candidates(np.zeros(21, np.int64), array(0, 21))),
            "s.candidates.counts",
            "21 candidates at position 1 > max_top_k 20",
        ),
    ],
)
def test_arrays_that_cannot_be_scored_are_refused_with_the_place(wrong: ScoreRequest, field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_request(wrong, field="s", info=INFO, limits=LIMITS)
    assert refused.value.field == field
    assert words in str(refused.value)


def floats(*shape_: int) -> Any:
    return np.zeros(shape_, np.float32)


@pytest.mark.parametrize(
    ("support", "scores"),
    [
        (NoSupport(), Scores(floats(3))),
        (NoSupport(), Scores(floats(2), floats(2))),
        (NoSupport(), Scores(np.array([0, np.nan], np.float32))),
        (TeacherTopK(4), Scores(floats(2))),
        (TeacherTopK(4), Scores(floats(2), floats(2, 4))),
        (TeacherTopK(4), Scores(floats(2), floats(2, 3), np.zeros((2, 3), np.int64))),
        (Candidates(array(1, 2, 3), array(1, 2)), Scores(floats(2), floats(2))),
        (Candidates(array(1), array(1, 0)), Scores(floats(2), np.array([np.nan], np.float32))),
        (NoSupport(), Scores(floats(2), hidden_states_TH=floats(2, H))),
        (HiddenStates(), Scores(floats(2))),
        (HiddenStates(), Scores(floats(2), floats(2), hidden_states_TH=floats(2, H))),
        (HiddenStates(), Scores(floats(2), hidden_states_TH=floats(1, H))),
        (HiddenStates(), Scores(floats(2), hidden_states_TH=floats(2, H - 1))),
        (HiddenStates(), Scores(np.array([0, np.nan], np.float32), hidden_states_TH=floats(2, H))),
        (HiddenStates(), Scores(floats(2), hidden_states_TH=floats(2, H) + np.float32(np.nan))),
        (HiddenStates(), Scores(floats(2), hidden_states_TH=floats(2, H) - np.float32(np.inf))),
    ],
)
def test_an_engines_answer_that_is_not_wholly_there_is_never_passed_on(support: Support, scores: Scores) -> None:
    with pytest.raises(EngineError):
        check_scores(request(support=support), scores, hidden_size=H)


def test_minus_infinity_is_an_answer_beside_hidden_states_too() -> None:
    logprobs_T = np.array([-np.inf, 0], np.float32)
    check_scores(request(), Scores(logprobs_T), hidden_size=H)
    check_scores(request(support=HiddenStates()), Scores(logprobs_T, hidden_states_TH=floats(2, H) + 7), hidden_size=H)


@pytest.mark.parametrize("support", [NoSupport(), TeacherTopK(4), Candidates(array(), array()), HiddenStates()])
def test_the_answer_to_an_empty_completion_is_whole(support: Support) -> None:
    asked = request(completion_ids=array(), support=support)
    check_scores(asked, empty_scores(asked, hidden_size=H), hidden_size=H)
