"""What is launched, as vLLM's own configuration, for devices of a size that is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import SchedulerConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vopd_server.engines import vllm_config
from vopd_server.engines.vllm_config import LaunchSettings, engine_config
from vopd_server.errors import ConfigError

MIB = 2**20


def settings(model: Path, **changes: Any) -> LaunchSettings:
    told = {"max_context_length": 1000, "max_top_k": 100, "engine_args": {}, "max_request_tokens": 5000, **changes}
    return LaunchSettings(model=str(model), revision=None, dtype="bfloat16", trust_remote_code=False, **told)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda num_bytes: monkeypatch.setattr(vllm_config, "_device_bytes", lambda: num_bytes)


def test_the_settings_reach_vllm(demo_model_dir: Path) -> None:
    config = engine_config(settings(demo_model_dir, engine_args={"max_num_seqs": 7}), None)
    assert config.model_config.max_model_len == 1001
    assert config.model_config.max_logprobs == 101
    assert config.model_config.original_max_model_len == -1  # it is lowered to what the KV cache holds
    assert config.scheduler_config.max_num_batched_tokens <= vllm_config.V1_MAX_NUM_BATCHED_TOKENS
    assert config.scheduler_config.max_num_seqs == 7
    assert config.scheduler_config.get_scheduler_cls().__name__.endswith("ScoringScheduler")
    assert config.cache_config.block_size == vllm_config.CPU_BLOCK_SIZE


@pytest.mark.parametrize("is_async", [True, False])
def test_the_scheduler_is_async_where_vllms_own_would_be(is_async: bool) -> None:
    """A CPU has no asynchronous scheduling, so the other one is looked at as vLLM would find it."""
    scheduler = SchedulerConfig(
        max_model_len=100, is_encoder_decoder=False, scheduler_cls=vllm_config.SCHEDULERS[is_async]
    )
    assert issubclass(scheduler.get_scheduler_cls(), AsyncScheduler) == is_async


def test_an_operators_own_block_size_stands(demo_model_dir: Path) -> None:
    found = engine_config(settings(demo_model_dir, engine_args={"block_size": 64}), None)
    assert found.cache_config.block_size == 64


def test_no_room_is_made_for_what_is_not_admitted(demo_model_dir: Path) -> None:
    config = engine_config(settings(demo_model_dir, max_context_length=None), None)
    assert config.model_config.max_model_len == 5001


def test_log_probabilities_get_room_on_a_small_device(demo_model_dir: Path, device: Any) -> None:
    """49,152 ids x 7 bytes x 2048 rows are 672 MiB, and 5 more for the answers."""
    device(4096 * MIB)
    config = engine_config(settings(demo_model_dir, engine_args={"max_num_batched_tokens": 2048}), None)
    assert config.cache_config.gpu_memory_utilization == pytest.approx(0.83)
    assert config.scheduler_config.max_num_batched_tokens == 2048
    config = engine_config(settings(demo_model_dir, engine_args={"gpu_memory_utilization": 0.9}), None)
    assert config.cache_config.gpu_memory_utilization == pytest.approx(0.9)
    assert config.scheduler_config.max_num_batched_tokens == 1024


def test_an_operators_own_figures_are_refused_when_they_leave_no_room(demo_model_dir: Path, device: Any) -> None:
    device(4096 * MIB)
    told = {"gpu_memory_utilization": 0.9, "max_num_batched_tokens": 2048}
    with pytest.raises(ConfigError, match=r"2048 tokens a step over 49152 ids take 0\.66 GiB, .* leaves 0\.40 GiB of"):
        engine_config(settings(demo_model_dir, engine_args=told), None)
