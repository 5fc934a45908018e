"""A teacher that is far away: a TCP proxy on loopback that hands on what the server says some seconds later.

Every byte of an answer is shifted in time by the same delay. The order is kept, nothing is throttled, and what the
client says passes at once, so requests that were sent together come back together, one delay later.

    python bench/overlap_proxy.py 127.0.0.1:50051 --delay-s 2
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from machine import end_with_parent

LISTENING = re.compile(r"listening at (\S+)")
BLOCK_BYTES = 1 << 16


@contextmanager
def delayed(teacher_url: str, delay_s: float) -> Iterator[str]:
    """The address of a proxy process in front of `teacher_url`, a grpc:// address; ended with the block."""
    command = [sys.executable, __file__, urlsplit(teacher_url).netloc, "--delay-s", str(delay_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, process_group=0, preexec_fn=end_with_parent
    ) as process:
        try:
            assert process.stdout is not None
            listening = LISTENING.search(process.stdout.readline())
            if listening is None:
                raise RuntimeError("the proxy did not start")
            yield f"grpc://{listening[1]}"
        finally:
            process.terminate()


async def serve(host: str, port: int, delay_s: float) -> asyncio.Server:
    """A proxy on a free port of loopback. Both directions of a connection end together."""

    async def connected(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        server_in, server_out = await asyncio.open_connection(host, port)
        ways = [
            asyncio.create_task(hand_on(client_in, server_out, 0.0)),
            asyncio.create_task(hand_on(server_in, client_out, delay_s)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in (server_out, client_out):
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

    return await asyncio.start_server(connected, "127.0.0.1", 0)


async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Writes what was read, `delay_s` after it was read, until the reader's side ends.

    Reading never waits for writing: a slow reader behind the proxy would otherwise hold the server back.
    """
    blocks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def write() -> None:
        while True:
            due_s, block = await blocks.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if not block:
                return
            writer.write(block)
            await writer.drain()

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        block = b"first"
        while block:
            block = await reader.read(BLOCK_BYTES)
            blocks.put_nowait((time.monotonic() + delay_s, block))


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="host:port")
    parser.add_argument("--delay-s", type=float, required=True)
    arguments = parser.parse_args()
    host, _, port = arguments.server.rpartition(":")
    server = await serve(host, int(port), arguments.delay_s)
    host, port = server.sockets[0].getsockname()[:2]
    sys.stdout.write(f"listening at {host}:{port}\n")
    sys.stdout.flush()
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_main())
