"""What every teacher answers, whichever engine computes it and whichever way it is asked.

The two axes are `teachers.TEACHERS` and `teachers.TRANSPORTS`: a new engine is one more function that yields an
address and a reference to compare with, a new transport one more function from questions to answers. What an engine
does not have it must refuse, naming what it has.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from teachers import CONTEXTS, TRANSPORTS, Ask, Teacher, answers_or_refusal, random_completion
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import Float32Array
from vopd_proto.fingerprint import tokenizer_fingerprint
from wire_client import (
    JSON,
    PROTOBUF,
    Answer,
    Question,
    WireClient,
    checked_response,
    score_request,
    stream_settings,
)

CHUNK_BYTES = 2**20  # of a stream's answer


# ---------------------------------------------------------------- what is answered


def assert_sampled(teacher: Teacher, answer: Answer, question: Question, expected_TV: Float32Array) -> None:
    rows = np.arange(len(question.completion))
    np.testing.assert_allclose(
        answer.sampled_T, expected_TV[rows, list(question.completion)], atol=teacher.tolerance_nats, rtol=0
    )


async def test_sampled_logprobs_are_those_of_a_plain_forward(teacher: Teacher, ask: Ask) -> None:
    question = Question(random_completion(50), name="q")
    (answer,) = await ask(CONTEXTS, [question])
    assert_sampled(teacher, answer, question, teacher.expected_TV(question))
    assert (answer.name, answer.support, answer.support_ids) == ("q", None, None)
    assert answer.float_types == {pb.FLOAT32}


async def test_one_token_is_scored_from_the_last_context_row(teacher: Teacher, ask: Ask) -> None:
    questions = [Question([7], context=index) for index in range(len(CONTEXTS))]
    for question, answer in zip(questions, await ask(CONTEXTS, questions), strict=True):
        assert_sampled(teacher, answer, question, teacher.expected_TV(question))


async def test_the_teachers_top_k_comes_most_likely_first(teacher: Teacher, ask: Ask) -> None:
    question = Question(random_completion(20), k=9)
    (answer,) = await ask(CONTEXTS, [question])
    expected_TV = teacher.expected_TV(question)
    assert answer.support is not None
    assert answer.support_ids is not None
    best_TK = -np.sort(-expected_TV, axis=1)[:, :9]
    np.testing.assert_allclose(answer.support, best_TK, atol=teacher.tolerance_nats, rtol=0)
    at_ids_TK = np.take_along_axis(expected_TV, answer.support_ids, axis=1)
    np.testing.assert_allclose(answer.support, at_ids_TK, atol=teacher.tolerance_nats, rtol=0)
    assert all(len(set(row)) == 9 for row in answer.support_ids.tolist())
    assert_sampled(teacher, answer, question, expected_TV)


async def test_the_whole_vocabulary_is_a_distribution(teacher: Teacher, ask: Ask) -> None:
    (answer,) = await ask(CONTEXTS, [Question(random_completion(4), k=teacher.vocab_size)])
    assert answer.support is not None
    np.testing.assert_allclose(np.exp(answer.support.astype(np.float64)).sum(axis=1), 1, atol=teacher.tolerance_nats)


async def test_ragged_candidates_are_scored_as_they_come(teacher: Teacher, ask: Ask) -> None:
    rows = [[5], [], [9, 9, 3, teacher.vocab_size - 1], [], [0, 1]]
    question = Question(random_completion(5), candidates=rows)
    for answer in await answers_or_refusal(teacher, ask(CONTEXTS, [question]), "candidates"):
        assert_ragged(teacher, answer, question, rows)


async def test_a_trajectory_is_scored_with_no_candidates_at_what_a_tool_wrote(teacher: Teacher, ask: Ask) -> None:
    """Two turns of the student with 40 tokens between them, and a third that follows at once."""
    sampled, between = [[3, 4], [5], [6, 7, 8]], [[]] * 40
    rows = [*sampled, *between, *sampled, *between[:1], [9]]
    question = Question(random_completion(len(rows)), candidates=rows)
    for answer in await answers_or_refusal(teacher, ask(CONTEXTS, [question]), "candidates"):
        assert_ragged(teacher, answer, question, rows)


def assert_ragged(teacher: Teacher, answer: Answer, question: Question, rows: list[list[int]]) -> None:
    expected_TV = teacher.expected_TV(question)
    expected = [expected_TV[t, candidate] for t, row in enumerate(rows) for candidate in row]
    assert answer.support is not None
    np.testing.assert_allclose(answer.support, expected, atol=teacher.tolerance_nats, rtol=0)
    assert answer.support_ids is None, "candidates are not sent back"
    assert_sampled(teacher, answer, question, expected_TV)


@pytest.mark.parametrize("temperature", [0.5, 2.5])
async def test_logits_are_divided_by_the_temperature(teacher: Teacher, ask: Ask, temperature: float) -> None:
    question = Question(random_completion(12), k=3)
    asking = ask(CONTEXTS, [question], temperature=temperature)
    expected_TV = teacher.expected_TV(question, temperature)
    for answer in await answers_or_refusal(teacher, asking, "temperature"):
        assert_sampled(teacher, answer, question, expected_TV)
        best_TK = -np.sort(-expected_TV, axis=1)[:, :3]
        assert answer.support is not None
        np.testing.assert_allclose(answer.support, best_TK, atol=teacher.tolerance_nats, rtol=0)
    assert np.abs(expected_TV - teacher.expected_TV(question)).max() > 0.1


@pytest.mark.parametrize(("float_type", "relative"), [(pb.FLOAT16, 2**-11), (pb.BFLOAT16, 2**-8)])
@pytest.mark.parametrize("transport", ["Score", "ScoreStream", "HTTP protobuf"])
async def test_narrow_floats_round_the_answer_and_nothing_else(
    teacher: Teacher, transport: str, float_type: int, relative: float
) -> None:
    question = Question(random_completion(30), k=2)
    (answer,) = await TRANSPORTS[transport](teacher.client, CONTEXTS, [question], float_type=float_type)
    expected_TV = teacher.expected_TV(question)
    expected = expected_TV[np.arange(30), list(question.completion)]
    np.testing.assert_allclose(answer.sampled_T, expected, atol=teacher.tolerance_nats, rtol=relative)
    best_TK = -np.sort(-expected_TV, axis=1)[:, :2]
    assert answer.support is not None
    np.testing.assert_allclose(answer.support, best_TK, atol=teacher.tolerance_nats, rtol=relative)
    assert answer.float_types == {float_type}


async def test_a_context_shared_by_several_completions_gives_each_its_own_scores(teacher: Teacher, ask: Ask) -> None:
    questions = [Question(random_completion(length, seed=length), context=2) for length in (3, 17, 1, 40, 17)]
    questions += [Question(random_completion(9), context=0), Question(random_completion(9), context=2)]
    for question, answer in zip(questions, await ask(CONTEXTS, questions), strict=True):
        assert_sampled(teacher, answer, question, teacher.expected_TV(question))


async def test_an_empty_completion_has_an_empty_answer(teacher: Teacher, ask: Ask) -> None:
    questions = [Question([]), Question([], k=4), Question([3])]
    sampled, top_k, other = await ask(CONTEXTS, questions)
    assert (len(sampled.sampled_T), sampled.support) == (0, None)
    assert top_k.support is not None
    assert top_k.support_ids is not None
    assert (len(top_k.sampled_T), len(top_k.support), len(top_k.support_ids)) == (0, 0, 0)
    assert_sampled(teacher, other, questions[2], teacher.expected_TV(questions[2]))
    empty = Question([], candidates=[])
    for candidates in await answers_or_refusal(teacher, ask(CONTEXTS, [empty]), "candidates"):
        assert candidates.support is not None
        assert candidates.support.shape == candidates.sampled_T.shape == (0,)


async def test_supports_of_all_kinds_mix_in_one_request(teacher: Teacher, ask: Ask) -> None:
    candidates = [[4], [5], [6], [7], [8], [9]] if teacher.has("candidates") else None
    questions = [
        Question(random_completion(6, seed=1), name="same"),
        Question(random_completion(6, seed=2), k=2, name="same"),
        Question(random_completion(6, seed=3), candidates=candidates, context=1, name="same"),
    ]
    answers = await ask(CONTEXTS, questions)
    for question, answer in zip(questions, answers, strict=True):
        assert_sampled(teacher, answer, question, teacher.expected_TV(question))
        assert answer.name == "same", "an id need not be unique"
    assert [None if answer.support is None else answer.support.size for answer in answers] == [
        None,
        12,
        6 if candidates else None,
    ]


async def test_sixteen_thousand_tokens_with_a_hundred_dense_candidates_pass(teacher: Teacher, ask: Ask) -> None:
    """Or as many tokens as the teacher takes; its own top-k where it has no candidates."""
    length = min(16_384, teacher.max_context_length - len(CONTEXTS[0]))
    ids = [[(7 * t + j) % 256 for j in range(100)] for t in range(length)]
    candidates = ids if teacher.has("candidates") else None
    question = Question(random_completion(length), candidates=candidates, k=None if candidates else 100)
    (answer,) = await ask(CONTEXTS, [question])
    expected_TV = teacher.expected_TV(question)
    assert_sampled(teacher, answer, question, expected_TV)
    expected_TK = np.take_along_axis(expected_TV, np.asarray(ids), axis=1) if candidates else -np.sort(-expected_TV)
    assert answer.support is not None
    expected = expected_TK[:, :100].reshape(-1)
    np.testing.assert_allclose(answer.support.reshape(-1), expected, atol=teacher.tolerance_nats, rtol=0)


@pytest.mark.parametrize("send", [WireClient.send_score, WireClient.post_score])
async def test_messages_far_over_the_default_limit_of_grpc_pass_both_ways(
    teacher: Teacher, send: Callable[..., Awaitable[pb.ScoreResponse]]
) -> None:
    """4 MiB is that limit. Several completions where one cannot be so long; of top-k the answer alone is large."""
    length = min(4096, teacher.max_context_length - len(CONTEXTS[0]))
    has_candidates = teacher.has("candidates")
    width = 400 if has_candidates else 1000
    question = Question(
        [1] * length,
        candidates=[[1] * width] * length if has_candidates else None,
        k=None if has_candidates else width,
    )
    num_ids = 7 * 2**18 if has_candidates else 10**6  # 4 bytes an id each way; 4 a score and 2 an id one way
    request = score_request(CONTEXTS, [question] * math.ceil(num_ids / (length * width)))
    for sequence in request.sequences if has_candidates else ():
        wide = np.ones(length * width, "<u4").tobytes()
        sequence.candidates.ids.CopyFrom(pb.UIntArray(bytes_per_item=4, data=wide))
    assert request.ByteSize() > 6 * 2**20 or not has_candidates
    assert (await send(teacher.client, request)).ByteSize() > 5 * 2**20


async def test_a_large_answer_of_a_stream_comes_in_chunks_of_a_megabyte(teacher: Teacher) -> None:
    length = min(4096, teacher.max_context_length - len(CONTEXTS[0]))
    candidates = [[1] * 200] * length if teacher.has("candidates") else None
    question = Question([1] * length, candidates=candidates, k=None if candidates else 200)
    (answer,) = await teacher.client.score_stream(CONTEXTS, [question])
    row_bytes = 4 * 201 if candidates else 4 * 201 + 4 * 200
    assert answer.num_chunks == math.ceil(length / (CHUNK_BYTES // row_bytes))
    assert len(answer.sampled_T) == length


async def test_every_way_to_ask_names_the_revision_of_the_weights(teacher: Teacher) -> None:
    info = await teacher.client.info()
    request = score_request(CONTEXTS, [Question([1])])
    response = await teacher.client.send_score(request)
    posted = await teacher.client.post_score(request)
    stream = teacher.client.stream()
    await stream.write(stream_settings())
    opened = (await stream.read()).opened
    await stream.done_writing()
    revisions = {info.model_revision, response.model_revision, posted.model_revision, opened.model_revision}
    assert len(revisions) == 1
    assert "" not in revisions
    assert len({response.request_id, posted.request_id, opened.request_id, ""}) == 4


async def test_the_tokenizer_is_told_as_the_handshake_needs_it(teacher: Teacher) -> None:
    info = await teacher.client.info()
    table = await teacher.client.unary("GetTokenizer", pb.GetTokenizerRequest(), pb.GetTokenizerResponse)
    assert info.tokenizer.fingerprint == tokenizer_fingerprint(table.tokens)
    assert info.tokenizer.num_ids == len(table.tokens) <= info.vocab_size == teacher.vocab_size
    assert list(info.tokenizer.end_ids)
    assert info.chat_template
    assert info.supports.sampled
    assert info.limits.max_message_bytes == 64 * 2**20


async def test_http_tells_of_the_teacher_what_grpc_does(teacher: Teacher) -> None:
    info = await teacher.client.info()
    table = await teacher.client.unary("GetTokenizer", pb.GetTokenizerRequest(), pb.GetTokenizerResponse)
    http = teacher.client.http
    for path, message in (("/v1/info", info), ("/v1/tokenizer", table)):
        packed = checked_response(await http.get(path, headers={"Accept": PROTOBUF}), PROTOBUF)
        assert type(message).FromString(packed.content) == message
    told = checked_response(await http.get("/v1/info", headers={"Accept": f"text/html, {JSON};q=0.9"})).json()
    assert set(told) == {descriptor.name for descriptor in pb.GetInfoResponse.DESCRIPTOR.fields}
    assert (told["model_revision"], told["vocab_size"]) == (info.model_revision, info.vocab_size)
    assert set(told["supports"]) == teacher.supports
    assert told["limits"]["max_message_bytes"] == info.limits.max_message_bytes
    assert told["tokenizer"]["end_ids"] == list(info.tokenizer.end_ids)
    tokens = checked_response(await http.get("/v1/tokenizer")).json()["tokens"]
    assert tokens == [token.decode("utf-8", "replace") for token in table.tokens]
