"""The teacher client for code that blocks, such as a training loop."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from vopd_client.teacher.channel import read_api_key
from vopd_client.teacher.client import TeacherClient
from vopd_client.teacher.codec import FloatTypeName
from vopd_client.teacher.loop_thread import LoopThread
from vopd_client.teacher.patience import Timing
from vopd_client.teacher.replica import ReplicaUse
from vopd_client.teacher.stream import ScoreStream
from vopd_client.types import SequenceScores, SequenceToScore, TeacherInfo


class RemoteTeacher:
    """A connected teacher; implements `vopd_client.types.Teacher`. Every method may be called from any thread.

    One `TeacherClient` and one of its streams live on an event loop in a background thread.
    """

    def __init__(self, loop: LoopThread, client: TeacherClient, stream: ScoreStream, temperature: float) -> None:
        """Use `connect`."""
        self._loop = loop
        self._client = client
        self._stream = stream
        self._temperature = temperature

    @classmethod
    def connect(
        cls,
        urls: str | list[str] | tuple[str, ...],
        *,
        api_key: str | None = None,
        api_key_file: Path | None = None,
        plaintext: bool = False,
        tls_ca_file: Path | None = None,
        timeout_s: float = 600.0,
        window: int = 64,
        float_type: FloatTypeName = "float32",
        temperature: float = 1.0,
        expected_fingerprint: str | None = None,
        expected_revision: str | None = None,
        timing: Timing | None = None,
    ) -> RemoteTeacher:
        """Connects, waiting up to `timeout_s` for a teacher that is not there yet. Arguments as `TeacherClient`.

        temperature: of every score that this teacher is asked for.

        Raises: ConfigError, HandshakeError, TeacherPermissionError, TeacherUnavailableError.
        """
        if api_key_file is not None:
            api_key = read_api_key(api_key_file)
        client = TeacherClient(
            urls,
            api_key=api_key,
            plaintext=plaintext,
            tls_ca_file=tls_ca_file,
            timeout_s=timeout_s,
            window=window,
            float_type=float_type,
            expected_fingerprint=expected_fingerprint,
            expected_revision=expected_revision,
            timing=timing,
        )
        loop = LoopThread("vopd-teacher")
        try:
            loop.run(client.connect())
        except BaseException:
            loop.run(client.close())
            loop.close()
            raise
        return cls(loop, client, client.open_stream(temperature=temperature), temperature)

    @property
    def info(self) -> TeacherInfo:
        """As `TeacherClient.info`."""
        return self._client.info

    @property
    def bytes_sent(self) -> int:
        """As `TeacherClient.bytes_sent`."""
        return self._client.bytes_sent

    @property
    def bytes_received(self) -> int:
        """As `TeacherClient.bytes_received`."""
        return self._client.bytes_received

    @property
    def head_bytes_received(self) -> int:
        """As `TeacherClient.head_bytes_received`."""
        return self._client.head_bytes_received

    @property
    def replicas(self) -> tuple[ReplicaUse, ...]:
        """What each replica has done so far, in the order of their URLs."""
        return self._client.replicas

    @property
    def waiting_reason(self) -> str:
        """As `TeacherClient.waiting_reason`."""
        return self._client.waiting_reason

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        """Sends one sequence over the stream and returns at once.

        The future raises what `ScoreStream.submit` does; TeacherUnavailableError when no answer at all came
        for `timeout_s`, or when this teacher is closed.
        """
        return self._loop.start(self._stream.submit(sequence))

    def score(self, sequences: Sequence[SequenceToScore]) -> list[SequenceScores]:
        """Scores a list, in its order, in as few requests as the teacher's limits allow.

        Raises: as `TeacherClient.score`.
        """
        return self._loop.run(self._client.score(sequences, temperature=self._temperature))

    def tokenizer(self) -> tuple[list[bytes], str]:
        """The id -> token table and the tokenizer's JSON."""
        return self._loop.run(self._client.tokenizer())

    def head_file(self, cache_dir: Path | None = None) -> Path:
        """The safetensors file of the output head, from the cache or fetched into it. As `TeacherClient.head_file`."""
        return self._loop.run(self._client.head_file(cache_dir))

    def close(self) -> None:
        """Fails what is unanswered with TeacherUnavailableError and ends the thread."""
        if not self._loop.is_closing:
            self._loop.run(self._client.close())
            self._loop.close()

    def __enter__(self) -> RemoteTeacher:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
