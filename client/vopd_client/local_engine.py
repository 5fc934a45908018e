"""The server's embedded engine, spoken to in the client's types.

With `local_teacher`, which loads it on demand, the one place where the client imports the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import vopd_server.errors as server_errors
import vopd_server.types as server_types
from vopd_client.errors import (
    ConfigError,
    TeacherError,
    TeacherInternalError,
    TeacherRequestError,
    TeacherUnavailableError,
    TeacherUnsupportedError,
)
from vopd_client.teacher.score_checks import checked_scores
from vopd_client.types import (
    Candidates,
    HiddenStates,
    NoSupport,
    SequenceScores,
    SequenceToScore,
    Support,
    TeacherInfo,
    TeacherTopK,
)
from vopd_proto import MAX_MESSAGE_BYTES
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.validation import Limits, SequenceShape, check_request, check_shapes, check_temperature

_CLIENT_ERRORS: dict[type[server_errors.TeacherError], type[Exception]] = {
    server_errors.ConfigError: ConfigError,
    server_errors.InvalidRequestError: TeacherRequestError,
    server_errors.UnsupportedError: TeacherUnsupportedError,
    server_errors.UnavailableError: TeacherUnavailableError,
    server_errors.EngineError: TeacherInternalError,
}


@contextmanager
def client_errors() -> Iterator[None]:
    """Within it, the server's errors come out as the client's."""
    try:
        yield
    except server_errors.TeacherError as error:
        raise _CLIENT_ERRORS.get(type(error), TeacherError)(str(error)) from error


@dataclass(frozen=True)
class LocalEngine:
    """An engine without transport, queue or limits; requests are validated as the service would."""

    engine: TransformersEngine
    temperature: float

    async def start(self) -> TeacherInfo:
        """Loads the model. Raises: ConfigError."""
        try:
            with client_errors():
                await self.engine.start()
                check_temperature(self.temperature, self.engine.info)
        except Exception:
            await self.engine.close()
            raise
        return self.info

    async def close(self) -> None:
        await self.engine.close()

    @property
    def info(self) -> TeacherInfo:
        engine, tokenizer, limits = self.engine.info, self.engine.tokenizer, self._limits
        return TeacherInfo(
            model_id=engine.model_id,
            model_revision=engine.model_revision,
            fingerprint=tokenizer.fingerprint,
            num_ids=len(tokenizer.tokens),
            begin_id=tokenizer.begin_id,
            end_ids=tokenizer.end_ids,
            pad_id=tokenizer.pad_id,
            chat_template=tokenizer.chat_template,
            vocab_size=engine.vocab_size,
            hidden_size=engine.hidden_size,
            max_context_length=engine.max_context_length,
            dtype=engine.dtype,
            engine=engine.engine,
            engine_version=engine.engine_version,
            server_version="in this process",
            supports=engine.supports,
            any_temperature=engine.any_temperature,
            deterministic=engine.deterministic,
            max_sequences_per_request=limits.max_sequences_per_request,
            max_tokens_per_request=limits.max_tokens_per_request,
            max_support_size=limits.max_top_k,
            head_sha256=engine.head.sha256 if engine.head is not None else "",
        )

    @property
    def tokenizer(self) -> tuple[list[bytes], str]:
        return list(self.engine.tokenizer.tokens), self.engine.tokenizer.tokenizer_json

    async def score(self, sequence: SequenceToScore) -> SequenceScores:
        """Scores one sequence, with the checks that an answer over the wire gets."""
        with client_errors():
            request = self._validated(sequence)
            scores = await self.engine.score(request)
        nothing = np.empty(0, np.float32)
        no_ids = np.empty(0, np.int64)
        return checked_scores(
            sequence,
            sampled_logprobs_T=scores.sampled_logprobs_T,
            support_logprobs=nothing if scores.support_logprobs is None else scores.support_logprobs.reshape(-1),
            top_k_ids=no_ids if scores.support_ids_TK is None else scores.support_ids_TK.reshape(-1),
            hidden_states_TH=scores.hidden_states_TH,
            vocab_size=self.engine.info.vocab_size,
            hidden_size=self.engine.info.hidden_size,
            queue_time_s=scores.queue_time_s,
            engine_time_s=scores.engine_time_s,
        )

    def head_file(self) -> Path:
        """The engine's own file of its output head. Raises: TeacherUnsupportedError when it made none."""
        head = self.engine.info.head
        if head is None:
            raise TeacherUnsupportedError(f"{self.engine.info.model_id} was loaded without allow_full_vocab")
        return head.path

    @property
    def _limits(self) -> Limits:
        """Nothing but the model's own bounds: there is no other client and no wire."""
        info = self.engine.info
        return Limits(
            max_context_length=info.max_context_length,
            max_sequences_per_request=1,
            max_tokens_per_request=info.max_context_length,
            max_top_k=info.vocab_size,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )

    def _validated(self, sequence: SequenceToScore) -> server_types.ScoreRequest:
        """Raises: the server's InvalidRequestError, UnsupportedError."""
        request = server_types.ScoreRequest(
            request_id="",
            context_ids=np.asarray(sequence.context_ids, np.int64),
            completion_ids=np.asarray(sequence.completion_ids, np.int64),
            support=_server_support(sequence.support),
            temperature=self.temperature,
        )
        match request.support:
            case server_types.TeacherTopK(k=k):
                num_candidates = 0
            case server_types.Candidates(ids=ids):
                k, num_candidates = 0, len(ids)
            case _:
                k = num_candidates = 0
        shape = SequenceShape(
            field="sequence",
            context_length=len(request.context_ids),
            completion_length=len(request.completion_ids),
            kind=request.support.kind,
            k=k,
            num_candidates=num_candidates,
        )
        check_shapes([shape], info=self.engine.info, limits=self._limits)
        check_request(request, field="sequence", info=self.engine.info, limits=self._limits)
        return request


def _server_support(support: Support) -> server_types.Support:
    match support:
        case TeacherTopK(k=k):
            return server_types.TeacherTopK(k)
        case Candidates(ids=ids, counts_T=counts_T):
            return server_types.Candidates(ids, counts_T)
        case HiddenStates():
            return server_types.HiddenStates()
        case NoSupport():
            return server_types.NoSupport()
