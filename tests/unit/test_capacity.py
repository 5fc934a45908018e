"""The capacity model's formulae against counts made otherwise: by torch, by loops, by real messages."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import capacity
from capacity_check import calibration_points, check
from capacity_engine import Costs, Work, fitted, held_bytes, one_rate, wire_bytes_of, work_of
from capacity_figures import ACCELERATORS, MODELS, model_of_config
from capacity_gpu import gpu_memory, predict
from capacity_model import (
    Load,
    TeacherModel,
    flops_a_scored_token,
    group_flops,
    tokens_read_a_scored_token,
    uint_bytes,
    wire_bytes,
)
from scaling_points import BASE, Curve, Point, curves
from vopd_client.teacher.codec import pack_ids, sequence_message
from vopd_client.types import Candidates, SequenceToScore

CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
MODEL = model_of_config(CONFIG)
SHAPE = MODEL.shape
LOAD, DEPLOYMENT = capacity.EXAMPLE_LOAD, capacity.EXAMPLE
ENGINE = {"max_batch_tokens": 16_384, "chunk_elements": 2**22}


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**CONFIG | changes, attn_implementation="eager")).eval()


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_a_real_model_but_for_its_norms(tied: bool) -> None:
    matrices = [weight.numel() for weight in llama(tie_word_embeddings=tied).parameters() if weight.ndim == 2]
    assert replace(MODEL, tied=tied).parameters == sum(matrices)


def test_published_sizes_of_known_models() -> None:
    published = {"smollm2-135m": 134.5e6, "qwen3-8b": 8.2e9, "qwen3-32b": 32.8e9}
    for name, parameters in published.items():
        assert MODELS[name].parameters == pytest.approx(parameters, rel=3e-3)


def test_operations_are_those_that_torch_counts() -> None:
    """Eager attention multiplies the whole square; the model takes the triangle that counts, diagonal included."""
    context, completion = 9, 6
    read = context + completion - 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llama()(input_ids=torch.zeros(1, read, dtype=torch.long), logits_to_keep=completion)
    found = group_flops(SHAPE, context=context, completion=completion, group=1)
    square = 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_size * read**2
    assert found.layers + found.head + square == counter.get_total_flops()
    assert found.attention / square == (read + 1) / 2 / read


def test_attention_pays_for_the_keys_that_each_query_sees() -> None:
    context, completion, group = 5, 4, 3
    keys = sum(range(1, context + 1))
    for _ in range(group):
        keys += sum(context + place + 1 for place in range(completion - 1))
    found = group_flops(SHAPE, context=context, completion=completion, group=group)
    assert found.attention == 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_size * keys


def test_a_shared_context_is_read_once() -> None:
    alone, shared = (replace(LOAD, context=300, completion=100, group=group) for group in (1, 4))
    assert tokens_read_a_scored_token(alone) == pytest.approx(3.99)
    assert tokens_read_a_scored_token(shared) == pytest.approx(0.75 + 0.99)
    saved = flops_a_scored_token(SHAPE, alone).layers - flops_a_scored_token(SHAPE, shared).layers
    assert saved == pytest.approx(2 * SHAPE.layer_weights * 2.25)
    assert flops_a_scored_token(SHAPE, alone).head == flops_a_scored_token(SHAPE, shared).head


def test_a_config_that_says_too_little_or_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="mixture of experts"):
        model_of_config(CONFIG | {"num_experts": 8})
    with pytest.raises(ValueError, match="does not say hidden_size"):
        model_of_config({name: value for name, value in CONFIG.items() if name != "hidden_size"})


# ---------------------------------------------------------------- network


def test_bytes_a_token_are_those_of_real_messages_but_for_their_frame() -> None:
    point = replace(BASE, context=64, completion=128, group=2, concurrency=2)
    rng = np.random.default_rng(0)
    ids = rng.integers(point.vocabulary, size=(2, point.completion * (point.k + 1)))
    messages = [
        sequence_message(
            SequenceToScore(
                np.arange(point.context),
                row[: point.completion],
                Candidates(row[point.completion :], np.full(point.completion, point.k)),
            ),
            sequence_id="0",
        )
        for row in ids
    ]
    context = pack_ids("context_ids", rng.integers(256, point.vocabulary, size=point.context))
    real = sum(message.ByteSize() for message in messages) + context.ByteSize()
    predicted = wire_bytes_of(point)[0] * point.completion * len(messages)
    assert 0 < real - predicted < 60 * len(messages)


def test_the_teachers_own_ids_come_back_instead_of_going_out() -> None:
    candidates, top_k = (wire_bytes(replace(LOAD, support=support)) for support in ("candidates", "teacher_top_k"))
    assert candidates.sent - top_k.sent == 3 * 100 + 1
    assert top_k.received - candidates.received == 3 * 100


@pytest.mark.parametrize(("largest", "expected"), [(0, 1), (255, 1), (256, 2), (65_535, 2), (151_935, 3), (2**24, 4)])
def test_the_narrowest_bytes_of_an_id(largest: int, expected: int) -> None:
    assert uint_bytes(largest) == expected


# ---------------------------------------------------------------- a deployment


def test_rate_and_step_time_follow_from_operations_and_peak() -> None:
    found = predict(MODELS["qwen3-32b"], DEPLOYMENT, LOAD)
    assert found.bound == "compute"
    assert found.scored_tokens_per_s == pytest.approx(4 * 989e12 * 0.4 / found.flops.total)
    assert found.step_s == pytest.approx(8 * 64 * 16_384 / found.scored_tokens_per_s)
    assert found.received_mbit_s == pytest.approx(found.scored_tokens_per_s * 202 * 8 / 1e6)
    twice = predict(MODELS["qwen3-32b"], replace(DEPLOYMENT, gpus=8), LOAD)
    assert twice.scored_tokens_per_s == pytest.approx(2 * found.scored_tokens_per_s)


def test_a_thin_network_bounds_by_the_direction_that_carries_more() -> None:
    found = predict(MODELS["qwen3-32b"], replace(DEPLOYMENT, network_bytes_s=1e6), LOAD)
    assert found.bound == "network"
    assert found.scored_tokens_per_s == pytest.approx(1e6 / max(found.wire.sent, found.wire.received))


def test_small_forwards_are_bound_by_reading_the_weights() -> None:
    small = replace(DEPLOYMENT, step_tokens=16)
    found = predict(MODELS["qwen3-32b"], small, LOAD)
    assert found.bound == "memory"
    weights_s = MODELS["qwen3-32b"].shape.layer_weights * 2 / (4 * 3.35e12)
    assert found.scored_tokens_per_s < 16 / weights_s


def test_what_a_gpu_holds_adds_up_and_the_rest_is_the_caches() -> None:
    model = MODELS["qwen3-32b"]
    assert model.kv_bytes_a_token == 2 * 64 * 8 * 128 * 2
    held = gpu_memory(model, DEPLOYMENT, LOAD)
    assert held.weights == pytest.approx(32.76e9 * 2 / 4, rel=1e-3)
    cache = held.kv_room_tokens * model.kv_bytes_a_token / 4
    total = held.weights + held.activations + held.logprobs + held.reserved + cache
    assert total == pytest.approx(80e9, rel=1e-5)


def test_a_model_that_leaves_no_room_for_one_sequence_does_not_fit() -> None:
    one_gpu = replace(DEPLOYMENT, gpus=1, tensor_parallel=1)
    assert not predict(MODELS["qwen3-32b"], one_gpu, replace(LOAD, completion=32_768)).fits
    assert predict(MODELS["qwen3-8b"], one_gpu, replace(LOAD, completion=32_768)).fits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(DEPLOYMENT, gpus=6), "6 GPUs are not replicas of 4"),
        (lambda: replace(DEPLOYMENT, mfu=1.5), "mfu 1.5"),
        (lambda: replace(LOAD, group=0), "group 0 < 1"),
        (lambda: replace(LOAD, mean_support=101), "mean_support 101"),
        (lambda: predict(MODELS["smollm2-135m"], DEPLOYMENT, LOAD), "9 attention heads do not divide among 4"),
    ],
)
def test_impossible_figures_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_published_peaks_say_where_they_are_from() -> None:
    assert all(card.name.split()[0] in card.source for card in ACCELERATORS.values())


# ---------------------------------------------------------------- compared with curves

DEMO = MODELS["smollm2-135m"]
COSTS = Costs(
    matrix_flop_s=2e-12, attention_flop_s=9e-12, support_logprob_s=3e-6, searched_logit_s=2e-8, sequence_s=4e-3
)


def content(costs: Costs, model: TeacherModel = DEMO) -> dict[str, Any]:
    """What scaling.py would have written, had a machine these costs."""

    def row(curve: Curve, point: Point) -> dict[str, Any]:
        sent, received = wire_bytes_of(point)
        return {
            "curve": curve.name,
            "axis": curve.axis,
            "value": curve.value(point),
            "scored_tokens_per_s": point.completion / costs.seconds(work_of(model.shape, point)),
            "bytes_sent_per_token": sent,
            "bytes_received_per_token": received,
            "idle_bytes": 700e6,
            "peak_bytes": 700e6 + held_bytes(model, point, **ENGINE),
            "point": asdict(point),
        }

    shape = model.shape
    config = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": model.tied,
    }
    rows = [row(curve, point) for curve in curves() for point in curve.points]
    return {"model_config": config, "engine": ENGINE, "base": asdict(BASE), "rows": rows}


def test_a_machine_that_keeps_to_the_model_is_predicted_exactly() -> None:
    found = check(content(COSTS))
    assert asdict(found.fitted) == pytest.approx(asdict(COSTS), rel=1e-6)
    for point in found.points:
        assert (point.fitted_ratio, point.wire_ratio, point.memory_ratio) == pytest.approx((1, 1, 1))
    assert found.summary()["fitted_worst_factor"] == pytest.approx(1)


def test_one_rate_is_off_where_more_than_operations_takes_time() -> None:
    found = check(content(COSTS))
    ratios = {(point.curve, point.value): point.one_rate_ratio for point in found.points}
    assert ratios["k (candidates)", 100] == pytest.approx(1)
    assert ratios["k (candidates)", 1000] > 1.5
    assert ratios["context", 4096] > 1.1
    assert found.summary()["one_rate_worst_factor"] == pytest.approx(max(max(r, 1 / r) for r in ratios.values()))


def test_one_rate_is_all_there_is_where_only_operations_take_time() -> None:
    found = check(content(Costs(3e-12, 3e-12)))
    assert found.effective_flops_s == pytest.approx(1 / 3e-12)
    assert all(point.one_rate_ratio == pytest.approx(1) for point in found.points)


def test_each_kind_of_work_is_calibrated_by_a_point_of_its_own() -> None:
    points = [point for curve in curves() for point in curve.points]
    assert calibration_points(BASE, points) == [
        BASE,
        replace(BASE, context=4096),
        replace(BASE, k=1000),
        replace(BASE, support="teacher_top_k"),
        replace(BASE, concurrency=1),
    ]
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibration_points(BASE, [BASE])


def test_no_cost_is_negative() -> None:
    works = [Work(1e9, 1e8, 100, 0), Work(2e9, 4e8, 100, 0), Work(1e9, 1e8, 1000, 0), Work(3e9, 1e8, 100, 0)]
    works.append(Work(1e9, 1e8, 100, 1e6))
    found = fitted(works, [1.0, 2.0, 0.5, 3.0, 1.5])  # more of the support takes less time
    assert found.support_logprob_s == 0
    assert min(asdict(found).values()) >= 0
    assert found.searched_logit_s > 0
    with pytest.raises(ValueError, match="3 points for 5 kinds"):
        fitted(works[:3], [1.0, 2.0, 0.5])


def test_one_rate_gives_the_seconds_it_was_made_of() -> None:
    work = Work(3e9, 1e9, 6400, 0)
    assert one_rate(work, 0.5).seconds(work) == pytest.approx(0.5)


def test_a_context_is_shared_by_those_that_are_outstanding_together() -> None:
    shape = DEMO.shape
    assert work_of(shape, replace(BASE, concurrency=1)) == work_of(shape, replace(BASE, group=1))
    assert work_of(shape, replace(BASE, group=32)) == work_of(shape, replace(BASE, group=16))


def test_more_of_anything_is_held_in_more_memory() -> None:
    base = held_bytes(DEMO, BASE, **ENGINE)
    for change in ({"context": 512}, {"completion": 128}, {"k": 1000}, {"concurrency": 32}):
        assert held_bytes(DEMO, replace(BASE, **change), **ENGINE) > base


# ---------------------------------------------------------------- the command


def test_the_command_predicts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["capacity.py", "--gpus", "8", "--students", "2"])
    assert capacity.main() == 0
    told = capsys.readouterr().out
    assert "2,097,152 tokens" in told
    assert "32.8B parameters on 8 x H100" in told
    assert "bound by compute" in told


def test_the_command_says_when_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["capacity.py", "--gpus", "1", "--completion", "65536"])
    assert capacity.main() == 1
    assert "does not fit" in capsys.readouterr().out


def test_the_command_refuses_what_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["capacity.py", "--mean-support", "500"])
    with pytest.raises(SystemExit):
        capacity.main()
    assert "mean_support 500" in capsys.readouterr().err


def test_the_command_reads_the_shape_of_a_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr("sys.argv", ["capacity.py", "--model", str(tmp_path / "config.json")])
    assert capacity.main() == 0
    assert "0.0B parameters" in capsys.readouterr().out


def test_the_command_writes_comparison_and_examples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured, written = tmp_path / "scaling.json", tmp_path / "out" / "capacity.json"
    measured.write_text(json.dumps(content(COSTS)))
    monkeypatch.setattr("sys.argv", ["capacity.py", "--check", str(measured), "--json", str(written)])
    assert capacity.main() == 0
    assert "predicted over measured" in capsys.readouterr().out
    made = json.loads(written.read_text())
    assert len(made["check"]["rows"]) == len(content(COSTS)["rows"])
    by_name = {example["name"]: example["predicted"]["scored_tokens_per_s"] for example in made["examples"]}
    assert by_name["8 H100"] == pytest.approx(2 * by_name["4 H100"])
    load = Load(**made["examples"][0]["load"])
    assert (load.students, load.rollouts, load.completion) == (8, 64, 16_384)
