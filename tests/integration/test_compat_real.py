"""Other trainers' requests to a real teacher in a process of its own: the numbers of our client, and of the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from compat_requests import WAYS, Way, candidates_body, completions_body, edited, numpy_of, sglang_body
from teacher_process import RunningTeacher, start_teacher
from teachers import TOLERANCE_NATS, forward_reference
from vopd_client.teacher import RemoteTeacher
from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK
from wire_client import checked_response

PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, 256, 24)]
NUM_ROWS = len(PROMPT) - 1
TEMPERATURES = [1.0, 0.7]


@pytest.fixture(scope="module")
def running(tiny_model_dir: Path) -> Iterator[RunningTeacher]:
    flags = ["--engine", "transformers", "--device", "cpu", "--dtype", "float32", "--deterministic"]
    with start_teacher(tiny_model_dir, *flags) as teacher:
        yield teacher


@pytest.fixture
def http(running: RunningTeacher) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=running.http_url, trust_env=False) as client:
        yield client


def answered(http: httpx2.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    served = http.get("/v1/models").json()["data"][0]["id"]
    if "model" in body:
        body = body | {"model": served}
    answer: dict[str, Any] = checked_response(http.post(path, json=body)).json()
    return answer


def our_scores(running: RunningTeacher, temperature: float, support: Any) -> SequenceScores:
    with RemoteTeacher.connect(running.url, temperature=temperature) as teacher:
        (scores,) = teacher.score([SequenceToScore(np.asarray(PROMPT[:1]), np.asarray(PROMPT[1:]), support)])
    return scores


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.method)
def test_realised_tokens_have_the_scores_of_our_client_and_of_a_plain_forward(
    running: RunningTeacher, http: httpx2.Client, tiny_model_dir: Path, way: Way, temperature: float
) -> None:
    body = way.body(PROMPT, temperature)
    if way.method == "Generate":
        body = edited(body, ["sampling_params", "prompt_logprobs"], 0)
    realised = way.realised(answered(http, way.path, body), PROMPT)
    np.testing.assert_array_equal(realised, our_scores(running, temperature, NoSupport()).sampled_logprobs_T)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    expected_TV = forward_reference(model, PROMPT[:1], PROMPT[1:], temperature)
    expected_T = expected_TV[np.arange(NUM_ROWS), PROMPT[1:]]
    np.testing.assert_allclose(realised, expected_T, atol=TOLERANCE_NATS, rtol=0)


def test_slime_s_response_has_the_scores_that_our_client_gets_for_it_after_its_prompt(
    running: RunningTeacher, http: httpx2.Client
) -> None:
    """Its last rows are the response's, one to one: shifted by a row they would differ by nats."""
    response_length = 9
    answer = answered(http, "/generate", sglang_body(PROMPT))
    kept = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]][-response_length:]
    context, response = np.split(np.asarray(PROMPT), [-response_length])
    with RemoteTeacher.connect(running.url) as teacher:
        (scores,) = teacher.score([SequenceToScore(context, response)])
    np.testing.assert_allclose(kept, scores.sampled_logprobs_T, atol=TOLERANCE_NATS, rtol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_best_are_those_of_our_client(running: RunningTeacher, http: httpx2.Client, temperature: float) -> None:
    ours = our_scores(running, temperature, TeacherTopK(8))
    answer = answered(http, "/v1/completions", completions_body([PROMPT], 8, temperature=temperature))
    rows = answer["choices"][0]["prompt_logprobs"][1:]
    best = [sorted(row.items(), key=lambda item: item[1]["rank"])[:8] for row in rows]  # as TRL does
    assert [int(token) for row in best for token, _ in row] == ours.support_ids.tolist()
    logprobs = np.asarray([entry["logprob"] for row in best for _, entry in row], np.float32)
    is_best = np.repeat(PROMPT[1:], 8) == ours.support_ids
    np.testing.assert_array_equal(logprobs[~is_best], ours.support_logprobs[~is_best])
    np.testing.assert_array_equal(
        [np.float32(row[str(token)]["logprob"]) for row, token in zip(rows, PROMPT[1:], strict=True)],
        ours.sampled_logprobs_T,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_candidates_have_the_scores_of_our_client(
    running: RunningTeacher, http: httpx2.Client, temperature: float
) -> None:
    ids_TK = np.random.default_rng(4).integers(0, 256, (NUM_ROWS, 3))
    ids_TK[::2, 2] = -1
    ids_TK[5] = -1
    is_id = ids_TK != -1
    ours = our_scores(running, temperature, Candidates(ids_TK[is_id], is_id.sum(axis=1)))
    body = edited(candidates_body(PROMPT, ids_TK.tolist(), 0), ["sampling_params", "temperature"], temperature)
    scores_TK = numpy_of(answered(http, "/inference/v1/generate", body))
    assert scores_TK.shape == (NUM_ROWS, 3)
    np.testing.assert_array_equal(scores_TK[is_id], ours.support_logprobs)
    assert np.isneginf(scores_TK[~is_id]).all()
