"""In vLLM's own processes: ends them when the server is gone.

EngineCore and its workers outlive a server that was killed, with their memory and the GPU's, and the next server
finds none. vLLM loads this through the entry-point group `vllm.general_plugins` in each of its processes; where no
vopd-server has started them it does nothing.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

SERVER_PID_VARIABLE = "VOPD_VLLM_SERVER_PID"


def end_with_the_server() -> None:
    """Starts a thread that waits for the end of the process that `SERVER_PID_VARIABLE` names."""
    told = os.environ.get(SERVER_PID_VARIABLE, "")
    if not told.isdecimal() or int(told) == os.getpid() or not hasattr(os, "pidfd_open"):
        return
    threading.Thread(target=_wait_and_exit, args=(int(told),), name="vopd-server-watch", daemon=True).start()


def _wait_and_exit(server_pid: int) -> None:
    """Without a word: whoever could read it is gone."""
    with suppress(ProcessLookupError):  # gone already
        descriptor = os.pidfd_open(server_pid)
        select.select([descriptor], [], [])
    os._exit(1)
