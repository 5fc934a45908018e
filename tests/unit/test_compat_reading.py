"""Other protocols' requests as they are read: what they ask, what is ignored, and what is refused by which name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from compat_requests import WAYS, Way, candidates_body, completions_body, edited, generate_body, sglang_body
from vopd_server.compat import sglang, vllm_generate
from vopd_server.compat.scoring import Asked, Read, Served, TokenTexts, requests_of, shapes_of
from vopd_server.compat.vllm_completions import read_completions
from vopd_server.errors import InvalidRequestError, UnknownModelError
from vopd_server.types import Candidates, NoSupport, TeacherTopK

VOCAB_SIZE, MAX_TOP_K = 300, 16
SERVED = Served("fake", "r1", VOCAB_SIZE, MAX_TOP_K, TokenTexts([b"a"]))
READ: dict[str, Read] = {
    "Completions": read_completions,
    "Generate": vllm_generate.read_generate,
    "SglangGenerate": sglang.read_generate,
}
PROMPT = [17, 289, 204, 3, 100, 5]

each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.method)
several_prompts = pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=lambda way: way.method)


def asked_by(way: Way, body: dict[str, Any]) -> Asked:
    return READ[way.method](json.dumps(body).encode(), SERVED)[0]


def refusal(way: Way, body: object) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        READ[way.method](json.dumps(body).encode(), SERVED)
    assert len(str(refused.value)) < 400
    return refused.value


def param(way: Way, name: str) -> list[str]:
    """Where a sampling field stands."""
    if way.method == "SglangGenerate" and name == "max_tokens":
        name = "max_new_tokens"
    return [name] if way.method == "Completions" else ["sampling_params", name]


# ---------------------------------------------------------------- what is asked


@each_way
def test_a_prompt_is_scored_from_its_second_token_on(way: Way) -> None:
    asked = asked_by(way, way.body(PROMPT, 0.5))
    (request,), (shape,) = requests_of(asked, "r"), shapes_of(asked)
    assert (request.context_ids.tolist(), request.completion_ids.tolist()) == (PROMPT[:1], PROMPT[1:])
    assert (request.temperature, request.request_id) == (0.5, "r")
    assert (shape.field, shape.context_length, shape.completion_length) == (way.prompt_field, 1, 5)


@several_prompts
def test_several_prompts_are_as_many_sequences(way: Way) -> None:
    asked = asked_by(way, way.body(PROMPT, 1.0) | {way.prompt_field: [[1, 2], [3, 4, 5]]})
    assert [request.completion_ids.tolist() for request in requests_of(asked, "r")] == [[2], [4, 5]]
    assert [shape.field for shape in shapes_of(asked)] == [f"{way.prompt_field}[0]", f"{way.prompt_field}[1]"]


@pytest.mark.parametrize(
    ("way", "body"),
    [
        (WAYS[0], completions_body(PROMPT, 3)),
        (WAYS[1], generate_body(PROMPT, 3)),
        (WAYS[2], sglang_body(PROMPT, top_logprobs_num=3)),
    ],
    ids=lambda value: value.method if isinstance(value, Way) else "",
)
def test_k_asks_for_the_k_best_and_zero_for_the_realised_token_alone(way: Way, body: dict[str, Any]) -> None:
    assert asked_by(way, body).support == TeacherTopK(3)
    assert shapes_of(asked_by(way, body))[0].k == 3
    zero = edited(body, ["top_logprobs_num"] if way.method == "SglangGenerate" else param(way, "prompt_logprobs"), 0)
    assert asked_by(way, zero).support == NoSupport()


def test_padding_is_left_out_of_what_is_asked() -> None:
    asked = asked_by(WAYS[1], candidates_body(PROMPT, [[7, -1], [-1, -1], [8, 9]], 2))
    (request,), (shape,) = requests_of(asked, "r"), shapes_of(asked)
    assert (request.context_ids.tolist(), request.completion_ids.tolist()) == (PROMPT[:3], PROMPT[3:])
    assert isinstance(request.support, Candidates)
    assert (request.support.ids.tolist(), request.support.counts_T.tolist()) == ([7, 8, 9], [1, 0, 2])
    assert (shape.kind, shape.num_candidates) == ("candidates", 3)


@each_way
@pytest.mark.parametrize("sent", [0, -0.0, None, "left out"])
def test_temperature_zero_and_none_are_one(way: Way, sent: object) -> None:
    path = param(way, "temperature")
    body = edited(way.body(PROMPT, 1.0), path, sent)
    if sent == "left out":
        inner = body if len(path) == 1 else body["sampling_params"]
        del inner["temperature"]
    assert asked_by(way, body).temperature == 1.0


@each_way
def test_a_temperature_is_what_our_own_client_s_would_be_on_arrival(way: Way) -> None:
    assert asked_by(way, way.body(PROMPT, 0.7)).temperature == float(np.float32(0.7))


@each_way
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_one_token_more_than_none_may_be_asked_for(way: Way, max_tokens: int) -> None:
    asked_by(way, edited(way.body(PROMPT, 1.0), param(way, "max_tokens"), max_tokens))


HARMLESS_PARAMS: dict[str, object] = {
    "frequency_penalty": 0.0,
    "ignore_eos": True,
    "logit_bias": None,
    "min_p": 0,
    "n": 1,
    "repetition_penalty": 1.0,
    "seed": 7,
    "skip_special_tokens": False,
    "stop": ["</s>"],
    "top_k": -1,
    "top_p": 1.0,
}


@each_way
def test_a_real_client_s_fields_without_effect_do_not_break_it(way: Way) -> None:
    body = way.body(PROMPT, 1.0) | {"stream": False, "user": "me", "priority": 3, "lora_path": None}
    for name, value in HARMLESS_PARAMS.items():
        body = edited(body, param(way, name), value)
    assert asked_by(way, body).support == asked_by(way, way.body(PROMPT, 1.0)).support


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.method)
def test_another_model_is_not_found(way: Way) -> None:
    error = refusal(way, way.body(PROMPT, 1.0) | {"model": "gpt"})
    assert isinstance(error, UnknownModelError)
    assert str(error) == "model: 'gpt' is not served here; 'fake' is"
    asked_by(way, way.body(PROMPT, 1.0) | {"model": None})


@each_way
@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 16), ("max_tokens", None), ("n", 2), ("logprobs", 0), ("logprobs", 5)]
)
def test_generation_is_refused_and_what_there_is_instead_is_told(way: Way, name: str, value: object) -> None:
    path = param(way, name)
    error = refusal(way, edited(way.body(PROMPT, 1.0), path, value))
    assert error.field == ".".join(path)
    assert "this is a scoring service, which generates nothing: send" in str(error)


@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.method)
def test_a_request_that_asks_for_no_scores_is_told_how(way: Way) -> None:
    path = param(way, "prompt_logprobs")
    error = refusal(way, edited(way.body(PROMPT, 1.0), path, None))
    assert (error.field, "not sent: this is a scoring service" in str(error)) == (".".join(path), True)


@each_way
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.9),
        ("top_p", 0),
        ("top_k", 50),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("truncate_prompt_tokens", 3),
        ("nobody_knows_this", "x" * 1000),
        ("x" * 1000, 1),
    ],
)
def test_a_field_that_would_be_without_the_effect_it_promises_is_refused(way: Way, name: str, value: object) -> None:
    path = param(way, name)
    error = refusal(way, edited(way.body(PROMPT, 1.0), path, value))
    assert error.field.removesuffix("…") == ".".join(path)[: len(error.field.removesuffix("…"))]
    assert "leave it out" in str(error)


@each_way
@pytest.mark.parametrize(
    ("prompt", "where", "words"),
    [
        ([], "", "empty"),
        ([5], "", "one token; a token is scored given those before it: send at least two"),
        ([1, 300], "[1]", "300 is no id in [0, 300)"),
        ([1, -1], "[1]", "-1 is no id in [0, 300)"),
        ([1, 10**400], "[1]", "is no id in [0, 300)"),
        ([1, 2.0], "[1]", "2.0 is no id"),
        ([1, "2"], "[1]", "'2' is no id"),
        ([1, None], "[1]", "None is no id"),
        ([True, 2], "[0]", "True is no id"),
        ("Paris is", "", "'Paris is': text; this teacher reads token ids"),
        (None, "", "None: not a list of token ids"),
        ({"1": 2}, "", "not a list of token ids"),
    ],
)
def test_a_prompt_that_is_wrong_is_refused_by_the_name_of_its_entry(
    way: Way, prompt: object, where: str, words: str
) -> None:
    error = refusal(way, way.body(PROMPT, 1.0) | {way.prompt_field: prompt})
    assert error.field == way.prompt_field + where
    assert words in str(error)


@several_prompts
@pytest.mark.parametrize(
    ("prompts", "where", "words"),
    [
        ([[1, 2], [3]], "[1]", "one token"),
        ([[1, 2], []], "[1]", "empty"),
        ([[1, 2], 3], "[1]", "3: not a list of token ids"),
        ([[1, 2], [3, 300]], "[1][1]", "300 is no id"),
        (["Paris", "is"], "[0]", "'Paris': text; this teacher reads token ids"),
    ],
)
def test_one_wrong_prompt_of_several_is_named(way: Way, prompts: object, where: str, words: str) -> None:
    error = refusal(way, way.body(PROMPT, 1.0) | {way.prompt_field: prompts})
    assert error.field == way.prompt_field + where
    assert words in str(error)


@each_way
@pytest.mark.parametrize("k", [MAX_TOP_K + 1, 10**9])
def test_more_of_the_best_than_there_may_be_is_refused(way: Way, k: int) -> None:
    path = ["top_logprobs_num"] if way.method == "SglangGenerate" else param(way, "prompt_logprobs")
    error = refusal(way, edited(way.body(PROMPT, 1.0), path, k))
    assert (error.field, f"{k}; it must lie in [0, 16]" in str(error)) == (".".join(path), True)


IDS, START = "sampling_params.prompt_logprob_token_ids", "sampling_params.prompt_logprob_start"


@pytest.mark.parametrize(
    ("edit", "value", "field", "words"),
    [
        (IDS, [[1, 2]], IDS, "1 rows; 6 token_ids - 1 - prompt_logprob_start 3 = 2"),
        (IDS, [], IDS, "0 rows; 6 token_ids - 1 - prompt_logprob_start 3 = 2"),
        (START, 5, IDS, "2 rows; 6 token_ids - 1 - prompt_logprob_start 5 = 0, which is none to score"),
        (START, 500, IDS, "which is none to score"),
        (START, -1, START, "greater than or equal to 0"),
        (IDS, [[], []], IDS, "0 ids a row; it must lie in [1, 16]"),
        (IDS, [[1] * 17, [1]], IDS, "17 ids a row; it must lie in [1, 16]"),
        (IDS, [[1, 2], [3, VOCAB_SIZE]], f"{IDS}[1][1]", "300 is no id in [-1, 300)"),
        (IDS, [[1, -2], [3, 4]], f"{IDS}[0][1]", "-2 is no id in [-1, 300)"),
        (IDS, [[1, 2], [3, True]], f"{IDS}[1][1]", "True is no id"),
        (IDS, [1, 2], f"{IDS}[0]", "1: not a list of token ids"),
        (IDS, "12", IDS, "not a list of lists of token ids"),
        (IDS, None, "sampling_params.prompt_logprobs", "not sent: this is a scoring service"),
        ("sampling_params.prompt_logprobs", 1, IDS, "beside prompt_logprobs; send one of the two"),
    ],
)
def test_candidates_that_are_wrong_are_refused_by_vllm_s_names(
    edit: str, value: object, field: str, words: str
) -> None:
    error = refusal(WAYS[1], edited(candidates_body(PROMPT, [[1, 2], [3, 4]], 3), edit.split("."), value))
    assert (error.field, words in str(error)) == (field, True)


def test_a_start_without_ids_is_refused() -> None:
    error = refusal(WAYS[1], generate_body(PROMPT, prompt_logprob_start=2))
    assert str(error) == f"{START}: 2 without prompt_logprob_token_ids"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("return_logprob", False, "this is a scoring service"),
        ("return_logprob", None, "this is a scoring service"),
        ("logprob_start_len", -1, "asks for generated tokens only"),
        ("logprob_start_len", None, "asks for generated tokens only"),
        ("logprob_start_len", 5, "5; nothing is left to score after it in a prompt of 6 input_ids"),
        ("token_ids_logprob", [1, 2], "leave it out"),
        ("image_data", ["x"], "leave it out"),
        ("lora_path", "x", "leave it out"),
        ("sampling_params.regex", "a+", "leave it out"),
        ("sampling_params", [{}], "should be an object"),
        ("rid", ["a", "b"], "valid string"),
    ],
)
def test_what_sglang_can_and_this_cannot_is_refused(path: str, value: object, words: str) -> None:
    error = refusal(WAYS[2], edited(sglang_body(PROMPT), path.split("."), value))
    assert (error.field, words in str(error)) == (path, True)
