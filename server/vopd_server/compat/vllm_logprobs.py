"""vLLM's `prompt_logprobs`: an entry a prompt token, null for the first, then an object from id to log-probability."""

from __future__ import annotations

from itertools import chain
from typing import Any

from pydantic import BaseModel, Field

from vopd_server.compat.numbers import number
from vopd_server.compat.scoring import TokenTexts
from vopd_server.types import ScoreRequest, Scores


class LogprobEntry(BaseModel):
    """vLLM's Logprob."""

    logprob: float = Field(description="Natural logarithm; minus infinity is -9999.")
    rank: int | None = Field(
        description="1 is the most likely. k + 1 for a token that is not among the k: it is no less. Null where no "
        "ranks were asked for."
    )
    decoded_token: str | None = Field(description="The tokenizer's entry of that id.")


PromptLogprobs = list[dict[str, LogprobEntry] | None]


class Usage(BaseModel):
    """Nothing is generated."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


def usage_of(num_tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}


def prompt_logprobs_json(request: ScoreRequest, scores: Scores, texts: TokenTexts) -> str:
    """Of a prompt whose context is its first token. In each object the realised token comes first, then the k best."""
    realised_T = request.completion_ids.tolist()
    sampled_T = scores.sampled_logprobs_T.tolist()
    nothing: list[Any] = [[]] * len(realised_T)
    ids_TK = nothing if scores.support_ids_TK is None else scores.support_ids_TK.tolist()
    logprobs_TK = nothing if scores.support_logprobs is None else scores.support_logprobs.tolist()
    positions = zip(realised_T, sampled_T, ids_TK, logprobs_TK, strict=True)
    entries = (_entry_json(*position, texts) for position in positions)
    return "[" + ", ".join(chain(("null",), entries)) + "]"


def _entry_json(realised: int, logprob: float, ids_K: list[int], logprobs_K: list[float], texts: TokenTexts) -> str:
    """A client that sorts by rank, as TRL does, needs a number for the realised token, and its place behind the k."""
    rank = None if not ids_K else ids_K.index(realised) + 1 if realised in ids_K else len(ids_K) + 1
    parts = [_logprob_json(realised, logprob, rank, texts)]
    parts += [
        _logprob_json(token, best, rank, texts)
        for rank, (token, best) in enumerate(zip(ids_K, logprobs_K, strict=True), 1)
        if token != realised
    ]
    return "{" + ", ".join(parts) + "}"


def _logprob_json(token: int, logprob: float, rank: int | None, texts: TokenTexts) -> str:
    place = "null" if rank is None else rank
    return f'"{token}": {{"logprob": {number(logprob)}, "rank": {place}, "decoded_token": {texts.json_of(token)}}}'
