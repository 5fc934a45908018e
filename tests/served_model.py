"""A tiny model behind the real server on real sockets, in a thread of the test's own process: for tests that block."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from vopd_client.teacher.loop_thread import LoopThread
from vopd_server.config import ServerConfig
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.lifecycle import TeacherServer
from vopd_server.types import ScoreRequest, Scores


class RecordingEngine(TransformersEngine):
    """requests: what reached it, in the order of arrival."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.requests: list[ScoreRequest] = []

    async def score(self, request: ScoreRequest) -> Scores:
        self.requests.append(request)
        return await super().score(request)


class ServedModel:
    """`with ServedModel(directory) as teacher:` serves at `teacher.url`."""

    def __init__(self, directory: Path) -> None:
        self._engine = RecordingEngine(
            model=str(directory), device="cpu", dtype="float32", deterministic=True, allow_full_vocab=True
        )
        self._loop = LoopThread("served-model")
        self._server: TeacherServer | None = None
        self._directory = directory

    @property
    def url(self) -> str:
        assert self._server is not None, "not started"
        return self._server.url

    @property
    def requests(self) -> list[ScoreRequest]:
        """Without those of its own golden probe."""
        return self._engine.requests

    async def _start(self) -> None:
        config = ServerConfig(model=str(self._directory), port=0, http_port=None, admin_port=None)
        self._server = TeacherServer(config, self._engine)
        await self._server.start()
        await self._server.load()
        self._engine.requests.clear()

    def __enter__(self) -> ServedModel:
        self._loop.run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._loop.run(self._server.close())
        self._loop.close()
