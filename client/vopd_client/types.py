"""What travels between student, teacher and trainer: frozen, torch-free, numpy only.

Axes: C context tokens, T completion tokens, K support size, V vocabulary, H hidden size.
Row t of every score belongs to completion token t. Natural log, nats.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from vopd_proto.arrays import Float32Array, IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class NoSupport:
    """Ask for the sampled log-probabilities alone."""


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """Ask for the teacher's own k most likely ids at every position."""

    k: int


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Ask for the student's ids, ragged per position."""

    ids: IntArray  # [sum of counts_T]
    counts_T: IntArray


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Ask for final hidden states, which the teacher's output head turns into the whole distribution."""


Support = NoSupport | TeacherTopK | Candidates | HiddenStates


@dataclass(frozen=True, slots=True, eq=False)
class SequenceToScore:
    """One completion and the context the *teacher* is to see before it.

    is_sampled_T: False at tokens that the student did not sample, whose scores nobody reads; None: it sampled all. Not
        a part of the request: the teacher scores every token.
    """

    context_ids: IntArray  # [C], C >= 1
    completion_ids: IntArray  # [T]
    support: Support = field(default_factory=NoSupport)
    is_sampled_T: BoolArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SequenceScores:
    """The teacher's answer, checked against the request.

    The support is ragged whatever was asked for: `counts_T[t]` ids and log-probabilities belong to row t
    (all zero when no support was asked for), in the request's order for candidates, most likely first
    for the teacher's top-k. Hidden states come where they were asked for, [T, H], and are None elsewhere.
    """

    sampled_logprobs_T: Float32Array
    support_ids: IntArray
    support_logprobs: Float32Array
    counts_T: IntArray
    hidden_states_TH: Float32Array | None = None
    queue_time_s: float = 0.0
    engine_time_s: float = 0.0


SupportKind = Literal["sampled", "teacher_top_k", "candidates", "hidden_states"]


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What the teacher said of itself at the handshake."""

    model_id: str
    model_revision: str
    fingerprint: str
    num_ids: int  # entries of the tokenizer's table
    begin_id: int | None
    end_ids: tuple[int, ...]
    pad_id: int | None
    chat_template: str
    vocab_size: int  # ids below it can be scored
    hidden_size: int
    max_context_length: int
    dtype: str
    engine: str
    engine_version: str
    server_version: str
    supports: frozenset[SupportKind]
    any_temperature: bool
    deterministic: bool
    max_sequences_per_request: int
    max_tokens_per_request: int
    max_support_size: int
    head_sha256: str  # of the file with the output head; empty: not given away


class Teacher(Protocol):
    """What the trainer needs: a remote teacher, or one in this process."""

    @property
    def info(self) -> TeacherInfo: ...

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_received(self) -> int: ...

    @property
    def waiting_reason(self) -> str:
        """Why answers are late, for the progress line; empty while all is well."""
        ...

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        """Sends one sequence and returns at once; the future raises a TeacherError when it cannot be scored."""
        ...

    def close(self) -> None: ...
