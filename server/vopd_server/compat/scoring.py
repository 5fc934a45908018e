"""What another protocol's request asks, taken through the service: validate, admit, score, answer."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vopd_proto.arrays import IntArray
from vopd_server.answer_codec import check_answer_fits, json_format
from vopd_server.calls import Call
from vopd_server.errors import InvalidRequestError
from vopd_server.http_request import MAX_JSON_BYTES
from vopd_server.service import TeacherService
from vopd_server.types import Candidates, NoSupport, ScoreRequest, Scores, Support, TeacherTopK
from vopd_server.validation import SequenceShape

Scored = Sequence[tuple[ScoreRequest, Scores]]


class TokenTexts:
    """Each id's entry of the tokenizer's table as a JSON string, made when it is first needed."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._made: dict[int, str] = {}

    def json_of(self, token_id: int) -> str:
        """`null` for an id that the table does not have."""
        made = self._made.get(token_id)
        if made is None:
            token = self._tokens[token_id] if token_id < len(self._tokens) else b""
            made = self._made[token_id] = json.dumps(token.decode("utf-8", "replace") if token else None)
        return made


@dataclass(frozen=True, slots=True)
class Served:
    """What a protocol has to know of the teacher. max_top_k: for the tenant that asks."""

    model_id: str
    model_revision: str
    vocab_size: int
    max_top_k: int
    texts: TokenTexts


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The same, whatever the protocol: `prompts[i][first_scored:]` is scored given what stands before it.

    prompts_name: what the protocol calls the prompts. other_names: what it calls other fields of ours.
    """

    prompts_name: str
    prompts: list[IntArray]
    is_batch: bool
    support: Support
    temperature: float
    request_id: str = ""
    first_scored: int = 1
    other_names: Mapping[str, str] = field(default_factory=dict)


Write = Callable[[Scored, str], bytes]  # the answer, given the request id that it shows
Read = Callable[[bytes, Served], tuple[Asked, Write]]


def top_k_of(name: str, k: int, served: Served) -> Support:
    """The k best, or the realised token alone. Raises: InvalidRequestError."""
    if not 0 <= k <= served.max_top_k:
        raise InvalidRequestError(name, f"{k}; it must lie in [0, {served.max_top_k}]")
    return TeacherTopK(k) if k else NoSupport()


async def scored_answer(service: TeacherService, call: Call, asked: Asked, write: Write) -> bytes:
    """All or nothing; what is admitted is held until the answer is written, in a thread.

    Raises: as `TeacherService.scored_batch`, in the protocol's own names.
    """
    call.request_id = asked.request_id or uuid.uuid4().hex
    shapes = shapes_of(asked)
    call.num_sequences = len(shapes)
    call.num_tokens = sum(shape.num_tokens for shape in shapes)

    def unpack() -> list[ScoreRequest]:
        limit = "the bound on answers in JSON"
        check_answer_fits(shapes, json_format(service.info), MAX_JSON_BYTES, limit=limit)
        return requests_of(asked, call.request_id)

    try:
        async with service.scored_batch(call.tenant, shapes, unpack, temperature=asked.temperature) as scored:
            started_s = time.monotonic()
            answer = await asyncio.to_thread(write, scored, call.request_id)
            service.metrics.stage(call.tenant.id, "encode", time.monotonic() - started_s)
    except InvalidRequestError as error:
        name = {"sequences": asked.prompts_name, **asked.other_names}.get(error.field)
        if name is None:
            raise
        raise InvalidRequestError(name, str(error).removeprefix(f"{error.field}: ")) from error
    return answer


def shapes_of(asked: Asked) -> list[SequenceShape]:
    """The lengths of every prompt, under the protocol's name for it."""
    support = asked.support
    return [
        SequenceShape(
            field=f"{asked.prompts_name}[{index}]" if asked.is_batch else asked.prompts_name,
            context_length=asked.first_scored,
            completion_length=len(prompt) - asked.first_scored,
            kind=support.kind,
            k=support.k if isinstance(support, TeacherTopK) else 0,
            num_candidates=len(support.ids) if isinstance(support, Candidates) else 0,
        )
        for index, prompt in enumerate(asked.prompts)
    ]


def requests_of(asked: Asked, request_id: str) -> list[ScoreRequest]:
    """One a prompt, as the service speaks of it."""
    return [
        ScoreRequest(
            request_id=request_id,
            context_ids=prompt[: asked.first_scored],
            completion_ids=prompt[asked.first_scored :],
            support=asked.support,
            temperature=asked.temperature,
        )
        for prompt in asked.prompts
    ]
