"""How much the log-probabilities of vLLM's runners take, and what gives way to them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vopd_server.engines.vllm_config import LaunchSettings, check_length, max_model_len
from vopd_server.engines.vllm_memory import LogprobsShape, MemoryPlan, leave_room, peak_bytes
from vopd_server.errors import ConfigError

GIB = 2**30
V1 = LogprobsShape(runner="V1", vocab_size=151_936, k=1024, itemsize=2, num_gpus=1, longest=32_768)
V2 = replace(V1, runner="V2")


def plan(rows: int, utilization: float, *, are_set: bool) -> MemoryPlan:
    return MemoryPlan(rows, rows_are_set=are_set, utilization=utilization, utilization_is_set=are_set)


def test_v1_takes_every_row_of_a_step_in_its_own_type_in_float32_and_compared() -> None:
    """2 + 4 + 1 bytes a logit, 28 an answer."""
    assert peak_bytes(V1, 2048) == 2048 * (151_936 * 7 + 1025 * 28)
    assert peak_bytes(V1, 4096) == 2 * peak_bytes(V1, 2048)


def test_v1_in_float32_on_several_gpus_takes_the_gathered_logits() -> None:
    wide = replace(V1, itemsize=4, num_gpus=2)
    assert peak_bytes(wide, 1000) == 1000 * (151_936 * 3 * 4 + 1025 * 28)


def test_v2_takes_a_thousand_rows_of_logits_and_keeps_the_answers() -> None:
    logits = 1024 * 151_936 * 3 * 2
    assert peak_bytes(V2, 8192) == logits + (8192 + 32_768) * 1025 * 24
    assert peak_bytes(V2, 512) == logits // 2 + (512 + 32_768) * 1025 * 24


def test_what_fits_stays_as_it_is() -> None:
    for are_set in (True, False):
        asked = plan(2048, 0.92, are_set=are_set)
        assert leave_room(V1, asked, device_bytes=80 * GIB) == asked


@pytest.mark.parametrize(("shape", "rows"), [(V1, 2048), (V2, 8192)])
@pytest.mark.parametrize("device_gib", [12, 16, 24, 40, 80])
def test_a_utilization_that_nobody_has_set_leaves_room(shape: LogprobsShape, rows: int, device_gib: int) -> None:
    fitting = leave_room(shape, plan(rows, 0.92, are_set=False), device_bytes=device_gib * GIB)
    assert fitting.rows == rows
    assert peak_bytes(shape, rows) <= device_gib * GIB * (1 - fitting.utilization)
    assert fitting.utilization > 0.8


def test_rows_that_nobody_has_set_give_way_to_a_utilization_that_somebody_has() -> None:
    asked = MemoryPlan(2048, rows_are_set=False, utilization=0.95, utilization_is_set=True)
    fitting = leave_room(V1, asked, device_bytes=24 * GIB)
    assert fitting == replace(asked, rows=1024)
    assert peak_bytes(V1, 1024) <= 24 * GIB * 0.05


def test_rows_give_way_where_the_utilization_would_fall_too_low() -> None:
    fitting = leave_room(V1, plan(8192, 0.92, are_set=False), device_bytes=12 * GIB)
    assert (fitting.rows, fitting.utilization) == (512, 0.92)


def test_what_the_operator_has_set_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError) as refused:
        leave_room(V1, plan(8192, 0.95, are_set=True), device_bytes=80 * GIB)
    assert str(refused.value) == (
        "log-probabilities of 8192 tokens a step over 151936 ids take 8.33 GiB, and gpu_memory_utilization 0.95 "
        "leaves 4.00 GiB of 80.00 GiB for them: lower engine_args.gpu_memory_utilization, "
        "engine_args.max_num_batched_tokens, max_context_length or max_top_k"
    )


# ---------------------------------------------------------------- lengths


def settings(asked: int | None, bound: int | None = None) -> LaunchSettings:
    return LaunchSettings("m", None, "auto", asked, 10, {}, False, max_request_tokens=bound)


@pytest.mark.parametrize(
    ("asked", "bound", "expected"),
    [
        (None, None, 4096),
        (100, None, 101),
        (4096, None, 4096),
        (None, 1000, 1001),
        (100, 1000, 101),
        (5000, 9000, 4096),
    ],
)
def test_one_token_more_than_a_request_may_have_is_room_enough(
    asked: int | None, bound: int | None, expected: int
) -> None:
    assert max_model_len(settings(asked, bound), 4096) == expected


def test_a_kv_cache_too_small_for_what_was_asked_for_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="max_context_length 4000: the KV cache holds a sequence of 511 tokens; lower"
    ):
        check_length(settings(4000), wanted=4001, fitted=512)


def test_a_kv_cache_too_small_for_the_model_bounds_it_unless_nothing_is_left() -> None:
    check_length(settings(None), wanted=4096, fitted=512)
    check_length(settings(4000), wanted=4001, fitted=4001)
    with pytest.raises(ConfigError, match="holds a sequence of 1 tokens"):
        check_length(settings(None), wanted=4096, fitted=2)
