"""How much is let into vLLM at a time."""

from __future__ import annotations

from vopd_server.engines.vllm_backend import window_tokens


def test_a_step_is_let_in_at_a_time_and_never_more_than_the_cache_holds() -> None:
    assert window_tokens(max_batch_tokens=8192, kv_cache_tokens=100_000) == 8192
    assert window_tokens(max_batch_tokens=8192, kv_cache_tokens=5_000) == 5_000
    assert window_tokens(max_batch_tokens=8192, kv_cache_tokens=0) == 8192, "vLLM does not tell"
