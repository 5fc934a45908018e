"""A loaded model that scores requests: backbone, head and tokenizer in one place, without queue or thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vopd_server.engines.contexts import ReadContext, ReadContexts
from vopd_server.engines.forward import Backbone, Forwarded
from vopd_server.engines.head import (
    ACCELERATOR_CHUNK_ELEMENTS,
    CPU_CHUNK_ELEMENTS,
    OutputHead,
    output_head,
    row_queries,
    rows_per_chunk,
    score_rows,
    split_answers,
)
from vopd_server.engines.loading import LoadedModel
from vopd_server.engines.probe import can_share_contexts, check_head, check_padding
from vopd_server.engines.tokenizer import tokenizer_info
from vopd_server.errors import ConfigError, EngineError
from vopd_server.types import ScoreRequest, Scores, TokenizerInfo


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What one forward gave.

    results: one a request; an EngineError in the place of one for which the model gave NaN, or hidden states that
        are not finite.
    contexts: those that were read on the way.
    """

    results: list[Scores | EngineError]
    forwarded: Forwarded
    contexts: dict[bytes, ReadContext]


@dataclass(frozen=True, slots=True, eq=False)
class ScoringModel:
    """Scores lists of requests in one forward each. Thread-compatible: one call at a time."""

    backbone: Backbone
    head: OutputHead
    tokenizer: TokenizerInfo
    revision: str
    dtype_name: str
    max_context_length: int
    chunk_rows: int
    can_share_contexts: bool

    def read_contexts(self, requests: Sequence[ScoreRequest]) -> tuple[dict[bytes, ReadContext], Forwarded]:
        """The requests' distinct contexts, each read once, for `score`."""
        with torch.inference_mode():
            return self.backbone.read_contexts(requests)

    def score(self, requests: Sequence[ScoreRequest], contexts: ReadContexts | None, *, keep_tokens: int = 0) -> Scored:
        """Scores requests with completions of at least one token, on their contexts where given.

        keep_tokens: of contexts that are read on the way and given, at most; only where `can_share_contexts`.
        """
        read: dict[bytes, ReadContext] = {}
        with torch.inference_mode():
            if contexts is not None:
                hidden_NH, forwarded = self.backbone.read_completions(contexts, requests)
            elif keep_tokens:
                hidden_NH, read, forwarded = self.backbone.read_whole_and_contexts(
                    requests, max_context_tokens=keep_tokens
                )
            else:
                hidden_NH, forwarded = self.backbone.read_whole(requests)
            answers = score_rows(self.head, hidden_NH, row_queries(requests), chunk_rows=self.chunk_rows)
        return Scored(split_answers(requests, answers), forwarded, read)


def scoring_model(loaded: LoadedModel, *, chunk_elements: int | None = None) -> ScoringModel:
    """Takes a loaded model apart for scoring, and compares it with itself before anyone is served.

    chunk_elements: float32 logits that exist at once; None picks by device.

    Raises: ConfigError when the parts do not reproduce the model's own log-probabilities.
    """
    model: Any = loaded.model
    head = output_head(model)
    backbone = Backbone(_base_model(model), loaded.device)
    with torch.inference_mode():
        check_head(model, backbone, head)
        check_padding(model, backbone, head)
        shares = can_share_contexts(model, backbone, head)
    default_elements = CPU_CHUNK_ELEMENTS if loaded.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    return ScoringModel(
        backbone=backbone,
        head=head,
        tokenizer=tokenizer_info(loaded.tokenizer, model.generation_config),
        revision=loaded.revision,
        dtype_name=str(model.dtype).removeprefix("torch."),
        max_context_length=loaded.max_context_length,
        chunk_rows=rows_per_chunk(head.vocab_size, chunk_elements or default_elements),
        can_share_contexts=shares,
    )


def _base_model(model: Any) -> torch.nn.Module:
    """Everything below the output head; Llama 4 has it under another name than it says."""
    for base_model in (model.base_model, getattr(model, "model", None)):
        if isinstance(base_model, torch.nn.Module) and base_model is not model:
            return base_model
    raise ConfigError(f"{type(model).__name__} has no base model apart from its output head")
