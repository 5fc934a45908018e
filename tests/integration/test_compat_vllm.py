"""What TRL and prime-rl ask of a vLLM server, asked of this teacher over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from compat_requests import (
    LEAST_LOGPROB,
    candidates_body,
    completions_body,
    edited,
    generate_body,
    numpy_of,
    realised_of,
)
from fake_engine import FAKE_VOCAB_SIZE, FakeEngine, fake_logprobs_TV
from fake_server import FakeTeacher, fake_teacher
from vopd_client.teacher import TeacherClient
from vopd_client.types import Candidates, NoSupport, SequenceToScore, TeacherTopK
from vopd_server.types import ScoreRequest, Scores
from wire_client import checked_response, refusal_of_response

COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"
PROMPT = [17, 289, 204, 3, 100, 5]
OTHER = [9, 8, 289, 289]


@pytest.fixture
async def teacher() -> AsyncIterator[FakeTeacher]:
    engine = FakeEngine(max_context_length=64)
    async with fake_teacher(
        engine, max_tokens_per_request=128, queue_tokens=256, max_top_k=16, max_sequences_per_request=8
    ) as running:
        yield running
        assert running.reserved_tokens == 0


async def answered(teacher: FakeTeacher, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = checked_response(await teacher.client.http.post(path, json=body)).json()
    return answer


def expected_TV(prompt: list[int], *, start: int = 0, temperature: float = 1.0) -> np.ndarray[Any, Any]:
    """Row t: of the token after the first start + 1 + t."""
    context, completion = np.asarray(prompt[: start + 1]), np.asarray(prompt[start + 1 :])
    return fake_logprobs_TV(context, completion, temperature=temperature)


# ---------------------------------------------------------------- before the first request


async def test_a_client_finds_the_teacher_ready_and_the_name_of_its_model(teacher: FakeTeacher) -> None:
    assert (await teacher.client.http.get("/health")).status_code == 200
    models = checked_response(await teacher.client.http.get("/v1/models")).json()
    assert [(card["id"], card["max_model_len"]) for card in models["data"]] == [("fake", 64)]


async def test_another_model_is_not_found_and_both_are_named(teacher: FakeTeacher) -> None:
    for path, body in [
        (COMPLETIONS, completions_body(PROMPT, model="gpt")),
        (GENERATE, generate_body(PROMPT, model="gpt")),
    ]:
        refusal = refusal_of_response(await teacher.client.http.post(path, json=body))
        assert (refusal.http_status, refusal.code, refusal.field) == (404, grpc.StatusCode.NOT_FOUND, "model")
        assert refusal.message == "model: 'gpt' is not served here; 'fake' is"
    assert teacher.engine.requests == []


# ---------------------------------------------------------------- completions


async def test_every_token_is_scored_in_the_row_that_is_its_own(teacher: FakeTeacher) -> None:
    answer = await answered(teacher, COMPLETIONS, completions_body([PROMPT, OTHER]))
    for choice, prompt in zip(answer["choices"], [PROMPT, OTHER], strict=True):
        expected = expected_TV(prompt)[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_array_equal(realised_of(choice["prompt_logprobs"], prompt), expected)
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"] == {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0}
    assert (answer["object"], answer["model"]) == ("text_completion", "fake")


async def test_the_realised_token_comes_first_and_then_the_k_best_with_their_ranks(teacher: FakeTeacher) -> None:
    """PROMPT holds a teacher's favourite, a second, and tokens far behind."""
    (choice,) = (await answered(teacher, COMPLETIONS, completions_body(PROMPT, 2)))["choices"]
    logprobs_TV = expected_TV(PROMPT)
    ranks = []
    for token, row, logprobs_V in zip(PROMPT[1:], choice["prompt_logprobs"][1:], logprobs_TV, strict=True):
        best = np.argsort(-logprobs_V, kind="stable")[:2].tolist()
        assert [int(name) for name in row] == [token, *(other for other in best if other != token)]
        for name, entry in row.items():
            assert np.float32(entry["logprob"]) == logprobs_V[int(name)]
            assert entry["decoded_token"] == f"<{name}>"
            assert entry["rank"] == (best.index(int(name)) + 1 if int(name) in best else 3)
        ranks.append(row[str(token)]["rank"])
    assert 3 in ranks


