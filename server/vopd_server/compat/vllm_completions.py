"""vLLM's POST /v1/completions with `prompt_logprobs`, as TRL's distillation trainers send it to a server."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from vopd_server.compat.bodies import (
    CompatBody,
    MaxTokens,
    Temperature,
    check_generates_nothing,
    check_model,
    check_other_fields,
    parse_body,
    temperature_of,
)
from vopd_server.compat.numbers import json_object
from vopd_server.compat.prompts import Prompts, is_batch, prompts_of
from vopd_server.compat.scoring import Asked, Scored, Served, Write, top_k_of
from vopd_server.compat.vllm_logprobs import PromptLogprobs, Usage, prompt_logprobs_json, usage_of
from vopd_server.errors import InvalidRequestError
from vopd_server.http_json import Name

OFFER = (
    "this is a scoring service, which generates nothing: send max_tokens 0 or 1 and prompt_logprobs, "
    "and the log-probabilities of the prompt's own tokens come back"
)
DEFAULT_MAX_TOKENS = 16


class CompletionsBody(CompatBody):
    """Prompts to score. Fields for generating text are ignored where they cannot reach the scores, else refused."""

    model_config = ConfigDict(json_schema_extra={"required": ["prompt", "prompt_logprobs", "max_tokens"]})

    model: str | None = Field(None, description="The id that /v1/models shows; unset: whichever is served.")
    prompt: Prompts
    prompt_logprobs: Annotated[int | None, Field(ge=0), WithJsonSchema({"type": "integer", "minimum": 0})] = Field(
        None, description="How many of the teacher's most likely ids a position, beside the realised token."
    )
    max_tokens: MaxTokens = None
    temperature: Temperature = None
    return_token_ids: bool | None = None
    request_id: Name = ""


class CompletionChoice(BaseModel):
    """A prompt's answer."""

    index: int
    text: Literal[""]
    logprobs: None
    finish_reason: Literal["length"]
    stop_reason: None
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs


class CompletionsAnswer(BaseModel):
    """A choice a prompt, in the order of the prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    usage: Usage
    choices: list[CompletionChoice]


def read_completions(body: bytes, served: Served) -> tuple[Asked, Write]:
    """Raises: InvalidRequestError in vLLM's names; UnknownModelError."""
    parsed = parse_body(CompletionsBody, body)
    check_model(parsed.model, served.model_id)
    check_other_fields(parsed, OFFER)
    if parsed.prompt_logprobs is None:
        raise InvalidRequestError("prompt_logprobs", f"not sent: {OFFER}")
    check_generates_nothing("max_tokens", parsed.max_tokens, OFFER, default=DEFAULT_MAX_TOKENS)
    asked = Asked(
        prompts_name="prompt",
        prompts=prompts_of("prompt", parsed.prompt, vocab_size=served.vocab_size),
        is_batch=is_batch(parsed.prompt),
        support=top_k_of("prompt_logprobs", parsed.prompt_logprobs, served),
        temperature=temperature_of(parsed.temperature),
        request_id=parsed.request_id,
    )
    return asked, partial(write_completions, served, shows_ids=bool(parsed.return_token_ids))


def write_completions(served: Served, scored: Scored, request_id: str, *, shows_ids: bool) -> bytes:
    """The JSON of a CompletionsAnswer."""
    choices = []
    for index, (request, scores) in enumerate(scored):
        about: dict[str, Any] = {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [] if shows_ids else None,
            "prompt_token_ids": request.context_ids.tolist() + request.completion_ids.tolist() if shows_ids else None,
        }
        choices.append(json_object(about, prompt_logprobs=prompt_logprobs_json(request, scores, served.texts)))
    about = {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": served.model_id,
        "usage": usage_of(sum(request.num_tokens for request, _ in scored)),
    }
    return json_object(about, choices="[" + ", ".join(choices) + "]").encode()
