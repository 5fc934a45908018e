"""What slime asks of an SGLang server, asked of this teacher over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from compat_requests import realised_of_sglang, sglang_body
from fake_engine import FakeEngine, fake_logprobs_TV
from fake_server import FakeTeacher, fake_teacher
from vopd_client.teacher import TeacherClient
from vopd_client.types import SequenceToScore
from vopd_server.types import ScoreRequest, Scores
from wire_client import checked_response

PROMPT = [17, 289, 204, 3, 100, 5]
OTHER = [9, 8, 289, 289]


@pytest.fixture
async def teacher() -> AsyncIterator[FakeTeacher]:
    async with fake_teacher(FakeEngine(max_context_length=64), max_top_k=16) as running:
        yield running
        assert running.reserved_tokens == 0


async def answered(teacher: FakeTeacher, body: dict[str, Any]) -> Any:
    return checked_response(await teacher.client.http.post("/generate", json=body)).json()


async def test_scripts_find_the_teacher_ready_and_its_model(teacher: FakeTeacher) -> None:
    assert (await teacher.client.http.get("/health_generate")).status_code == 200
    info = checked_response(await teacher.client.http.get("/get_model_info")).json()
    assert (info["model_path"], info["weight_version"], info["is_generation"]) == ("fake", "formula-1", True)


async def test_slime_reads_the_scores_that_our_client_gets(teacher: FakeTeacher) -> None:
    """It sends temperature 0, for the token that it does not want: scores are at 1. It keeps the last of them."""
    answer = await answered(teacher, sglang_body(PROMPT))
    response_length = 2
    kept = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]][-response_length:]
    async with TeacherClient(teacher.url) as client:
        (scores,) = await client.score([SequenceToScore(np.asarray(PROMPT[:1]), np.asarray(PROMPT[1:]))])
    np.testing.assert_array_equal(realised_of_sglang(answer, PROMPT), scores.sampled_logprobs_T)
    np.testing.assert_array_equal(np.asarray(kept, np.float32), scores.sampled_logprobs_T[-response_length:])
    assert [request.temperature for request in teacher.engine.requests] == [1.0] * 2


async def test_the_rest_of_an_answer_says_that_nothing_was_generated(teacher: FakeTeacher) -> None:
    answer = await answered(teacher, sglang_body(PROMPT, rid="mine"))
    assert (answer["text"], answer["output_ids"]) == ("", [])
    meta = answer["meta_info"]
    assert (meta["id"], meta["finish_reason"]) == ("mine", {"type": "length", "length": 0})
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["output_token_logprobs"]) == (6, 0, [])
    assert meta["input_token_logprobs"][0] == [None, 17, None]
    assert "input_top_logprobs" not in meta


async def test_a_later_start_leaves_out_the_entries_before_it(teacher: FakeTeacher) -> None:
    meta = (await answered(teacher, sglang_body(PROMPT, logprob_start_len=3)))["meta_info"]
    expected_TV = fake_logprobs_TV(np.asarray(PROMPT[:4]), np.asarray(PROMPT[4:]))
    assert meta["input_token_logprobs"][0] == [None, 3, None]
    for t, (logprob, token, text) in enumerate(meta["input_token_logprobs"][1:]):
        assert (np.float32(logprob), token, text) == (expected_TV[t, PROMPT[4 + t]], PROMPT[4 + t], None)
    (request,) = teacher.engine.requests
    assert request.context_ids.tolist() == PROMPT[:4]


async def test_several_prompts_get_a_list_of_answers_in_their_order(teacher: FakeTeacher) -> None:
    answers = await answered(teacher, sglang_body([PROMPT, OTHER], rid="mine"))
    for answer, prompt in zip(answers, [PROMPT, OTHER], strict=True):
        expected = fake_logprobs_TV(np.asarray(prompt[:1]), np.asarray(prompt[1:]))
        np.testing.assert_array_equal(
            realised_of_sglang(answer, prompt), expected[np.arange(len(prompt) - 1), prompt[1:]]
        )
    assert [answer["meta_info"]["id"] for answer in answers] == ["mine-0", "mine-1"]


async def test_the_best_are_listed_most_likely_first_with_texts_where_they_are_asked_for(teacher: FakeTeacher) -> None:
    meta = (await answered(teacher, sglang_body(PROMPT, top_logprobs_num=3, return_text_in_logprobs=True)))["meta_info"]
    logprobs_TV = fake_logprobs_TV(np.asarray(PROMPT[:1]), np.asarray(PROMPT[1:]))
    assert meta["input_top_logprobs"][0] is None
    for row, logprobs_V in zip(meta["input_top_logprobs"][1:], logprobs_TV, strict=True):
        best = np.argsort(-logprobs_V, kind="stable")[:3].tolist()
        assert [entry[1:] for entry in row] == [[token, f"<{token}>"] for token in best]
        assert [np.float32(entry[0]) for entry in row] == [logprobs_V[token] for token in best]
    assert [entry[2] for entry in meta["input_token_logprobs"]] == [f"<{token}>" for token in PROMPT]
    assert meta["output_top_logprobs"] == []


async def test_minus_infinity_is_a_number(teacher: FakeTeacher) -> None:
    def answer(request: ScoreRequest) -> Scores:
        return Scores(np.full(len(request.completion_ids), -np.inf, np.float32))

    teacher.engine.answer(answer)
    assert realised_of_sglang(await answered(teacher, sglang_body(PROMPT)), PROMPT).tolist() == [-9999.0] * 5
