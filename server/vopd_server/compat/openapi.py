"""What /openapi.json says of the other protocols. Theirs have more fields: here are those that are read."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from vopd_server.compat.models import ModelInfo, ModelList
from vopd_server.compat.sglang import SglangAnswer, SglangBody
from vopd_server.compat.vllm_completions import CompletionsAnswer, CompletionsBody
from vopd_server.compat.vllm_generate import GenerateAnswer, GenerateBody
from vopd_server.http_openapi import ANY_CALL, TEXT, TIMEOUT, errors

COMPAT_BODIES = (CompletionsBody, GenerateBody, SglangBody)

_SCORING = errors(
    _404="Another model is named than the one that is served.",
    _409="This engine cannot do it; the message names what it can.",
    _413="The body has too many bytes.",
    _415="The body is not JSON.",
    **ANY_CALL,
)


def _scoring(operation_id: str, summary: str, body: type[BaseModel], answer: Any, *, has_model: bool) -> dict[str, Any]:
    """An operation that scores. has_model: its body names a model."""
    return {
        "operation_id": operation_id,
        "summary": summary,
        "response_model": answer,
        "responses": {
            200: {"description": "The scores."},
            **{status: about for status, about in _SCORING.items() if has_model or status != 404},
        },
        "openapi_extra": {
            "parameters": [TIMEOUT],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}},
            },
        },
    }


COMPLETIONS = _scoring(
    "Completions",
    "vLLM's, for the log-probabilities of prompts: nothing is generated.",
    CompletionsBody,
    CompletionsAnswer,
    has_model=True,
)
GENERATE = _scoring(
    "Generate",
    "vLLM's, for the log-probabilities of a prompt: nothing is generated.",
    GenerateBody,
    GenerateAnswer,
    has_model=True,
)
SGLANG_GENERATE = _scoring(
    "SglangGenerate",
    "SGLang's, for the log-probabilities of prompts: nothing is generated.",
    SglangBody,
    SglangAnswer | list[SglangAnswer],
    has_model=False,
)
MODELS: dict[str, Any] = {
    "operation_id": "Models",
    "summary": "vLLM's: the model that is served.",
    "response_model": ModelList,
    "responses": {200: {"description": "Ready."}, **errors(**ANY_CALL)},
    "openapi_extra": {"parameters": [TIMEOUT]},
}
MODEL_INFO: dict[str, Any] = {
    "operation_id": "ModelInfo",
    "summary": "SGLang's: the model that is served.",
    "response_model": ModelInfo,
    "responses": {200: {"description": "Ready."}, **errors(**ANY_CALL)},
    "openapi_extra": {"parameters": [TIMEOUT]},
}
HEALTH: dict[str, Any] = {
    "summary": "Requests are answered: what trainers poll.",
    "response_model": None,
    "responses": {
        200: {"content": TEXT, "description": "They are."},
        503: {"content": TEXT, "description": "The state that the teacher is in instead."},
    },
}
