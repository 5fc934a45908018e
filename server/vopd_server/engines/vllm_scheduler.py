"""In vLLM's engine process: its own scheduler, whose requests read the prefix cache for their context and no further.

vLLM computes log-probabilities only for the prompt tokens that it forwards. Its own limit for a cache hit is the last
token of a prompt; ours is row C - 1, which scores the first completion token. A hit past it is routine: a context that
ends on a block's boundary is wholly cached by the first of its group, and rollouts that open with the same words cache
them for one another.

Imported by vLLM by its name (see `vllm_config`), and only where vLLM is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vopd_server.engines.vllm_requests import CONTEXT_TOKENS


class _Shortened:
    """A request that ends with its context, as far as the prefix cache looks at it."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def within_contexts(get_computed_blocks: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same lookup; of requests that say how long their context is, up to its last token but one."""

    def look_up(request: Any) -> Any:
        context_tokens = (getattr(request.sampling_params, "extra_args", None) or {}).get(CONTEXT_TOKENS)
        return get_computed_blocks(request if context_tokens is None else _Shortened(request, context_tokens))

    return look_up


class ScoringScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not there where types are checked
    """vLLM's scheduler without a step's head start."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.kv_cache_manager.get_computed_blocks = within_contexts(self.kv_cache_manager.get_computed_blocks)


class AsyncScoringScheduler(AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler that plans a step while another one runs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.kv_cache_manager.get_computed_blocks = within_contexts(self.kv_cache_manager.get_computed_blocks)
