"""A teacher process whose engine waits for its tests: `python held_teacher.py [load|child|head] [FLAGS]`.

It is the real process around a fake engine that, once the teacher is ready, says "in the engine" when a call arrives
and answers it after SIGUSR1; at SIGUSR2 it dies. With `load` it never gets ready; with `child` it has a process of its
own, as vLLM has; with `head` it gives its output head away.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import sys
import time

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
    def __init__(self, mode: str) -> None:
        super().__init__(gives_head=mode == "head")
        self._mode = mode

    async def start(self) -> None:
        if self._mode == "load":
            say("loading")
            await asyncio.Event().wait()
        if self._mode == "child":
            multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,)).start()
        await super().start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.let_go)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, self.die, "killed by its test")

    async def score(self, request: ScoreRequest) -> Scores:
        if self.is_held:
            say("in the engine")
        return await super().score(request)


async def run(flags: list[str], mode: str) -> int:
    free_ports = ["--http-port", "0", "--admin-port", "0"]
    config = load_settings(
        ServerConfig,
        ["--model", "held", *free_ports, *(flags or ["--port", "0"])],
        prog="held",
        env_prefix="HELD_",
    )
    configure_logging(config.log_level, config.log_format)
    engine = HeldEngine(mode)

    def announce(line: str) -> None:
        engine.hold()  # the golden probe has been answered
        say(line)

    return await serve(config, engine, announce=announce)


if __name__ == "__main__":
    mode, flags = (
        (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] in (["load"], ["child"], ["head"]) else ("", sys.argv[1:])
    )
    sys.exit(asyncio.run(run(flags, mode)))
