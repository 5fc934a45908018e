"""A teacher in the student's own process: the server's embedded engine, without the wire.

The client does not import the server, except here and in `local_engine`, and only when a local teacher is
asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vopd_client.errors import ConfigError
from vopd_client.teacher.loop_thread import LoopThread
from vopd_client.types import SequenceScores, SequenceToScore, TeacherInfo

if TYPE_CHECKING:
    from vopd_client.local_engine import LocalEngine


class LocalTeacher:
    """Implements `vopd_client.types.Teacher`. Callable from any thread."""

    def __init__(self, loop: LoopThread, engine: LocalEngine, info: TeacherInfo) -> None:
        """Use `load`."""
        self._loop = loop
        self._engine = engine
        self._info = info

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str | None = None,
        deterministic: bool = False,
        temperature: float = 1.0,
        max_batch_tokens: int = 16_384,
        trust_remote_code: bool = False,
        allow_full_vocab: bool = True,
    ) -> LocalTeacher:
        """Loads a directory or hub id and returns when it can score.

        dtype: auto is the checkpoint's own. device: None takes the best there is.
        temperature: of every log-probability that this teacher gives.
        max_batch_tokens: padded tokens of one forward pass, at most.
        allow_full_vocab: hidden states and `head_file`, for a copy of the output head on the disk.

        Raises: ConfigError when the server's extra is not installed or the model cannot be loaded.
        """
        try:
            from vopd_client.local_engine import LocalEngine
            from vopd_server.engines.transformers import TransformersEngine
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"a teacher in this process needs the package {error.name}: pip install 'vopd[server]', "
                "or give teacher_url instead of teacher_model"
            ) from error
        engine = LocalEngine(
            TransformersEngine(
                model=model,
                revision=revision,
                dtype=dtype,
                device=device,
                max_batch_tokens=max_batch_tokens,
                deterministic=deterministic,
                trust_remote_code=trust_remote_code,
                allow_full_vocab=allow_full_vocab,
            ),
            temperature,
        )
        loop = LoopThread("vopd-local-teacher")
        try:
            info = loop.run(engine.start())
        except BaseException:
            loop.close()
            raise
        return cls(loop, engine, info)

    @property
    def info(self) -> TeacherInfo:
        return self._info

    @property
    def bytes_sent(self) -> int:
        return 0

    @property
    def bytes_received(self) -> int:
        return 0

    @property
    def waiting_reason(self) -> str:
        """Always empty: it is here or it failed."""
        return ""

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        """Queues one sequence; the engine batches what is queued together."""
        return self._loop.start(self._engine.score(sequence))

    def score(self, sequences: Sequence[SequenceToScore]) -> list[SequenceScores]:
        """Scores a list, in its order; all or nothing."""

        async def score_all() -> list[SequenceScores]:
            return await asyncio.gather(*map(self._engine.score, sequences))

        return self._loop.run(score_all())

    def tokenizer(self) -> tuple[list[bytes], str]:
        """The id -> token table and the tokenizer's JSON."""
        return self._engine.tokenizer

    def head_file(self, cache_dir: Path | None = None) -> Path:
        """The safetensors file of the output head. It lies where the engine put it, which is never `cache_dir`,
        and lasts until this teacher is closed."""
        return self._engine.head_file()

    def close(self) -> None:
        """Fails what is queued with TeacherUnavailableError and frees the model."""
        if not self._loop.is_closing:
            self._loop.run(self._engine.close())
            self._loop.close()

    def __enter__(self) -> LocalTeacher:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
