"""Several training processes on this machine, without a launcher."""

from __future__ import annotations

import socket


def process_group(size: int) -> list[dict[str, str]]:
    """The environment of each process of a group on this machine, as torchrun sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
