"""SGLang's POST /generate with `return_logprob`, as slime sends it."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema

from vopd_server.compat.bodies import (
    CompatBody,
    MaxTokens,
    Temperature,
    check_generates_nothing,
    check_other_fields,
    parse_body,
    temperature_of,
)
from vopd_server.compat.numbers import json_object, number
from vopd_server.compat.prompts import Prompts, is_batch, prompts_of
from vopd_server.compat.scoring import Asked, Scored, Served, Write, top_k_of
from vopd_server.errors import InvalidRequestError
from vopd_server.http_json import Name
from vopd_server.types import ScoreRequest, Scores

OFFER = (
    "this is a scoring service, which generates nothing: send input_ids, return_logprob true, logprob_start_len 0 or "
    "more and max_new_tokens 0 or 1 in sampling_params, and the log-probabilities of the prompt's own tokens come back"
)
DEFAULT_MAX_NEW_TOKENS = 128
_REQUIRED: list[JsonValue] = ["input_ids", "sampling_params", "return_logprob", "logprob_start_len"]


class SglangParams(CompatBody):
    """SGLang's sampling parameters."""

    model_config = ConfigDict(json_schema_extra={"required": ["max_new_tokens"]})

    max_new_tokens: MaxTokens = None
    temperature: Temperature = None


class SglangBody(CompatBody):
    """Prompts to score. Fields for generating text are ignored where they cannot reach the scores, else refused."""

    model_config = ConfigDict(json_schema_extra={"required": _REQUIRED})

    rid: Name | None = None
    input_ids: Prompts
    sampling_params: SglangParams
    return_logprob: Annotated[bool | None, WithJsonSchema({"type": "boolean", "enum": [True]})] = None
    logprob_start_len: Annotated[int | None, WithJsonSchema({"type": "integer", "minimum": 0})] = Field(
        None, description="The entries of the answer begin with this token, whose own is null."
    )
    top_logprobs_num: int | None = Field(None, ge=0, description="The teacher's most likely ids a position, beside.")
    return_text_in_logprobs: bool = False


class SglangFinish(BaseModel):
    type: Literal["length"]
    length: Literal[0]


class SglangMeta(BaseModel):
    """Entries are [log-probability, id, text or null]; the first log-probability is null, minus infinity -9999."""

    model_config = ConfigDict(extra="forbid")

    id: str
    finish_reason: SglangFinish
    prompt_tokens: int
    completion_tokens: Literal[0]
    weight_version: str = Field(description="The model's revision.")
    input_token_logprobs: list[list[float | int | str | None]]
    output_token_logprobs: list[Any] = Field(max_length=0)
    input_top_logprobs: list[list[list[float | int | str | None]] | None] | None = Field(
        None, description="Only where top_logprobs_num is above 0; the first is null."
    )
    output_top_logprobs: list[Any] | None = None


class SglangAnswer(BaseModel):
    """Of one prompt."""

    text: Literal[""]
    output_ids: list[int] = Field(max_length=0)
    meta_info: SglangMeta


def read_generate(body: bytes, served: Served) -> tuple[Asked, Write]:
    """Raises: InvalidRequestError in SGLang's names."""
    parsed = parse_body(SglangBody, body)
    params = parsed.sampling_params
    check_other_fields(parsed, OFFER)
    check_other_fields(params, OFFER, inside="sampling_params.")
    if not parsed.return_logprob:
        raise InvalidRequestError("return_logprob", f"not true: {OFFER}")
    if parsed.logprob_start_len is None or parsed.logprob_start_len < 0:
        raise InvalidRequestError("logprob_start_len", f"-1, or not sent, asks for generated tokens only: {OFFER}")
    check_generates_nothing(
        "sampling_params.max_new_tokens", params.max_new_tokens, OFFER, default=DEFAULT_MAX_NEW_TOKENS
    )
    prompts = prompts_of("input_ids", parsed.input_ids, vocab_size=served.vocab_size)
    start, shortest = parsed.logprob_start_len, min(len(prompt) for prompt in prompts)
    if start > shortest - 2:
        raise InvalidRequestError(
            "logprob_start_len", f"{start}; nothing is left to score after it in a prompt of {shortest} input_ids"
        )
    asked = Asked(
        prompts_name="input_ids",
        prompts=prompts,
        is_batch=is_batch(parsed.input_ids),
        first_scored=start + 1,
        support=top_k_of("top_logprobs_num", parsed.top_logprobs_num or 0, served),
        temperature=temperature_of(params.temperature),
        request_id=parsed.rid or "",
        other_names={"temperature": "sampling_params.temperature"},
    )
    return asked, partial(write_generate, served, asked, has_texts=parsed.return_text_in_logprobs)


def write_generate(served: Served, asked: Asked, scored: Scored, request_id: str, *, has_texts: bool) -> bytes:
    """The JSON of a SglangAnswer, or of a list of them where a list of prompts was sent."""
    answers = []
    for index, (request, scores) in enumerate(scored):
        about: dict[str, Any] = {
            "id": f"{request_id}-{index}" if asked.is_batch else request_id,
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": request.num_tokens,
            "completion_tokens": 0,
            "weight_version": served.model_revision,
            "output_token_logprobs": [],
        }
        logprobs = _logprobs_json(request, scores, served, has_texts=has_texts)
        answers.append(json_object({"text": "", "output_ids": []}, meta_info=json_object(about, **logprobs)))
    return (f"[{', '.join(answers)}]" if asked.is_batch else answers[0]).encode()


def _logprobs_json(request: ScoreRequest, scores: Scores, served: Served, *, has_texts: bool) -> dict[str, str]:
    """Entry 0 is the last token of the context, which nothing here is given for."""

    def entry(logprob: str, token: int) -> str:
        return f"[{logprob}, {token}, {served.texts.json_of(token) if has_texts else 'null'}]"

    tokens_T, sampled_T = request.completion_ids.tolist(), scores.sampled_logprobs_T.tolist()
    entries = [entry("null", int(request.context_ids[-1]))]
    entries += [entry(number(logprob), token) for logprob, token in zip(sampled_T, tokens_T, strict=True)]
    written = {"input_token_logprobs": f"[{', '.join(entries)}]"}
    if scores.support_ids_TK is not None and scores.support_logprobs is not None:
        rows = ["null"]
        for ids_K, logprobs_K in zip(scores.support_ids_TK.tolist(), scores.support_logprobs.tolist(), strict=True):
            best = [entry(number(logprob), token) for logprob, token in zip(logprobs_K, ids_K, strict=True)]
            rows.append(f"[{', '.join(best)}]")
        written |= {"input_top_logprobs": f"[{', '.join(rows)}]", "output_top_logprobs": "[]"}
    return written
