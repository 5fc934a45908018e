"""What every teacher answers, whichever engine computes it and whichever way it is asked.

`TEACHERS` and `TRANSPORTS` are the two axes: a new engine is one more function that yields an address and a
reference to compare with, a new transport one more function from questions to answers. The reference is
computed in the test: the fake engine's formula, or a plain one-sequence transformers forward in fp32.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fake_engine import FAKE_VOCAB_SIZE, FakeEngine, fake_logprobs_TV
from fake_server import fake_teacher
from teacher_process import RunningTeacher, start_teacher
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import Float32Array
from vopd_proto.fingerprint import tokenizer_fingerprint
from wire_client import Answer, Question, WireClient, connect, score_request, stream_settings

TOLERANCE_NATS = 1e-4
CONTEXTS = [[65, 66, 67, 68], [200], list(range(1, 120))]

Reference = Callable[[Sequence[int], Sequence[int], float], Float32Array]
Ask = Callable[..., Awaitable[list[Answer]]]


@dataclass(frozen=True)
class Teacher:
    """A teacher to ask, and what it should answer: reference(context, completion, temperature) is [T, V]."""

    client: WireClient
    reference: Reference
    vocab_size: int

    def expected_TV(self, question: Question, temperature: float = 1.0) -> Float32Array:
        return self.reference(CONTEXTS[question.context], question.completion, temperature)


# ---------------------------------------------------------------- the axes


def fake_reference(context: Sequence[int], completion: Sequence[int], temperature: float) -> Float32Array:
    return fake_logprobs_TV(np.asarray(context, np.int64), np.asarray(completion, np.int64), temperature=temperature)


@cache
def forward_logits_SV(model: torch.nn.Module, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Of one unpadded forward, once for all transports."""
    with torch.inference_mode():
        logits_SV: torch.Tensor = model(input_ids=torch.tensor([token_ids])).logits[0].float()
    return logits_SV


def forward_reference(
    model: torch.nn.Module, context: Sequence[int], completion: Sequence[int], temperature: float
) -> Float32Array:
    """Row t from the logits at position C - 1 + t."""
    logits_SV = forward_logits_SV(model, (*context, *completion))
    rows = slice(len(context) - 1, len(context) - 1 + len(completion))
    logprobs_TV: Float32Array = torch.log_softmax(logits_SV[rows] / temperature, dim=-1).numpy()
    return logprobs_TV


async def fake_engine_in_process(stack: AsyncExitStack, _request: pytest.FixtureRequest) -> Teacher:
    running = await stack.enter_async_context(fake_teacher(FakeEngine()))
    return Teacher(running.client, fake_reference, FAKE_VOCAB_SIZE)


async def transformers_process(stack: AsyncExitStack, request: pytest.FixtureRequest) -> Teacher:
    process: RunningTeacher = request.getfixturevalue("tiny_process")
    model: torch.nn.Module = request.getfixturevalue("tiny_reference_model")
    client = await stack.enter_async_context(connect(process.url))
    return Teacher(client, partial(forward_reference, model), model.config.vocab_size)


TEACHERS = [fake_engine_in_process, transformers_process]
TRANSPORTS = {"Score": WireClient.score, "ScoreStream": WireClient.score_stream}


@pytest.fixture(scope="module")
def tiny_process(tiny_model_dir: Path) -> Iterator[RunningTeacher]:
    with start_teacher(tiny_model_dir, "--dtype", "float32", "--device", "cpu") as process:
        yield process


@pytest.fixture(scope="module")
def tiny_reference_model(tiny_model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(params=TEACHERS, ids=lambda make: make.__name__)
async def teacher(request: pytest.FixtureRequest) -> AsyncIterator[Teacher]:
    async with AsyncExitStack() as stack:
        yield await request.param(stack, request)


@pytest.fixture(params=TRANSPORTS)
def ask(request: pytest.FixtureRequest, teacher: Teacher) -> Ask:
    return partial(TRANSPORTS[request.param], teacher.client)


# ---------------------------------------------------------------- what is answered


def completion(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, length)]


def assert_sampled(answer: Answer, question: Question, expected_TV: Float32Array) -> None:
    rows = np.arange(len(question.completion))
    np.testing.assert_allclose(
        answer.sampled_T, expected_TV[rows, list(question.completion)], atol=TOLERANCE_NATS, rtol=0
    )


