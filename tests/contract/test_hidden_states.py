"""Hidden states and the output head: what a client makes of the two is the distribution that the teacher scores with.

Whatever the engine and the way to ask, as in test_score_contract.py. The head is the file that the teacher itself
sends, and nothing here knows how it was made: it is read as teacher.proto lays it out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load

from teacher_process import RunningTeacher
from teachers import CONTEXTS, TRANSPORTS, Ask, Teacher, answers_or_refusal, random_completion
from vopd_proto import teacher_pb2 as pb
from wire_client import Answer, Question, RefusedError, WireClient, connect

Float64Array = npt.NDArray[np.float64]

CHUNK_BYTES = 2**20  # of a stream's answer, and of a piece of the head
BFLOAT16_EPS = 2**-7  # from 1 to the next number: rounding moves a number by half of it, relative


@dataclass(frozen=True)
class Head:
    """The file, as float64."""

    weight_VH: Float64Array
    bias_V: Float64Array | float
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype

    def logits_TV(self, hidden_TH: Any) -> Float64Array:
        logits_TV: Float64Array = (hidden_TH.astype(np.float64) @ self.weight_VH.T + self.bias_V) * self.logit_scale
        return logits_TV if self.softcap is None else self.softcap * np.tanh(logits_TV / self.softcap)

    def logprobs_TV(self, hidden_TH: Any, temperature: float) -> Float64Array:
        logits_TV = self.logits_TV(hidden_TH) / temperature
        shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
        logprobs_TV: Float64Array = shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))
        return logprobs_TV


def parsed_head(data: bytes) -> Head:
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load(data)
    assert set(tensors) <= {"weight", "bias"}
    assert set(metadata) <= {"logit_scale", "softcap"}
    return Head(
        weight_VH=tensors["weight"].double().numpy(),
        bias_V=tensors["bias"].double().numpy() if "bias" in tensors else 0.0,
        logit_scale=float(metadata["logit_scale"]),
        softcap=float(metadata["softcap"]) if "softcap" in metadata else None,
        dtype=tensors["weight"].dtype,
    )


def three_questions(length: int = 20) -> list[Question]:
    """One completion, asked in three ways at once."""
    completion = random_completion(length)
    candidates = [[token, 7, token, 258][: t % 5] for t, token in enumerate(completion)]
    return [
        Question(completion, hidden=True),
        Question(completion, k=17),
        Question(completion, candidates=candidates),
    ]


def assert_one_distribution(
    head: Head, questions: list[Question], answers: list[Answer], *, temperature: float, tolerance_nats: float
) -> None:
    """What the head makes of the hidden states is what the teacher says of its tokens, its top-k and candidates."""
    hidden, top_k, candidates = answers
    assert hidden.hidden_TH is not None
    logprobs_TV = head.logprobs_TV(hidden.hidden_TH, temperature)
    rows = np.arange(len(questions[0].completion))

    def close(teachers: Any, ours: Any) -> None:
        np.testing.assert_allclose(teachers, ours, atol=tolerance_nats, rtol=0)

    for answer in answers:
        close(answer.sampled_T, logprobs_TV[rows, list(questions[0].completion)])
    assert top_k.support is not None
    assert top_k.support_ids is not None
    close(top_k.support, np.take_along_axis(logprobs_TV, top_k.support_ids, axis=1))
    close(top_k.support, -np.sort(-logprobs_TV, axis=1)[:, :17])
    assert questions[2].candidates is not None
    asked = [logprobs_TV[t, token] for t, row in enumerate(questions[2].candidates) for token in row]
    close(candidates.support, asked)
    assert [answer.hidden_TH is None for answer in answers] == [False, True, True]
    assert hidden.support is None


def what_it_needs(teacher: Teacher, temperature: float) -> str:
    """What a teacher that cannot answer says it lacks: a temperature is looked at first."""
    return "hidden_states" if temperature == 1 or teacher.has("temperature") else "temperature"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
async def test_through_the_head_they_are_the_distribution_that_the_teacher_scores_with(
    teacher: Teacher, ask: Ask, temperature: float
) -> None:
    questions = three_questions()
    if not teacher.has("hidden_states"):
        asking = ask(CONTEXTS, questions[:1], temperature=temperature)
        assert await answers_or_refusal(teacher, asking, what_it_needs(teacher, temperature)) == []
        return
    answers = await ask(CONTEXTS, questions, temperature=temperature)
    head = parsed_head(await teacher.client.head())
    assert_one_distribution(
        head, questions, answers, temperature=temperature, tolerance_nats=min(teacher.tolerance_nats, 1e-3)
    )
    hidden_TH = answers[0].hidden_TH
    assert hidden_TH is not None
    assert head.weight_VH.shape == (teacher.vocab_size, hidden_TH.shape[1])
    whole_TV = head.logprobs_TV(hidden_TH, temperature)
    expected_TV = teacher.expected_TV(questions[0], temperature)
    np.testing.assert_allclose(whole_TV, expected_TV, atol=teacher.tolerance_nats, rtol=0)


async def test_they_mix_with_every_support_and_every_context_in_one_request(teacher: Teacher, ask: Ask) -> None:
    lengths = (3, 17, 1, 40, 17)
    questions = [
        Question(random_completion(length, seed=seed), context=2, hidden=seed % 2 == 0, k=None if seed % 2 == 0 else 3)
        for seed, length in enumerate(lengths)
    ]
    questions += [Question(random_completion(9), context=0, hidden=True), Question(random_completion(9), context=1)]
    for question, answer in zip(
        questions, await answers_or_refusal(teacher, ask(CONTEXTS, questions), "hidden_states"), strict=False
    ):
        expected_TV = teacher.expected_TV(question)
        rows = np.arange(len(question.completion))
        sampled_T = expected_TV[rows, list(question.completion)]
        np.testing.assert_allclose(answer.sampled_T, sampled_T, atol=teacher.tolerance_nats, rtol=0)
        assert (answer.hidden_TH is not None) == question.hidden
        if answer.hidden_TH is not None:
            head = parsed_head(await teacher.client.head())
            whole_TV = head.logprobs_TV(answer.hidden_TH, 1.0)
            np.testing.assert_allclose(whole_TV, expected_TV, atol=teacher.tolerance_nats, rtol=0)


async def test_an_empty_completion_has_none_of_them(teacher: Teacher, ask: Ask) -> None:
    asking = ask(CONTEXTS, [Question([], hidden=True)])
    for answer in await answers_or_refusal(teacher, asking, "hidden_states"):
        assert answer.hidden_TH is not None
        assert (len(answer.hidden_TH), len(answer.sampled_T), answer.support) == (0, 0, None)


async def test_a_long_answer_of_a_stream_comes_in_chunks_of_a_megabyte_and_whole(teacher: Teacher) -> None:
    length = min(16_384, teacher.max_context_length - len(CONTEXTS[0]))
    question = Question(random_completion(length), hidden=True)
    asking = teacher.client.score_stream(CONTEXTS, [question])
    for answer in await answers_or_refusal(teacher, asking, "hidden_states"):
        assert answer.hidden_TH is not None
        row_bytes = 4 * (1 + answer.hidden_TH.shape[1])
        assert answer.num_chunks == math.ceil(length / (CHUNK_BYTES // row_bytes))
        (at_once,) = await teacher.client.score(CONTEXTS, [question])
        np.testing.assert_allclose(answer.hidden_TH, at_once.hidden_TH, atol=1e-5, rtol=0)
        head = parsed_head(await teacher.client.head())
        last = slice(length - 50, length)
        ours_TV = head.logprobs_TV(answer.hidden_TH[last], 1.0)
        sampled_T = ours_TV[np.arange(50), question.completion[last]]
        np.testing.assert_allclose(answer.sampled_T[last], sampled_T, atol=teacher.tolerance_nats, rtol=0)


@pytest.mark.parametrize(("float_type", "relative"), [(pb.FLOAT16, 2**-11), (pb.BFLOAT16, BFLOAT16_EPS / 2)])
@pytest.mark.parametrize("transport", ["Score", "ScoreStream", "HTTP protobuf"])
async def test_of_a_float32_model_they_travel_as_they_are_asked_for(
    teacher: Teacher, transport: str, float_type: int, relative: float
) -> None:
    question = Question(random_completion(30), hidden=True)
    way = TRANSPORTS[transport]
    asking = way(teacher.client, CONTEXTS, [question], float_type=float_type)
    for answer in await answers_or_refusal(teacher, asking, "hidden_states"):
        assert answer.hidden_types == answer.float_types == {float_type}
        (wide,) = await way(teacher.client, CONTEXTS, [question])
        assert wide.hidden_types == {pb.FLOAT32}
        # 2^-24: half of the smallest float16, below which nothing is relative.
        np.testing.assert_allclose(answer.hidden_TH, wide.hidden_TH, rtol=relative, atol=2**-24 + 1e-5)
        assert not np.array_equal(answer.hidden_TH, wide.hidden_TH)


# ---------------------------------------------------------------- the file


async def test_the_head_comes_whole_and_with_its_checksum_both_ways(teacher: Teacher) -> None:
    info = await teacher.client.info()
    if not teacher.has("hidden_states"):
        assert info.head_sha256 == ""
        return
    data = await teacher.client.head()
    response = await teacher.client.head_http()
    assert response.content == data
    assert hashlib.sha256(data).hexdigest() == info.head_sha256
    assert response.headers["etag"] == f'"{info.head_sha256}"'
    assert int(response.headers["content-length"]) == len(data)
    held = await teacher.client.head_http(If_None_Match=response.headers["etag"])
    assert (held.status_code, held.content, held.headers["etag"]) == (304, b"", response.headers["etag"])


@pytest.mark.parametrize("fetch", [WireClient.head, WireClient.head_http])
async def test_a_teacher_without_a_head_to_give_names_what_it_has(teacher: Teacher, fetch: Any) -> None:
    if teacher.has("hidden_states"):
        assert await fetch(teacher.client)
        return
    with pytest.raises(RefusedError) as refused:
        await fetch(teacher.client)
    assert refused.value.refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    has = ", ".join(sorted(teacher.supports))
    assert refused.value.refusal.message.endswith(
        f"does not give away the model's output head, since it has no hidden_states support; it has {has}"
    )


# ---------------------------------------------------------------- 16 bits


@pytest.fixture
async def bfloat16_client(tiny_bfloat16_process: RunningTeacher) -> AsyncIterator[WireClient]:
    async with connect(tiny_bfloat16_process.url, tiny_bfloat16_process.http_url) as client:
        yield client


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_of_a_bfloat16_model_too_they_are_the_distribution_that_it_scores_with(
    bfloat16_client: WireClient, transport: str, temperature: float
) -> None:
    """The head's product is rounded by the model to bfloat16 and here not at all.

    That moves a logit by at most half of eps times the largest logit, and so a log-probability, the difference
    between a logit and the logarithm of a sum of exponentials of logits, by at most twice as much; the temperature
    divides it. Beside it stands the rounding of float32, as in a float32 model.

    The teacher is deterministic: the three sequences have the same hidden states, whichever share a forward.
    """
    questions = three_questions()
    answers = await TRANSPORTS[transport](bfloat16_client, CONTEXTS, questions, temperature=temperature)
    head = parsed_head(await bfloat16_client.head())
    assert head.dtype == torch.bfloat16
    hidden_TH = answers[0].hidden_TH
    assert hidden_TH is not None
    assert torch.equal(torch.tensor(hidden_TH).bfloat16().float(), torch.tensor(hidden_TH)), "no bit was lost"
    largest_logit = np.abs(head.logits_TV(hidden_TH)).max()
    rounding_nats = BFLOAT16_EPS * largest_logit / temperature
    assert rounding_nats < 0.2, "or the comparison would show nothing"
    assert_one_distribution(head, questions, answers, temperature=temperature, tolerance_nats=rounding_nats + 1e-4)


@pytest.mark.parametrize("float_type", [pb.FLOAT_TYPE_UNSPECIFIED, pb.FLOAT32, pb.FLOAT16, pb.BFLOAT16])
@pytest.mark.parametrize("transport", ["Score", "ScoreStream", "HTTP protobuf"])
async def test_of_a_bfloat16_model_they_travel_in_16_bits_whatever_is_asked_for(
    bfloat16_client: WireClient, transport: str, float_type: int
) -> None:
    question = Question(random_completion(30), hidden=True)
    (answer,) = await TRANSPORTS[transport](bfloat16_client, CONTEXTS, [question], float_type=float_type)
    assert answer.hidden_types == {pb.BFLOAT16}
    assert answer.float_types == {float_type or pb.FLOAT32}
