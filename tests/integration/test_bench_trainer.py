"""What `bench/trainer_cost.py` measures is a training step on the real parts; its counts are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from floors import MachineRates, MatrixRate, ModelShape
from trainer_profile import group_of, profile_of
from trainer_workload import Sizes, TeacherForward, TrainingStep
from vopd_client.model_files import load_causal_lm

RATE = (MatrixRate(1, 1.0),)
RATES = MachineRates({"bfloat16": RATE, "float32": RATE}, {"bfloat16": RATE, "float32": RATE}, bandwidth_gb_s=1.0)
SIZES = Sizes(
    num_prompts=4,
    shortest_prompt=10,
    longest_prompt=40,
    max_new_tokens=6,
    teacher_sequences=3,
    teacher_context=12,
    teacher_completion=5,
)


@pytest.fixture
def step(tiny_model_dir: Path, fresh_process_state: None) -> TrainingStep:
    return TrainingStep(tiny_model_dir, SIZES, RATES)


@pytest.fixture
def teacher(tiny_model_dir: Path) -> Iterator[TeacherForward]:
    shape = ModelShape.of(load_causal_lm(tiny_model_dir, trust_remote_code=False).config)
    teacher = TeacherForward(tiny_model_dir, SIZES, RATES, shape)
    yield teacher
    teacher.close()


def test_a_step_samples_and_learns_from_what_it_sampled(step: TrainingStep) -> None:
    rollouts = step.rollouts()
    batches = step.batches()
    update = step.update(batches)
    before = [parameter.detach().clone() for parameter in step._student.module.parameters()]
    optimizer = step.optimizer(batches)
    assert 8 <= rollouts.tokens <= 8 * SIZES.max_new_tokens
    assert rollouts.needed_tokens == sum(SIZES.prompt_lengths) + rollouts.tokens - 8
    assert update.tokens == 2 * sum(SIZES.prompt_lengths) + rollouts.tokens
    assert sum(batch.num_valid_tokens for batch in batches) == rollouts.tokens
    for piece in (rollouts, update, optimizer):
        assert piece.floor_s is not None
        assert piece.floor_s > 0
    after = list(step._student.module.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_padding_is_what_the_model_read_beyond_the_tokens_it_needed(step: TrainingStep) -> None:
    rollouts = step.rollouts()
    # Four prompts of 10 to 40 tokens are one forward: a second would cost more than it saves.
    assert rollouts.padded_tokens - rollouts.needed_tokens == 4 * 40 - sum(SIZES.prompt_lengths)
    assert rollouts.padding == pytest.approx(1 - rollouts.needed_tokens / rollouts.padded_tokens)


def test_the_teacher_reads_all_but_the_last_token_of_every_sequence(teacher: TeacherForward) -> None:
    for _ in range(2):  # counters of one run, not of all so far
        piece = teacher.score()
        assert piece.tokens == 3 * 17
        assert piece.needed_tokens == 3 * 16


def test_a_profile_sees_the_engine_in_its_own_thread(teacher: TeacherForward) -> None:
    found = profile_of(teacher.score, vocab_size=259, is_sampling=False)
    assert found["shares"]["matrix products"] > 0
    assert found["shares"]["attention"] > 0


def test_a_profile_puts_all_time_into_groups() -> None:
    weight_VH, inputs_NH = torch.randn(300, 64), torch.randn(128, 64)

    def work() -> None:
        hidden_NH = inputs_NH @ torch.eye(64)
        (hidden_NH @ weight_VH.T).exp().to(torch.bfloat16)

    found = profile_of(work, vocab_size=300, is_sampling=True)
    assert {"matrix products", "head and softmax", "sampling", "python and the rest"} <= found["shares"].keys()
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert {"name", "self_s", "calls"} == found["operations"][0].keys()


@pytest.mark.parametrize(
    ("name", "shapes", "parents", "group"),
    [
        ("aten::mm", [[8, 64], [64, 32]], [], "matrix products"),
        ("aten::mm", [[8, 64], [64, 300]], [], "head and softmax"),
        ("aten::exp_", [[8, 300]], [], "sampling"),
        ("aten::mul", [[300]], [], "elementwise and norms"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], [], "attention"),
        ("aten::copy_", [[8, 64]], ["aten::_to_copy"], "casts"),
        ("aten::copy_", [[8, 64]], ["aten::clone"], "copies"),
        ("mkldnn::_reorder_linear_weight", [[64, 300]], [], "weight layout"),
        ("aten::_fused_adamw_", [[300, 64]], [], "optimizer"),
    ],
)
def test_an_operation_belongs_to_one_group(name: str, shapes: list[list[int]], parents: list[str], group: str) -> None:
    assert group_of(name, shapes, parents, vocab_size=300, is_sampling=True) == group


def test_what_is_done_to_logits_is_the_losss_where_nothing_is_drawn() -> None:
    assert group_of("aten::exp_", [[8, 300]], [], vocab_size=300, is_sampling=False) == "head and softmax"