async def test_sampled_logprobs_are_those_of_a_plain_forward(teacher: Teacher, ask: Ask) -> None:
    question = Question(completion(50), name="q")
    (answer,) = await ask(CONTEXTS, [question])
    assert_sampled(answer, question, teacher.expected_TV(question))
    assert (answer.name, answer.support, answer.support_ids) == ("q", None, None)
    assert answer.float_types == {pb.FLOAT32}


async def test_one_token_is_scored_from_the_last_context_row(teacher: Teacher, ask: Ask) -> None:
    questions = [Question([7], context=index) for index in range(len(CONTEXTS))]
    for question, answer in zip(questions, await ask(CONTEXTS, questions), strict=True):
        assert_sampled(answer, question, teacher.expected_TV(question))


async def test_the_teachers_top_k_comes_most_likely_first(teacher: Teacher, ask: Ask) -> None:
    question = Question(completion(20), k=9)
    (answer,) = await ask(CONTEXTS, [question])
    expected_TV = teacher.expected_TV(question)
    assert answer.support is not None
    assert answer.support_ids is not None
    best_TK = -np.sort(-expected_TV, axis=1)[:, :9]
    np.testing.assert_allclose(answer.support, best_TK, atol=TOLERANCE_NATS, rtol=0)
    at_ids_TK = np.take_along_axis(expected_TV, answer.support_ids, axis=1)
    np.testing.assert_allclose(answer.support, at_ids_TK, atol=TOLERANCE_NATS, rtol=0)
    assert all(len(set(row)) == 9 for row in answer.support_ids.tolist())
    assert_sampled(answer, question, expected_TV)


async def test_the_whole_vocabulary_is_a_distribution(teacher: Teacher, ask: Ask) -> None:
    (answer,) = await ask(CONTEXTS, [Question(completion(4), k=teacher.vocab_size)])
    assert answer.support is not None
    np.testing.assert_allclose(np.exp(answer.support.astype(np.float64)).sum(axis=1), 1, atol=1e-5)


async def test_ragged_candidates_are_scored_as_they_come(teacher: Teacher, ask: Ask) -> None:
    rows = [[5], [], [9, 9, 3, teacher.vocab_size - 1], [], [0, 1]]
    question = Question(completion(5), candidates=rows)
    (answer,) = await ask(CONTEXTS, [question])
    expected_TV = teacher.expected_TV(question)
    expected = [expected_TV[t, candidate] for t, row in enumerate(rows) for candidate in row]
    assert answer.support is not None
    np.testing.assert_allclose(answer.support, expected, atol=TOLERANCE_NATS, rtol=0)
    assert answer.support_ids is None, "candidates are not sent back"
    assert_sampled(answer, question, expected_TV)


@pytest.mark.parametrize("temperature", [0.5, 2.5])
async def test_logits_are_divided_by_the_temperature(teacher: Teacher, ask: Ask, temperature: float) -> None:
    question = Question(completion(12), k=3)
    (answer,) = await ask(CONTEXTS, [question], temperature=temperature)
    expected_TV = teacher.expected_TV(question, temperature)
    assert_sampled(answer, question, expected_TV)
    assert answer.support is not None
    np.testing.assert_allclose(answer.support, -np.sort(-expected_TV, axis=1)[:, :3], atol=TOLERANCE_NATS, rtol=0)
    assert np.abs(expected_TV - teacher.expected_TV(question)).max() > 0.1


@pytest.mark.parametrize(("float_type", "relative"), [(pb.FLOAT16, 2**-11), (pb.BFLOAT16, 2**-8)])
async def test_narrow_floats_round_the_answer_and_nothing_else(
    teacher: Teacher, ask: Ask, float_type: int, relative: float
) -> None:
    question = Question(completion(30), candidates=[[1, 2]] * 30)
    (answer,) = await ask(CONTEXTS, [question], float_type=float_type)
    expected_TV = teacher.expected_TV(question)
    expected = expected_TV[np.arange(30), list(question.completion)]
    np.testing.assert_allclose(answer.sampled_T, expected, atol=TOLERANCE_NATS, rtol=relative)
    assert answer.support is not None
    np.testing.assert_allclose(answer.support, expected_TV[:, [1, 2]].reshape(-1), atol=TOLERANCE_NATS, rtol=relative)
    assert answer.float_types == {float_type}


