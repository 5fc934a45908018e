"""Texts scored by a teacher, as people read them: no torch; transformers only to render a chat.

Token ids come from the teacher's own tokenizer, through the `tokenizers` library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from vopd_client.errors import ConfigError, TeacherUnsupportedError
from vopd_client.types import (
    NoSupport,
    SequenceScores,
    SequenceToScore,
    Support,
    SupportKind,
    TeacherInfo,
    TeacherTopK,
)
from vopd_proto.arrays import IntArray

MAX_TEMPLATE_CHARACTERS = 200_000  # it comes over the network; the longest published ones have a tenth of that


class ScoringTeacher(Protocol):
    """What is needed of a teacher here: a RemoteTeacher or a LocalTeacher."""

    @property
    def info(self) -> TeacherInfo: ...

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_received(self) -> int: ...

    def tokenizer(self) -> tuple[list[bytes], str]: ...

    def score(self, sequences: list[SequenceToScore]) -> list[SequenceScores]: ...


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the teacher's own most likely tokens at a position."""

    text: str
    logprob_nats: float


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One completion token."""

    token_id: int
    text: str
    logprob_nats: float
    alternatives: tuple[Alternative, ...]  # most likely first


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A completion, token by token, after a context of `num_context_tokens`."""

    model_id: str
    num_context_tokens: int
    tokens: tuple[ScoredToken, ...]
    bytes_sent: int
    bytes_received: int

    @property
    def sum_nats(self) -> float:
        return sum(token.logprob_nats for token in self.tokens)

    @property
    def mean_nats(self) -> float:
        """NaN without tokens."""
        return self.sum_nats / len(self.tokens) if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(-self.mean_nats)

    @property
    def bytes_per_token(self) -> float:
        """Of the score messages in both directions."""
        return (self.bytes_sent + self.bytes_received) / len(self.tokens) if self.tokens else math.nan


def score_text(
    teacher: ScoringTeacher, prompt: str, completion: str, *, top: int = 5, chat: bool = False
) -> ScoredText:
    """What the teacher thinks of `completion` after `prompt`.

    The two are tokenised apart, so no token spans the border. A plain prompt gets the special tokens that
    the tokenizer adds by itself; `chat` renders it as a user's message with the teacher's chat template.

    Raises: ConfigError for an empty context or what is not installed, TeacherUnsupportedError for a teacher
        without tokenizer or template, and what `score` raises.
    """
    tokens, tokenizer_json = teacher.tokenizer()
    if not tokenizer_json:
        raise TeacherUnsupportedError(f"{teacher.info.model_id} has a tokenizer that cannot be sent: give token ids")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    text = render_chat(prompt, teacher.info, tokens) if chat else prompt
    context_ids = _encode(tokenizer, text, add_special_tokens=not chat)
    if not len(context_ids):
        raise ConfigError("the prompt makes no token; the teacher needs at least one before the completion")
    completion_ids = _encode(tokenizer, completion, add_special_tokens=False)
    sent_before, received_before = teacher.bytes_sent, teacher.bytes_received
    sequence = SequenceToScore(context_ids, completion_ids, _alternatives_to_ask(teacher.info, top))
    [scores] = teacher.score([sequence])
    return ScoredText(
        model_id=teacher.info.model_id,
        num_context_tokens=len(context_ids),
        tokens=tuple(_scored_tokens(completion_ids, scores, tokenizer)),
        bytes_sent=teacher.bytes_sent - sent_before,
        bytes_received=teacher.bytes_received - received_before,
    )


def render_chat(prompt: str, info: TeacherInfo, tokens: list[bytes]) -> str:
    """One user's message in the teacher's chat template, in transformers' sandbox.

    Raises: TeacherUnsupportedError, ConfigError.
    """
    if not info.chat_template:
        raise TeacherUnsupportedError(f"{info.model_id} has no chat template; ask without chat")
    if len(info.chat_template) > MAX_TEMPLATE_CHARACTERS:
        raise TeacherUnsupportedError(
            f"the chat template has {len(info.chat_template)} characters, more than {MAX_TEMPLATE_CHARACTERS}"
        )
    try:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template
    except ModuleNotFoundError as error:
        raise ConfigError(f"a chat template needs the package {error.name}: pip install 'vopd[train]'") from error
    special_tokens = {
        name: tokens[index].decode("utf-8", "replace")
        for name, index in (("bos_token", info.begin_id), ("eos_token", next(iter(info.end_ids), None)))
        if index is not None
    }
    messages = [{"role": "user", "content": prompt}]
    try:
        [rendered], _ = render_jinja_template(
            [messages], chat_template=info.chat_template, add_generation_prompt=True, **special_tokens
        )
    except jinja2.TemplateError as error:
        raise TeacherUnsupportedError(f"the teacher's chat template cannot render this prompt: {error}") from error
    return str(rendered)


def token_text(tokenizer: Any, token_id: int) -> str:
    """The text of one token, its leading space kept; the raw token where its bytes are not whole characters."""
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return f"<{token_id}>"  # a row of the head beyond the tokenizer
    if "▁" in token:  # SentencePiece's space; its decoder would strip the first one
        return str(token.replace("▁", " "))
    text = tokenizer.decoder.decode([token]) if tokenizer.decoder is not None else token
    return str(token) if "\ufffd" in text or not text else str(text)


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> IntArray:
    return np.array(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, np.int64)


def _alternatives_to_ask(info: TeacherInfo, top: int) -> Support:
    kind: SupportKind = "teacher_top_k"
    k = min(top, info.max_support_size, info.vocab_size)
    return TeacherTopK(k) if k > 0 and kind in info.supports else NoSupport()


def _scored_tokens(completion_ids: IntArray, scores: SequenceScores, tokenizer: Any) -> list[ScoredToken]:
    stops = np.cumsum(scores.counts_T)
    starts = stops - scores.counts_T
    return [
        ScoredToken(
            token_id=int(token_id),
            text=token_text(tokenizer, int(token_id)),
            logprob_nats=float(logprob),
            alternatives=tuple(
                Alternative(token_text(tokenizer, int(other)), float(other_logprob))
                for other, other_logprob in zip(
                    scores.support_ids[start:stop], scores.support_logprobs[start:stop], strict=True
                )
            ),
        )
        for token_id, logprob, start, stop in zip(completion_ids, scores.sampled_logprobs_T, starts, stops, strict=True)
    ]
