"""What the service needs of an engine."""

from __future__ import annotations

from typing import Protocol

from vopd_server.errors import EngineDeadError
from vopd_server.status import EngineCounters
from vopd_server.types import EngineInfo, ScoreRequest, Scores, TokenizerInfo


class Engine(Protocol):
    """Scores validated requests. Concurrent calls are batched by the engine itself.

    The service guarantees: ids in [0, vocab_size), C >= 1, C + T <= max_context_length, a support kind that
    `info.supports` holds, finite temperature > 0 (1 unless `any_temperature`). Cancelling a call gives its
    place in the queue back.
    """

    @property
    def info(self) -> EngineInfo:
        """Set once it has started; the file of `info.head` is there until it is closed."""
        ...

    @property
    def tokenizer(self) -> TokenizerInfo: ...

    @property
    def counters(self) -> EngineCounters: ...

    async def start(self) -> None:
        """Loads, warms up; returns when the first request can be scored."""
        ...

    async def score(self, request: ScoreRequest) -> Scores:
        """Scores one completion.

        Raises: EngineError when the engine failed or produced NaN; EngineDeadError when it died or hangs; never
            returns invented scores.
        """
        ...

    async def wait_until_dead(self) -> EngineDeadError:
        """Watches a started engine; returns why it can score nothing any more. Cancel it to stop watching."""
        ...

    async def close(self) -> None:
        """Fails what is still queued with UnavailableError and frees the model."""
        ...