async def test_a_realised_token_among_the_best_stands_there_once() -> None:
    """Everybody's favourite is what was said."""
    prompt = [50]
    for _ in range(4):
        logprobs_TV = fake_logprobs_TV(np.asarray(prompt[:1]), np.asarray([*prompt[1:], 0]))
        prompt.append(int(logprobs_TV[-1].argmax()))
    async with fake_teacher() as teacher:
        (choice,) = (await answered(teacher, COMPLETIONS, completions_body(prompt, 3)))["choices"]
    assert [next(iter(row)) for row in choice["prompt_logprobs"][1:]] == [str(token) for token in prompt[1:]]
    assert [[entry["rank"] for entry in row.values()] for row in choice["prompt_logprobs"][1:]] == [[1, 2, 3]] * 4


async def test_without_the_best_a_rank_is_not_known(teacher: FakeTeacher) -> None:
    (choice,) = (await answered(teacher, COMPLETIONS, completions_body([PROMPT], 0)))["choices"]
    assert all(len(row) == 1 for row in choice["prompt_logprobs"][1:])
    assert {entry["rank"] for row in choice["prompt_logprobs"][1:] for entry in row.values()} == {None}


async def test_minus_infinity_is_the_number_that_vllm_sends_for_it(teacher: FakeTeacher) -> None:
    def answer(request: ScoreRequest) -> Scores:
        return Scores(np.full(len(request.completion_ids), -np.inf, np.float32))

    teacher.engine.answer(answer)
    (choice,) = (await answered(teacher, COMPLETIONS, completions_body(PROMPT)))["choices"]
    assert realised_of(choice["prompt_logprobs"], PROMPT).tolist() == [LEAST_LOGPROB] * 5


async def test_ids_are_shown_where_they_are_asked_for(teacher: FakeTeacher) -> None:
    (choice,) = (await answered(teacher, COMPLETIONS, completions_body(PROMPT, return_token_ids=True)))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPT, [])
    answer = await answered(teacher, GENERATE, generate_body(PROMPT) | {"return_token_ids": True})
    assert answer["prompt_token_ids"] == PROMPT


async def test_a_request_id_is_shown_and_logged(teacher: FakeTeacher) -> None:
    answer = await answered(teacher, COMPLETIONS, completions_body(PROMPT, request_id="mine"))
    assert answer["id"] == "cmpl-mine"
    assert (await answered(teacher, GENERATE, generate_body(PROMPT) | {"request_id": "mine"}))["request_id"] == "mine"
    assert [request.request_id for request in teacher.engine.requests] == ["mine"] * 2


# ---------------------------------------------------------------- generate


async def test_prime_rl_finds_the_realised_token_first_in_every_row(teacher: FakeTeacher) -> None:
    answer = await answered(teacher, GENERATE, generate_body(PROMPT))
    rows = answer["prompt_logprobs"]
    np.testing.assert_array_equal(
        np.asarray([next(iter(row.values()))["logprob"] for row in rows[1:]], np.float32),
        expected_TV(PROMPT)[np.arange(5), PROMPT[1:]],
    )
    assert answer["choices"] == [
        {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None, "token_ids": []}
    ]
    assert answer["prompt_token_id_logprobs"] is None


