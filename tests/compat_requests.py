"""Requests as other trainers send them, in the form that they have there, and their answers as arrays."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vopd_proto.arrays import Float32Array

LEAST_LOGPROB = -9999.0  # what vLLM sends for minus infinity


def completions_body(
    prompt: Sequence[int] | Sequence[Sequence[int]], k: int = 0, *, model: str = "fake", **fields: Any
) -> dict[str, Any]:
    """TRL's. fields: further ones, and others in the place of these."""
    asked = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
    return asked | fields


def generate_body(prompt: Sequence[int], k: int = 1, *, model: str = "fake", **params: Any) -> dict[str, Any]:
    """prime-rl's. params: further sampling parameters, and others in the place of these."""
    asked = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": k}
    return {"model": model, "token_ids": prompt, "sampling_params": asked | params}


def candidates_body(
    prompt: Sequence[int], rows: Sequence[Sequence[int]], start: int, *, model: str = "fake"
) -> dict[str, Any]:
    """With ids to score at every position after `start`; -1 is padding."""
    params = {"max_tokens": 1, "prompt_logprob_token_ids": rows, "prompt_logprob_start": start}
    return {"model": model, "token_ids": prompt, "sampling_params": params}


def sglang_body(prompt: Sequence[int] | Sequence[Sequence[int]], **fields: Any) -> dict[str, Any]:
    """slime's."""
    asked = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return asked | fields


@dataclass(frozen=True)
class Way:
    """An endpoint that scores. body: of one prompt at one temperature. realised: its tokens' log-probabilities."""

    path: str
    method: str  # in logs and metrics
    prompt_field: str
    body: Callable[[list[int], float], dict[str, Any]]
    realised: Callable[[dict[str, Any], Sequence[int]], Float32Array]

    @property
    def temperature_field(self) -> str:
        return "temperature" if self.path == "/v1/completions" else "sampling_params.temperature"


def realised_of(rows: Sequence[dict[str, Any] | None], prompt: Sequence[int]) -> Float32Array:
    """[P - 1] of vLLM's prompt_logprobs, read as its clients do: by id."""
    assert len(rows) == len(prompt)
    assert rows[0] is None
    entries = [(row or {})[str(token)] for row, token in zip(rows[1:], prompt[1:], strict=True)]
    return np.asarray([entry["logprob"] for entry in entries], np.float32)


def realised_of_sglang(answer: dict[str, Any], prompt: Sequence[int]) -> Float32Array:
    """[P - 1], read as slime does."""
    entries = answer["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in entries] == list(prompt)
    return np.asarray([entry[0] for entry in entries[1:]], np.float32)


def numpy_of(answer: dict[str, Any]) -> Float32Array:
    """[rows, K] of prompt_token_id_logprobs."""
    array: Float32Array = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"], validate=True)))
    assert array.dtype == np.float32
    return array


WAYS = [
    Way(
        "/v1/completions",
        "Completions",
        "prompt",
        lambda prompt, temperature: completions_body(prompt, temperature=temperature),
        lambda answer, prompt: realised_of(answer["choices"][0]["prompt_logprobs"], prompt),
    ),
    Way(
        "/inference/v1/generate",
        "Generate",
        "token_ids",
        lambda prompt, temperature: generate_body(prompt, temperature=temperature),
        lambda answer, prompt: realised_of(answer["prompt_logprobs"], prompt),
    ),
    Way(
        "/generate",
        "SglangGenerate",
        "input_ids",
        lambda prompt, temperature: sglang_body(
            prompt, sampling_params={"temperature": temperature, "max_new_tokens": 0}
        ),
        realised_of_sglang,
    ),
]


def edited(body: dict[str, Any], path: Sequence[str], value: object) -> dict[str, Any]:
    """A copy of `body` with `value` at `path`."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return copy
