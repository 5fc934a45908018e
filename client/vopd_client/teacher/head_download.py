"""Fetching a teacher's output head into the cache, over as many connections as it takes."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

from vopd_client.errors import HandshakeError, TeacherUnavailableError, TeacherUnsupportedError
from vopd_client.teacher.head_cache import HeadCache, IncomingHead
from vopd_client.teacher.patience import Patience
from vopd_client.teacher.replica import Connection
from vopd_client.teacher.transport import CallFailed
from vopd_client.types import TeacherInfo

# Every piece is progress, so no time-out ends a download that breaks again and again: this does.
MAX_BROKEN_DOWNLOADS = 10


def require_head(info: TeacherInfo) -> str:
    """The SHA-256 of the head's file. Raises: TeacherUnsupportedError when it is not given away."""
    if not info.head_sha256:
        raise TeacherUnsupportedError(
            f"teacher {info.model_id} ({info.engine}) does not give its output head away, without which there is no "
            "whole distribution; its operator can allow it with `vopd-server serve --allow-full-vocab` "
            "(transformers engine)"
        )
    return info.head_sha256


class HeadDownload:
    """One head, from the start again with every `attempt`."""

    def __init__(self, cache: HeadCache, sha256: str, *, patience: Patience) -> None:
        self._cache = cache
        self._sha256 = sha256
        self._patience = patience
        self._num_broken = 0

    async def attempt(self, connection: Connection) -> Path:
        """The file in the cache.

        Raises: CallFailed; TeacherUnavailableError once it broke too often; HandshakeError for a file that is not
            what was announced; ConfigError for a disk that does not take it.
        """
        with self._cache.receive(self._sha256) as incoming:
            try:
                await self._receive(incoming, connection)
            except CallFailed as error:
                self._note_broken(error, incoming)
                raise
            return await asyncio.to_thread(incoming.keep)

    async def _receive(self, incoming: IncomingHead, connection: Connection) -> None:
        announced_bytes = 0  # a gateway may hide it
        async with aclosing(connection.transport.get_head()) as pieces:
            async for piece in pieces:
                self._patience.progressed()
                connection.replica.traffic.head_bytes_received += len(piece.data)
                announced_bytes = announced_bytes or piece.num_bytes
                await asyncio.to_thread(incoming.write, piece.data)
                if incoming.num_bytes > (announced_bytes or incoming.num_bytes):
                    break  # so that it cannot fill the disk
        if announced_bytes not in (0, incoming.num_bytes):
            sent = "more" if incoming.num_bytes > announced_bytes else str(incoming.num_bytes)
            raise HandshakeError(
                f"{connection.url} announced an output head of {announced_bytes} bytes and sent {sent}"
            )

    def _note_broken(self, error: CallFailed, incoming: IncomingHead) -> None:
        """Counts an attempt that broke after it had begun; one that was refused is for the time-out to end."""
        if not (incoming.num_bytes and error.failure.is_retryable):
            return
        self._num_broken += 1
        if self._num_broken == MAX_BROKEN_DOWNLOADS:
            raise TeacherUnavailableError(
                f"the download of the teacher's output head broke {MAX_BROKEN_DOWNLOADS} times; the last time after "
                f"{incoming.num_bytes} bytes: {error.failure.reason}"
            ) from error