async def test_candidates_are_scored_in_their_places_and_padding_at_minus_infinity(teacher: FakeTeacher) -> None:
    rows = [[100, 7, -1], [-1, 5, 5], [-1, -1, -1], [0, FAKE_VOCAB_SIZE - 1, 1]]
    scores_TK = numpy_of(await answered(teacher, GENERATE, candidates_body(PROMPT, rows, 1)))
    logprobs_TV = expected_TV(PROMPT, start=1)
    expected_TK = [
        [-np.inf if i < 0 else logprobs_V[i] for i in row] for row, logprobs_V in zip(rows, logprobs_TV, strict=True)
    ]
    np.testing.assert_array_equal(scores_TK, np.asarray(expected_TK, np.float32))
    (request,) = teacher.engine.requests
    assert (request.context_ids.tolist(), request.completion_ids.tolist()) == (PROMPT[:2], PROMPT[2:])
    assert request.support.ids.tolist() == [token for row in rows for token in row if token >= 0]


async def test_rows_of_different_lengths_are_padded(teacher: FakeTeacher) -> None:
    scores_TK = numpy_of(await answered(teacher, GENERATE, candidates_body(PROMPT, [[1], [1, 2], [], [4]], 1)))
    assert np.isneginf(scores_TK).tolist() == [[False, True], [False, False], [True, True], [False, True]]


async def test_the_realised_tokens_as_candidates_have_the_scores_of_prompt_logprobs(teacher: FakeTeacher) -> None:
    """vime's request: a column of the response's own tokens."""
    scores_TK = numpy_of(await answered(teacher, GENERATE, candidates_body(PROMPT, [[i] for i in PROMPT[1:]], 0)))
    rows = (await answered(teacher, GENERATE, generate_body(PROMPT)))["prompt_logprobs"]
    np.testing.assert_array_equal(scores_TK[:, 0], realised_of(rows, PROMPT))


async def test_candidates_that_an_engine_cannot_score_are_refused_by_naming_what_it_can() -> None:
    async with fake_teacher(FakeEngine(supports=frozenset({"sampled", "teacher_top_k"}))) as teacher:
        refusal = refusal_of_response(
            await teacher.client.http.post(GENERATE, json=candidates_body(PROMPT, [[1, 2], [3, 4]], 3))
        )
        assert (refusal.http_status, refusal.code) == (409, grpc.StatusCode.FAILED_PRECONDITION)
        assert refusal.message == ("token_ids: engine fake has no candidates support; it has sampled, teacher_top_k")


# ---------------------------------------------------------------- the same scores as our own client's


async def test_the_numbers_are_those_that_our_client_gets_bit_for_bit(teacher: FakeTeacher) -> None:
    context, completion = np.asarray(PROMPT[:1]), np.asarray(PROMPT[1:])
    candidates = Candidates(np.arange(10), np.full(5, 2))
    async with TeacherClient(teacher.url) as client:
        for temperature in (1.0, 0.7):
            supports = (NoSupport(), TeacherTopK(4), candidates)
            asked = [SequenceToScore(context, completion, support) for support in supports]
            alone, top_k, chosen = await client.score(asked, temperature=temperature)
            body = completions_body(PROMPT, 0, temperature=temperature)
            (choice,) = (await answered(teacher, COMPLETIONS, body))["choices"]
            np.testing.assert_array_equal(realised_of(choice["prompt_logprobs"], PROMPT), alone.sampled_logprobs_T)

            body = completions_body(PROMPT, 4, temperature=temperature)
            (choice,) = (await answered(teacher, COMPLETIONS, body))["choices"]
            best = [
                [np.float32(row[str(token)]["logprob"]) for token in ids_K]
                for row, ids_K in zip(choice["prompt_logprobs"][1:], top_k.support_ids.reshape(5, 4), strict=True)
            ]
            np.testing.assert_array_equal(np.ravel(best), top_k.support_logprobs)

            body = edited(
                candidates_body(PROMPT, np.arange(10).reshape(5, 2).tolist(), 0),
                ["sampling_params", "temperature"],
                temperature,
            )
            scores_TK = numpy_of(await answered(teacher, GENERATE, body))
            np.testing.assert_array_equal(scores_TK.ravel(), chosen.support_logprobs)
