"""A teacher process whose engine waits for its tests: `python held_teacher.py [load] [FLAGS of ServerConfig]`.

It is the real process around a fake engine that says "in the engine" when a call arrives and answers it after
SIGUSR1. With `load` the engine never gets ready.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from fake_engine import FakeEngine
from vopd_server.config import ServerConfig
from vopd_server.lifecycle import serve
from vopd_server.logs import configure_logging
from vopd_server.types import ScoreRequest, Scores
from vopd_settings import load_settings


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class HeldEngine(FakeEngine):
    def __init__(self, *, never_loads: bool) -> None:
        super().__init__()
        self._never_loads = never_loads

    async def start(self) -> None:
        if self._never_loads:
            say("loading")
            await asyncio.Event().wait()
        self.hold()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.let_go)

    async def score(self, request: ScoreRequest) -> Scores:
        say("in the engine")
        return await super().score(request)


async def run(flags: list[str], *, never_loads: bool) -> int:
    free_ports = ["--http-port", "0", "--admin-port", "0"]
    config = load_settings(
        ServerConfig,
        ["--model", "held", *free_ports, *(flags or ["--port", "0"])],
        prog="held",
        env_prefix="HELD_",
    )
    configure_logging(config.log_level, config.log_format)
    return await serve(config, HeldEngine(never_loads=never_loads), announce=say)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    never_loads = arguments[:1] == ["load"]
    sys.exit(asyncio.run(run(arguments[never_loads:], never_loads=never_loads)))
