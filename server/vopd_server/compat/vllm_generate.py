"""vLLM's POST /inference/v1/generate, as prime-rl sends it, and with ids to score at every position."""

from __future__ import annotations

import base64
import io
import time
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from vopd_proto.arrays import Float32Array, IntArray
from vopd_server.compat.bodies import (
    CompatBody,
    MaxTokens,
    Temperature,
    check_generates_nothing,
    check_model,
    check_other_fields,
    parse_body,
    temperature_of,
    told,
)
from vopd_server.compat.numbers import json_object
from vopd_server.compat.prompts import Prompt, ids_of, prompt_of
from vopd_server.compat.scoring import Asked, Scored, Served, Write, top_k_of
from vopd_server.compat.vllm_logprobs import PromptLogprobs, Usage, prompt_logprobs_json, usage_of
from vopd_server.errors import InvalidRequestError
from vopd_server.http_json import Name
from vopd_server.types import Candidates

OFFER = (
    "this is a scoring service, which generates nothing: send sampling_params with max_tokens 0 or 1 and either "
    "prompt_logprobs or prompt_logprob_token_ids, and the log-probabilities of the prompt's tokens, or of those ids, "
    "come back"
)
DEFAULT_MAX_TOKENS = 16
PAD = -1
_PARAMS = "sampling_params."
_TOKEN_IDS = f"{_PARAMS}prompt_logprob_token_ids"
_ROWS: dict[str, Any] = {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": PAD}}}


class GenerateParams(CompatBody):
    """vLLM's SamplingParams. One of prompt_logprobs and prompt_logprob_token_ids."""

    model_config = ConfigDict(json_schema_extra={"required": ["max_tokens"]})

    prompt_logprobs: int | None = Field(
        None, ge=0, description="How many of the teacher's most likely ids a position, beside the realised token."
    )
    prompt_logprob_token_ids: Annotated[Any, WithJsonSchema({"anyOf": [_ROWS, {"type": "null"}]})] = Field(
        None, description="Ids to score, a list a token after the first `prompt_logprob_start` + 1; -1 is padding."
    )
    prompt_logprob_start: int | None = Field(None, ge=0)
    max_tokens: MaxTokens = None
    temperature: Temperature = None


class GenerateBody(CompatBody):
    """A prompt to score. Fields for generating text are ignored where they cannot reach the scores, else refused."""

    request_id: Name = ""
    model: str | None = Field(None, description="The id that /v1/models shows; unset: whichever is served.")
    token_ids: Prompt
    sampling_params: GenerateParams
    return_token_ids: bool | None = None


class GenerateChoice(BaseModel):
    """Nothing is generated."""

    index: Literal[0]
    logprobs: None
    finish_reason: Literal["length"]
    stop_reason: None
    token_ids: list[int]


class GenerateAnswer(BaseModel):
    """vLLM's GenerateResponse. One of prompt_logprobs and prompt_token_id_logprobs."""

    request_id: str
    output_mode: Literal["tokens"]
    model: str
    created: int
    choices: list[GenerateChoice]
    usage: Usage
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None
    prompt_token_id_logprobs: str | None = Field(
        description="Base64 of a .npy file: float32 [rows, ids], padding at minus infinity."
    )


def read_generate(body: bytes, served: Served) -> tuple[Asked, Write]:
    """Raises: InvalidRequestError in vLLM's names; UnknownModelError."""
    parsed = parse_body(GenerateBody, body)
    params = parsed.sampling_params
    check_model(parsed.model, served.model_id)
    check_other_fields(parsed, OFFER)
    check_other_fields(params, OFFER, inside=_PARAMS)
    if params.prompt_logprobs is None and params.prompt_logprob_token_ids is None:
        raise InvalidRequestError(f"{_PARAMS}prompt_logprobs", f"not sent: {OFFER}")
    check_generates_nothing(f"{_PARAMS}max_tokens", params.max_tokens, OFFER, default=DEFAULT_MAX_TOKENS)
    prompt = prompt_of("token_ids", parsed.token_ids, vocab_size=served.vocab_size)
    start, ids_TK = _rows_of(params, len(prompt), served)
    asked = Asked(
        prompts_name="token_ids",
        prompts=[prompt],
        is_batch=False,
        first_scored=start + 1,
        support=top_k_of(f"{_PARAMS}prompt_logprobs", params.prompt_logprobs or 0, served)
        if ids_TK is None
        else Candidates(ids_TK[ids_TK != PAD], (ids_TK != PAD).sum(axis=1)),
        temperature=temperature_of(params.temperature),
        request_id=parsed.request_id,
        other_names={"temperature": f"{_PARAMS}temperature"},
    )
    return asked, partial(write_generate, served, ids_TK=ids_TK, shows_ids=bool(parsed.return_token_ids))


def _rows_of(params: GenerateParams, prompt_length: int, served: Served) -> tuple[int, IntArray | None]:
    """prompt_logprob_start, and [rows, K] ids padded to the longest row; None where none are asked for.

    Raises: InvalidRequestError.
    """
    start, rows = params.prompt_logprob_start, params.prompt_logprob_token_ids
    if rows is None:
        if start:
            raise InvalidRequestError(f"{_PARAMS}prompt_logprob_start", f"{start} without prompt_logprob_token_ids")
        return 0, None
    if params.prompt_logprobs is not None:
        raise InvalidRequestError(_TOKEN_IDS, "beside prompt_logprobs; send one of the two")
    if not isinstance(rows, list):
        raise InvalidRequestError(_TOKEN_IDS, f"{told(rows)}: not a list of lists of token ids")
    start = start or 0
    num_rows = prompt_length - 1 - start
    if len(rows) != num_rows or not rows:
        raise InvalidRequestError(
            _TOKEN_IDS,
            f"{len(rows)} rows; {prompt_length} token_ids - 1 - prompt_logprob_start {start} = {num_rows}"
            + ("" if num_rows > 0 else ", which is none to score"),
        )
    ids = [ids_of(f"{_TOKEN_IDS}[{t}]", row, vocab_size=served.vocab_size, lowest=PAD) for t, row in enumerate(rows)]
    num_columns = max(len(row) for row in ids)
    if not 1 <= num_columns <= served.max_top_k:
        raise InvalidRequestError(_TOKEN_IDS, f"{num_columns} ids a row; it must lie in [1, {served.max_top_k}]")
    ids_TK = np.full((num_rows, num_columns), PAD, np.int64)
    for row, row_ids in zip(ids_TK, ids, strict=True):
        row[: len(row_ids)] = row_ids
    return start, ids_TK


def write_generate(
    served: Served, scored: Scored, request_id: str, *, ids_TK: IntArray | None, shows_ids: bool
) -> bytes:
    """The JSON of a GenerateAnswer."""
    ((request, scores),) = scored
    choice: dict[str, Any] = {
        "index": 0,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [],
    }
    about: dict[str, Any] = {
        "request_id": request_id,
        "output_mode": "tokens",
        "model": served.model_id,
        "created": int(time.time()),
        "choices": [choice],
        "usage": usage_of(request.num_tokens),
        "prompt_token_ids": request.context_ids.tolist() + request.completion_ids.tolist() if shows_ids else None,
    }
    if ids_TK is None:
        logprobs = prompt_logprobs_json(request, scores, served.texts)
        return json_object({**about, "prompt_token_id_logprobs": None}, prompt_logprobs=logprobs).encode()
    assert scores.support_logprobs is not None
    logprobs_TK = np.full(ids_TK.shape, -np.inf, np.float32)
    logprobs_TK[ids_TK != PAD] = scores.support_logprobs
    return json_object({**about, "prompt_logprobs": None, "prompt_token_id_logprobs": npy_base64(logprobs_TK)}).encode()


def npy_base64(values: Float32Array) -> str:
    """An array as the file that `numpy.load` reads, in base64."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
