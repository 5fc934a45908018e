"""What other protocols ask of a server before they send it anything: which model it serves."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from vopd_server.types import EngineInfo


class ModelCard(BaseModel):
    """max_model_len: tokens of one prompt, for the tenant that asks."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["vopd"]
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    """vLLM's GET /v1/models: the one model there is."""

    object: Literal["list"]
    data: list[ModelCard]


class ModelInfo(BaseModel):
    """SGLang's GET /get_model_info. weight_version: the model's revision."""

    model_path: str
    tokenizer_path: str
    is_generation: Literal[True]  # which is to say: no embedding model
    weight_version: str


def model_list(info: EngineInfo, *, max_context_length: int, created: int) -> ModelList:
    """created: seconds since 1970."""
    card = ModelCard(
        id=info.model_id,
        object="model",
        created=created,
        owned_by="vopd",
        root=info.model_id,
        parent=None,
        max_model_len=max_context_length,
    )
    return ModelList(object="list", data=[card])


def model_info(info: EngineInfo) -> ModelInfo:
    return ModelInfo(
        model_path=info.model_id,
        tokenizer_path=info.model_id,
        is_generation=True,
        weight_version=info.model_revision,
    )
