"""Tokens that the student did not sample have no influence: on loss, gradient, supports, end tokens and checks."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from enumeration import EVERY_SAMPLED_ESTIMATOR, exact_gradient, random_state
from vopd_client.alignment import rows_in_loss
from vopd_client.batch import Batch, collate
from vopd_client.errors import AlignmentError, NonFiniteError
from vopd_client.handshake import IdSwap
from vopd_client.losses import loss_from_logits
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.step_metrics import StepSums, logprob_mismatch
from vopd_client.teacher.score_checks import checked_scores
from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore

V = 7
TOOL_ID = 3  # what stands between the two turns
EXTREMES = [-np.inf, -1e30, 1e30]


# ---------------------------------------------------------------- exact expectations

FIRST, BETWEEN, SECOND = random_state(1, 3), random_state(2, 3), random_state(3, 4)
WITH_SUPPORTS = [choice for choice in EVERY_SAMPLED_ESTIMATOR if choice[0] != "vopd-full"]


def expected_gradient(objective: str, tail: str, baseline: str | None, *, masked_score: float) -> Tensor:
    """[3, V]: over every pair of tokens that the student can sample before and after the tool's, weighed by pi.

    The states do not depend on the tokens before them, so that the gradient of each has a closed form.
    """
    pairs = list(product(range(V), range(V)))
    support = (*FIRST.support_ids, *SECOND.support_ids)
    counts_T = np.array([len(FIRST.support_ids), 0, len(SECOND.support_ids)])
    support_logprobs = np.array(
        [float(state.teacher_logprobs_V[i]) for state in (FIRST, SECOND) for i in state.support_ids]
    )
    sequences, scores = [], []
    for first, second in pairs:
        sequences.append(
            SequenceToScore(np.array([0]), np.array([first, TOOL_ID, second]), Candidates(np.array(support), counts_T))
        )
        sampled_T = np.array(
            [FIRST.teacher_logprobs_V[first], masked_score, SECOND.teacher_logprobs_V[second]], np.float64
        )
        scores.append(SequenceScores(sampled_T, np.array(support), support_logprobs, counts_T))
    states_3V = torch.stack([state.student_logits_V for state in (FIRST, BETWEEN, SECOND)])
    leaf_B3V = states_3V.repeat(len(pairs), 1, 1).requires_grad_()
    masks = [np.array([True, False, True])] * len(pairs)
    loss = loss_from_logits(objective, leaf_B3V, sequences, scores, tail=tail, baseline=baseline, loss_masks=masks)
    (gradient_B3V,) = torch.autograd.grad(loss.loss_sum, leaf_B3V)
    weights_B = torch.stack([FIRST.pi_V[first] * SECOND.pi_V[second] for first, second in pairs])
    return (weights_B[:, None, None] * gradient_B3V).sum(0)


@pytest.mark.parametrize("masked_score", EXTREMES)
@pytest.mark.parametrize(("objective", "tail", "baseline"), WITH_SUPPORTS)
def test_the_expected_gradient_is_the_exact_one_over_the_sampled_positions(
    objective: str, tail: str, baseline: str | None, masked_score: float
) -> None:
    gradient_3V = expected_gradient(objective, tail, baseline, masked_score=masked_score)
    torch.testing.assert_close(gradient_3V[0], exact_gradient(FIRST), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient_3V[2], exact_gradient(SECOND), atol=1e-6, rtol=0)
    assert torch.equal(gradient_3V[1], torch.zeros(V, dtype=torch.float64))


# ---------------------------------------------------------------- tensors

OWNERS = ["student", "teacher", "none", "vocabulary"]
MASK_T = np.array([True, True, False, False, True])
END, OTHER_END = 5, 6


def trajectory(**changes: Any) -> Rollout:
    """Two turns that end with END, and two tokens between them, one of which looks like an end."""
    defaults: dict[str, Any] = {
        "key": RolloutKey(1, 0, 0),
        "prompt_ids": np.array([1, 2]),
        "completion_ids": np.array([4, END, END, 99, END]),  # 99: only one side has it
        "behaviour_logprobs_T": np.array([-1, -2, 0, 0, -3], np.float32),
        "support_ids": np.array([4, 1, END, 2]),
        "support_counts_T": np.array([2, 1, 0, 0, 1]),
        "support_mass_T": np.array([0.9, 0.8, 0, 0, 0.7], np.float32),
        "ended": True,
        "is_sampled_T": MASK_T,
    }
    return Rollout(**defaults | changes)


def scores_of(owner: str, masked: float) -> SequenceScores:
    sampled_T = np.where(MASK_T, np.float32(-0.5), np.float32(masked))
    hidden_TH = np.where(MASK_T[:, None], np.float32(0.1), np.float32(masked)) * np.ones((5, 3), np.float32)
    match owner:
        case "student":
            return SequenceScores(sampled_T, np.arange(4), np.full(4, -1, np.float32), np.array([2, 1, 0, 0, 1]))
        case "teacher":  # its own top-k, at every position
            ids = np.tile(np.array([0, 4]), 5)
            support_T2 = np.where(MASK_T[:, None], np.float32(-1), np.float32(masked)) * np.ones((5, 2), np.float32)
            return SequenceScores(sampled_T, ids, support_T2.reshape(-1), np.full(5, 2))
        case _:
            nothing = np.empty(0, np.float32)
            return SequenceScores(sampled_T, np.empty(0, np.int64), nothing, np.zeros(5, np.int64), hidden_TH)


def batch_of(rollout: Rollout, scores: SequenceScores, owner: str = "student", **choices: Any) -> Batch:
    return collate([rollout], [scores], prompt_names=["p:1"], pad_id=0, num_shared_ids=50, support=owner, **choices)  # type: ignore[arg-type]


def assert_same(one: Batch, other: Batch) -> None:
    for name in (field.name for field in fields(Batch)):
        left, right = getattr(one, name), getattr(other, name)
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right, name


@pytest.mark.parametrize("masked", EXTREMES)
@pytest.mark.parametrize("owner", OWNERS)
def test_whatever_the_teacher_says_of_a_masked_token_makes_the_same_tensors(owner: str, masked: float) -> None:
    batch = batch_of(trajectory(), scores_of(owner, masked), owner)
    assert_same(batch, batch_of(trajectory(), scores_of(owner, -2.0), owner))
    assert batch.loss_mask_BT.tolist() == [MASK_T.tolist()]
    assert batch.input_ids_BS.tolist() == [[1, 2, 4, END, END, 99, END]]  # the models read all of it
    assert batch.num_valid_tokens == 3
    for values in (batch.teacher_logprobs_BT, batch.behaviour_logprobs_BT, batch.completion_ids_BT):
        assert not values[0, ~torch.from_numpy(MASK_T)].any()
    assert not batch.support_mask_BTK[0, ~torch.from_numpy(MASK_T)].any()


def test_a_mask_of_the_callers_is_the_same_as_one_of_the_rollouts() -> None:
    plain, scores = trajectory(is_sampled_T=None), scores_of("student", -2.0)
    assert_same(batch_of(plain, scores, loss_masks=[MASK_T]), batch_of(trajectory(), scores))


def test_both_masks_hold() -> None:
    not_the_first_T = np.arange(5) > 0
    batch = batch_of(trajectory(), scores_of("student", 0.0), loss_masks=[not_the_first_T])
    assert batch.loss_mask_BT.tolist() == [[False, True, False, False, True]]


@pytest.mark.parametrize(
    ("rollout", "choices", "message"),
    [
        (trajectory(is_sampled_T=MASK_T[:4]), {}, "4 marks of what was sampled for the 5 completion tokens of p:1"),
        (trajectory(), {"loss_masks": [MASK_T[:3]]}, "3 loss mask entries for the 5 completion tokens of p:1"),
        (trajectory(), {"loss_masks": []}, "0 loss masks for 1 rollouts"),
        (trajectory(is_sampled_T=None), {}, "completion token 3 of p:1 is id 99"),
    ],
)
def test_masks_that_do_not_line_up_are_refused(rollout: Rollout, choices: Any, message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        batch_of(rollout, scores_of("student", 0.0), **choices)


# ---------------------------------------------------------------- end tokens


@pytest.mark.parametrize("ended", [True, False])  # False: a reply had no room after the last end token
def test_every_sampled_end_token_is_dropped_and_no_other(ended: bool) -> None:
    rollout = trajectory(ended=ended)
    assert rows_in_loss(rollout, frozenset({END})).tolist() == [True, False, False, False, False]
    assert rows_in_loss(rollout, frozenset({OTHER_END})).tolist() == MASK_T.tolist()
    batch = batch_of(rollout, scores_of("student", 0.0), drop_end_ids=frozenset({END}))
    assert batch.loss_mask_BT.tolist() == [[True, False, False, False, False]]


def test_sampled_end_tokens_are_mapped_and_what_the_template_wrote_is_not() -> None:
    swap = IdSwap((END, OTHER_END))
    support = Candidates(np.array([END, 1]), np.array([1, 1, 0, 0, 0]))
    asked = SequenceToScore(np.array([END]), np.array([4, END, END, OTHER_END, END]), support, MASK_T)
    told = swap.to_teacher(asked)
    assert told.completion_ids.tolist() == [4, OTHER_END, END, OTHER_END, OTHER_END]
    assert told.context_ids.tolist() == [END]
    assert isinstance(told.support, Candidates)
    assert told.support.ids.tolist() == [OTHER_END, 1]
    plain = swap.to_teacher(replace(asked, is_sampled_T=None))
    assert plain.completion_ids.tolist() == [4, OTHER_END, OTHER_END, END, OTHER_END]


# ---------------------------------------------------------------- answers and metrics


def check(sampled: list[float]) -> SequenceScores:
    asked = SequenceToScore(np.array([0]), np.arange(5), NoSupport(), MASK_T)
    nothing = np.empty(0, np.float32)
    return checked_scores(
        asked, sampled_logprobs_T=np.array(sampled, np.float32), support_logprobs=nothing,
        top_k_ids=np.empty(0, np.int64), hidden_states_TH=None, vocab_size=9, hidden_size=0,
    )  # fmt: skip


def test_a_token_of_a_tools_may_be_impossible_to_the_teacher() -> None:
    assert np.isneginf(check([-1, -1, -np.inf, -1, -1]).sampled_logprobs_T[2])
    with pytest.raises(NonFiniteError, match="-inf of token 1 at position 1"):
        check([-1, -np.inf, -np.inf, -1, -1])
    with pytest.raises(NonFiniteError, match="nan of token 2 at position 2"):
        check([-1, -1, np.nan, -1, -1])


def test_metrics_are_means_over_the_students_own_tokens() -> None:
    batch = batch_of(trajectory(), scores_of("student", -9.0))
    mismatch = logprob_mismatch(torch.full((1, 5), -2.0), batch)
    assert (mismatch.absolute_sum, mismatch.largest) == (1 + 0 + 1, 1)
    sums = StepSums()
    sums.add_rollouts([trajectory(), trajectory(is_sampled_T=None)], None, staleness=0)
    assert (sums.values["num_turns"], sums.values["num_environment_tokens"]) == (2, 2)
    single = StepSums()
    single.add_rollouts([trajectory(is_sampled_T=None)], None, staleness=0)
    assert "num_turns" not in single.values