async def test_a_context_shared_by_several_completions_gives_each_its_own_scores(teacher: Teacher, ask: Ask) -> None:
    questions = [Question(completion(length, seed=length), context=2) for length in (3, 17, 1, 40, 17)]
    questions += [Question(completion(9), context=0), Question(completion(9), context=2)]
    for question, answer in zip(questions, await ask(CONTEXTS, questions), strict=True):
        assert_sampled(answer, question, teacher.expected_TV(question))


async def test_an_empty_completion_has_an_empty_answer(teacher: Teacher, ask: Ask) -> None:
    questions = [Question([]), Question([], k=4), Question([], candidates=[]), Question([3])]
    sampled, top_k, candidates, other = await ask(CONTEXTS, questions)
    assert [len(answer.sampled_T) for answer in (sampled, top_k, candidates)] == [0, 0, 0]
    assert top_k.support is not None
    assert top_k.support.shape == (0, 4)
    assert candidates.support is not None
    assert candidates.support.shape == (0,)
    assert_sampled(other, questions[3], teacher.expected_TV(questions[3]))


async def test_supports_of_all_kinds_mix_in_one_request(teacher: Teacher, ask: Ask) -> None:
    questions = [
        Question(completion(6, seed=1), name="same"),
        Question(completion(6, seed=2), k=2, name="same"),
        Question(completion(6, seed=3), candidates=[[4], [5], [6], [7], [8], [9]], context=1, name="same"),
    ]
    answers = await ask(CONTEXTS, questions)
    for question, answer in zip(questions, answers, strict=True):
        assert_sampled(answer, question, teacher.expected_TV(question))
        assert answer.name == "same", "an id need not be unique"
    assert [None if answer.support is None else answer.support.size for answer in answers] == [None, 12, 6]


async def test_sixteen_thousand_tokens_with_a_hundred_dense_candidates_pass(teacher: Teacher, ask: Ask) -> None:
    length = 16_384
    candidates = [[(7 * t + j) % 256 for j in range(100)] for t in range(length)]
    question = Question(completion(length), candidates=candidates)
    (answer,) = await ask(CONTEXTS, [question])
    expected_TV = teacher.expected_TV(question)
    assert_sampled(answer, question, expected_TV)
    assert answer.support is not None
    expected = np.take_along_axis(expected_TV, np.asarray(candidates), axis=1).reshape(-1)
    np.testing.assert_allclose(answer.support, expected, atol=TOLERANCE_NATS, rtol=0)


async def test_messages_far_over_the_default_limit_of_grpc_pass_both_ways(teacher: Teacher) -> None:
    length = 4096
    request = score_request(CONTEXTS, [Question([1] * length, candidates=[[1] * 400] * length)])
    wide = np.ones(length * 400, "<u4").tobytes()
    request.sequences[0].candidates.ids.CopyFrom(pb.UIntArray(bytes_per_item=4, data=wide))
    assert request.ByteSize() > 6 * 2**20
    response = await teacher.client.send_score(request)
    assert response.ByteSize() > 6 * 2**20


async def test_a_large_answer_of_a_stream_comes_in_chunks_of_a_megabyte(teacher: Teacher) -> None:
    (answer,) = await teacher.client.score_stream(CONTEXTS, [Question([1] * 4096, candidates=[[1] * 200] * 4096)])
    assert answer.num_chunks == 4  # 4096 x 201 x 4 bytes in chunks of at most 2**20


async def test_both_ways_to_ask_name_the_revision_of_the_weights(teacher: Teacher) -> None:
    info = await teacher.client.info()
    response = await teacher.client.send_score(score_request(CONTEXTS, [Question([1])]))
    stream = teacher.client.stream()
    await stream.write(stream_settings())
    opened = (await stream.read()).opened
    await stream.done_writing()
    assert info.model_revision == response.model_revision == opened.model_revision != ""
    assert response.request_id != opened.request_id != ""


async def test_the_tokenizer_is_told_as_the_handshake_needs_it(teacher: Teacher) -> None:
    info = await teacher.client.info()
    table = await teacher.client.unary("GetTokenizer", pb.GetTokenizerRequest(), pb.GetTokenizerResponse)
    assert info.tokenizer.fingerprint == tokenizer_fingerprint(table.tokens)
    assert info.tokenizer.num_ids == len(table.tokens) <= info.vocab_size == teacher.vocab_size
    assert list(info.tokenizer.end_ids)
    assert info.chat_template
    assert info.supports.sampled
    assert info.limits.max_message_bytes == 64 * 2**20
