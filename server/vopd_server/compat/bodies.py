"""Bodies of other protocols: which fields are read, which mean nothing here, and which are refused.

vLLM and SGLang take dozens of fields for generating text. A field that is not read is one of three things: harmless,
for it cannot reach the scores of a prompt (`seed`, `stop`); at a value that changes nothing (`top_p` 1, or null); or
refused, since whoever sends it expects something that would not happen.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from vopd_proto import teacher_pb2 as pb
from vopd_server.errors import InvalidRequestError, UnknownModelError
from vopd_server.http_json import invalid_body

# About generated tokens, about text that is not asked for, or about how a server goes about its work.
HARMLESS = frozenset(
    {
        # vLLM, and OpenAI before it
        "add_special_tokens",  # of a prompt in text
        "cache_salt",  # every tenant has its own already
        "detokenize",
        "flat_logprobs",
        "ignore_eos",
        "include_stop_str_in_output",
        "length_penalty",  # of beam search
        "min_tokens",
        "mm_payload",
        "output_kind",
        "priority",
        "reasoning_ended",
        "reasoning_parser_kwargs",
        "repetition_detection",
        "return_mm_kwargs",
        "return_token_offsets",
        "return_tokens_as_token_ids",
        "routed_experts_prompt_start",
        "seed",
        "session_id",
        "skip_clone",
        "skip_reading_prefix_cache",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream_interval",
        "stream_options",
        "thinking_token_budget",
        "token_offsets",
        "truncation_side",
        "user",
        "watermarking",
        # SGLang
        "conversation_id",
        "custom_labels",
        "data_parallel_rank",
        "external_trace_header",
        "extra_key",
        "log_metrics",
        "max_thinking_tokens",
        "min_new_tokens",
        "modalities",
        "no_logs",
        "no_stop_trim",
        "received_time",
        "routed_dp_rank",
        "routed_experts_start_len",
        "routing_key",
        "sampling_seed",
        "stop_regex",
        "temp_scaled_logprobs",  # they are
        "use_audio_in_video",
    }
)
# The values besides null that leave scores as they are, where they are others than false, zero and nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "logprobs": (),  # 0 asks for those of the tokens that are generated
    "n": (1,),
    "output_mode": ("tokens",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "top_k": (-1, 0, 2**30),
    "top_p": (1,),
}
# Asked of a server that generates.
GENERATION = frozenset(
    {"best_of", "echo", "logprob_token_ids", "logprobs", "n", "output_mode", "stream", "suffix", "use_beam_search"}
)


# In the schema as they have to be sent; read by the functions below, whose refusals say what there is instead.
MaxTokens = Annotated[
    int | None, WithJsonSchema({"type": "integer", "enum": [0, 1], "description": "Either way nothing is generated."})
]
Temperature = Annotated[
    float | None, Field(ge=0, description="Logits are divided by it before the softmax; unset, and 0: 1.")
]


class CompatBody(BaseModel):
    """The fields that are read. The others, whatever they hold, are left to `check_other_fields`."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


Body = TypeVar("Body", bound=CompatBody)


def parse_body(body_type: type[Body], body: bytes) -> Body:
    """Raises: InvalidRequestError naming the first wrong fields."""
    try:
        return body_type.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error, whole="body") from error


def check_other_fields(body: CompatBody, offer: str, *, inside: str = "") -> None:
    """Refuses what is not read and not harmless.

    offer: what this teacher does instead of generating. inside: the path of `body`, with its dot.

    Raises: InvalidRequestError.
    """
    for name, value in (body.model_extra or {}).items():
        is_neutral = value in NEUTRAL[name] if name in NEUTRAL else not value
        if name in HARMLESS or value is None or is_neutral:
            continue
        field = f"{inside}{name}" if len(name) <= 64 else f"{inside}{name[:64]}…"
        reason = offer if name in GENERATION else "it would be without effect on the scores; leave it out"
        raise InvalidRequestError(field, f"{told(value)}: {reason}")


def check_generates_nothing(field: str, max_tokens: int | None, offer: str, *, default: int) -> None:
    """0 or 1: the one token is never made. default: what such a server generates where the field is missing.

    Raises: InvalidRequestError.
    """
    if max_tokens not in (0, 1):
        asked = f"not sent, which asks for {default}" if max_tokens is None else f"{max_tokens}"
        raise InvalidRequestError(field, f"{asked}: {offer}")


def check_model(model: str | None, served: str) -> None:
    """None: whichever is served. Raises: UnknownModelError."""
    if model is not None and model != served:
        raise UnknownModelError("model", f"{told(model)} is not served here; {told(served)} is")


def temperature_of(temperature: float | None) -> float:
    """1 where it is not sent. 0 means the greedy choice of a token that is never generated: scores are at 1, too.

    Rounded as it is on its way from our own client, whose scores are to be the same to the last bit.
    """
    return pb.ScoreRequest(temperature=temperature).temperature if temperature else 1.0


def told(value: Any) -> str:
    """For a message: a value of any size, in a few words."""
    return reprlib.repr(value)
