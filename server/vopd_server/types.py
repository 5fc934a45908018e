"""What the service and its engines speak: frozen, transport-free, numpy only.

Axes: C context tokens, T completion tokens, K support size, V vocabulary, H hidden size.
Row t of every score belongs to completion token t. Natural log, nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vopd_proto.arrays import Float32Array, IntArray

SupportKind = Literal["sampled", "teacher_top_k", "candidates", "hidden_states"]


@dataclass(frozen=True, slots=True)
class NoSupport:
    """The sampled log-probabilities alone."""

    kind: Literal["sampled"] = "sampled"


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """The teacher's own k most likely ids at every position."""

    k: int
    kind: Literal["teacher_top_k"] = "teacher_top_k"


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Ids chosen by the student, ragged per position; duplicates are scored as they come."""

    ids: IntArray  # [sum of counts_T]
    counts_T: IntArray
    kind: Literal["candidates"] = "candidates"


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Final hidden states instead of a support."""

    kind: Literal["hidden_states"] = "hidden_states"


Support = NoSupport | TeacherTopK | Candidates | HiddenStates


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRequest:
    """One completion to score, already validated when an engine sees it.

    cache_salt: requests with different salts share nothing of what was computed for either.
    """

    request_id: str
    context_ids: IntArray  # [C], C >= 1
    completion_ids: IntArray  # [T], T >= 0
    support: Support = field(default_factory=NoSupport)
    temperature: float = 1.0
    cache_salt: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.context_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What an engine returns for one request.

    sampled_logprobs_T: [T] float32.
    support_logprobs: teacher_top_k: [T, k] most likely first; candidates: [sum of counts], aligned with
        the request's ids; otherwise None.
    support_ids_TK: [T, k], teacher_top_k only.
    hidden_states_TH: [T, H] float32, hidden_states only; the values are the model's own, whatever its dtype.
    """

    sampled_logprobs_T: Float32Array
    support_logprobs: Float32Array | None = None
    support_ids_TK: IntArray | None = None
    hidden_states_TH: Float32Array | None = None
    queue_time_s: float = 0.0
    engine_time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HeadFile:
    """The model's output head as a safetensors file, laid out as teacher.proto says under GetHeadResponse."""

    path: Path
    sha256: str  # hexadecimal, of the whole file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is and can do.

    window_tokens: tokens that are best in the engine at a time: enough to keep it busy, and what it holds at most.
    max_batch_tokens: of one forward; 0 where that is not known.
    head: where it is given away; `supports` then holds hidden_states, and otherwise does not.
    """

    model_id: str
    model_revision: str
    engine: str
    engine_version: str
    dtype: str
    vocab_size: int  # rows of the output head
    hidden_size: int
    max_context_length: int
    supports: frozenset[SupportKind]
    any_temperature: bool
    deterministic: bool
    window_tokens: int
    max_batch_tokens: int = 0
    head: HeadFile | None = None


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The tokenizer of the model that is served, as the handshake compares it."""

    tokens: tuple[bytes, ...]  # id -> token
    tokenizer_json: str
    chat_template: str
    begin_id: int | None
    end_ids: tuple[int, ...]
    pad_id: int | None
    fingerprint: str


def empty_scores(request: ScoreRequest, *, hidden_size: int) -> Scores:
    """The answer to an empty completion: no rows."""
    nothing = np.empty(0, np.float32)
    match request.support:
        case TeacherTopK(k=k):
            return Scores(nothing, np.empty((0, k), np.float32), np.empty((0, k), np.int64))
        case Candidates():
            return Scores(nothing, nothing)
        case HiddenStates():
            return Scores(nothing, hidden_states_TH=np.empty((0, hidden_size), np.float32))
        case NoSupport():
            return Scores(nothing)
