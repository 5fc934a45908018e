"""/openapi.json is true: schemathesis makes requests of all kinds from it and compares every answer with it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from fake_engine import FAKE_VOCAB_SIZE
from teacher_process import RunningTeacher, spawn

TEACHER = str(Path(__file__).parent.parent / "held_teacher.py")


@schemathesis.serializer("application/x-protobuf")
def as_bytes(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@pytest.fixture(scope="module")
def running() -> Any:
    with spawn([TEACHER, "head"]) as teacher:
        teacher.wait_until_ready()
        teacher.send_signal(signal.SIGUSR1)  # let go
        yield teacher
        teacher.terminate()  # not killed, so that the file of its head goes with it


@pytest.fixture(scope="module")
def api(running: RunningTeacher) -> Any:
    return schemathesis.openapi.from_url(f"{running.http_url}/openapi.json")


# A request can be well-formed and ask for an id that this model does not have. A deadline of a nanosecond is one.
EXCLUDED_CHECKS = [positive_data_acceptance, not_a_server_error]
PATHS = [
    ("GET", "/v1/info"),
    ("GET", "/v1/tokenizer"),
    ("GET", "/v1/head"),
    ("POST", "/v1/score"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/health"),
    ("GET", "/health_generate"),
    ("GET", "/v1/models"),
    ("GET", "/get_model_info"),
    ("POST", "/v1/completions"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/generate"),
]
HAVE_NOTHING_WRONG = ("/healthz", "/readyz", "/health", "/health_generate")


def test_every_path_is_tried_below(api: Any) -> None:
    assert {(operation.ok().method.upper(), operation.ok().path) for operation in api.get_all_operations()} == set(
        PATHS
    )


def answerable(body: dict[str, Any]) -> dict[str, Any]:
    """A well-formed body with ids that the model has, one context and a usual temperature."""
    context_ids = [token % FAKE_VOCAB_SIZE for context in body["contexts"] for token in context][:100] or [1]
    sequences = [
        {
            "sequence_id": sequence.get("sequence_id", ""),
            "completion_ids": [token % FAKE_VOCAB_SIZE for token in sequence["completion_ids"]],
            **({"teacher_top_k": 3} if index % 2 else {"hidden_states": True}),
        }
        for index, sequence in enumerate(body["sequences"])
    ]
    return {"contexts": [context_ids], "sequences": sequences}


def named(body: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of its fields, where it has them."""
    return {name: body[name] for name in names if name in body}


def id_of(token: int) -> int:
    return token % FAKE_VOCAB_SIZE


def answerable_completions(body: dict[str, Any]) -> dict[str, Any]:
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    prompt = [[id_of(token) for token in prompt][:100] for prompt in prompts]
    kept = named(body, "request_id", "return_token_ids")
    return {"prompt": prompt, "prompt_logprobs": body["prompt_logprobs"] % 5, "max_tokens": body["max_tokens"], **kept}


def answerable_generate(body: dict[str, Any]) -> dict[str, Any]:
    token_ids = [id_of(token) for token in body["token_ids"]][:100]
    has_ids = bool(body["sampling_params"].get("prompt_logprob_token_ids"))
    ids = {"prompt_logprob_token_ids": [[token, -1] for token in token_ids[1:]]} if has_ids else {"prompt_logprobs": 2}
    params = {"max_tokens": body["sampling_params"]["max_tokens"], **ids}
    return {"token_ids": token_ids, "sampling_params": params, **named(body, "request_id", "return_token_ids")}


def answerable_sglang(body: dict[str, Any]) -> dict[str, Any]:
    is_batch = isinstance(body["input_ids"][0], list)
    prompts = [
        [id_of(token) for token in prompt][:100] for prompt in (body["input_ids"] if is_batch else [body["input_ids"]])
    ]
    return {
        "input_ids": prompts if is_batch else prompts[0],
        "sampling_params": named(body["sampling_params"], "max_new_tokens"),
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": (body.get("top_logprobs_num") or 0) % 5,
        **named(body, "rid", "return_text_in_logprobs"),
    }


ANSWERABLE = {
    "/v1/score": answerable,
    "/v1/completions": answerable_completions,
    "/inference/v1/generate": answerable_generate,
    "/generate": answerable_sglang,
}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_answer_is_one_that_the_document_promises(api: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Status, content type and body as documented; what breaks the document is refused; nothing breaks the server."""
    if mode is GenerationMode.NEGATIVE and path in HAVE_NOTHING_WRONG:
        mode = GenerationMode.POSITIVE  # nothing in such a request can be wrong
    operation = api[path][method]
    statuses: list[int] = []
    max_examples = 150 if method == "POST" else 50  # there is no body, only headers vary

    @settings(
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and len(statuses) % 2:
            case.body = ANSWERABLE[path](case.body)
        response = case.call_and_validate(excluded_checks=EXCLUDED_CHECKS)
        assert response.status_code < 500 or (response.status_code == 504 and "Request-Timeout" in case.headers)
        statuses.append(response.status_code)

    ask()
    assert mode is GenerationMode.NEGATIVE or 200 in statuses


def test_the_teacher_is_as_well_afterwards(running: RunningTeacher) -> None:
    """The last test of this module."""
    body = {"contexts": [[1, 2]], "sequences": [{"completion_ids": [FAKE_VOCAB_SIZE - 1], "teacher_top_k": 2}]}
    with httpx2.Client(trust_env=False) as http:
        assert http.post(f"{running.http_url}/v1/score", json=body).status_code == 200
        metrics = http.get(f"{running.admin_url}/metrics").text
    assert "\nvopd_reserved_tokens 0.0\n" in metrics
    assert 'code="INTERNAL"' not in metrics
    assert 'code="INVALID_ARGUMENT",method="Score"' in metrics
