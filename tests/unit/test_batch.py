"""Rollouts and scores become tensors whose rows line up; what does not line up is refused with the facts."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from enumeration import Outputs
from vopd_client.batch import collate, plan_microbatches
from vopd_client.errors import AlignmentError, NonFiniteError
from vopd_client.like_lengths import padding_fraction
from vopd_client.losses import compute_loss
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.types import SequenceScores


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def rollout(prompt, completion, support, *, ended=False) -> Rollout:
    """`support`: a list of ids a position. The behaviour logprob of token t is -(t + 1)."""
    num_tokens = len(completion)
    return Rollout(
        key=RolloutKey(0, 0, 0),
        prompt_ids=ints(*prompt),
        completion_ids=ints(*completion),
        behaviour_logprobs_T=-np.arange(1, num_tokens + 1, dtype=np.float32),
        support_ids=ints(*[token_id for ids in support for token_id in ids]),
        support_counts_T=ints(*[len(ids) for ids in support]),
        support_mass_T=np.ones(num_tokens, np.float32),
        ended=ended,
    )


def scores(sampled, support, ids=None) -> SequenceScores:
    """`support`: a list of logprobs a position; `ids`: the teacher's own, a list a position."""
    flat = [logprob for row in support for logprob in row]
    return SequenceScores(
        sampled_logprobs_T=floats(*sampled),
        support_ids=ints(*[token_id for row in ids for token_id in row]) if ids else np.zeros(len(flat), np.int64),
        support_logprobs=floats(*flat),
        counts_T=ints(*[len(row) for row in support]),
    )


LONG = rollout([50, 51, 52], [1, 2, 3], [[1, 4], [], [5, 6, 3]])
LONG_SCORES = scores([-0.5, -0.25, -2.0], [[-0.5, -1.5], [], [-3.0, -4.0, -2.0]])
SHORT = rollout([60], [7], [[8]])
SHORT_SCORES = scores([-0.125], [[-9.0]])


def pair(**choices):
    given_choices = {"prompt_names": ("data:1", "data:2"), "pad_id": 99, "num_shared_ids": 10, **choices}
    return collate([LONG, SHORT], [LONG_SCORES, SHORT_SCORES], **given_choices)


def single(one, its_scores, **choices):
    return collate([one], [its_scores], **{"prompt_names": ("data:1",), "pad_id": 0, "num_shared_ids": 10, **choices})


def test_inputs_are_prompt_and_completion_padded_on_the_right():
    batch = pair()
    assert batch.input_ids_BS.tolist() == [[50, 51, 52, 1, 2, 3], [60, 7, 99, 99, 99, 99]]
    assert batch.attention_mask_BS.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]


def test_row_t_is_predicted_by_the_position_before_token_t():
    batch = pair()
    assert batch.row_index_BT.tolist() == [[2, 3, 4], [0, 0, 0]]
    assert batch.completion_ids_BT.tolist() == [[1, 2, 3], [7, 0, 0]]
    for row in range(2):
        for position in range(3):
            if batch.loss_mask_BT[row, position]:
                next_position = batch.row_index_BT[row, position] + 1
                assert batch.input_ids_BS[row, next_position] == batch.completion_ids_BT[row, position]


def test_scores_lie_at_their_tokens_and_padding_is_zero():
    batch = pair()
    assert batch.loss_mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert batch.num_valid_tokens == 4
    assert batch.teacher_logprobs_BT.tolist() == [[-0.5, -0.25, -2.0], [-0.125, 0, 0]]
    assert batch.behaviour_logprobs_BT.tolist() == [[-1, -2, -3], [-1, 0, 0]]


def test_candidates_keep_the_students_ids_with_the_teachers_logprobs_in_the_same_order():
    batch = pair()
    assert batch.support_ids_BTK.tolist() == [[[1, 4, 0], [0, 0, 0], [5, 6, 3]], [[8, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert batch.support_mask_BTK.sum(-1).tolist() == [[2, 0, 3], [1, 0, 0]]
    assert batch.teacher_support_logprobs_BTK.tolist() == [
        [[-0.5, -1.5, 0], [0, 0, 0], [-3, -4, -2]],
        [[-9, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]


def test_the_dtypes_are_those_of_the_batch():
    batch = pair()
    assert {batch.input_ids_BS.dtype, batch.row_index_BT.dtype, batch.support_ids_BTK.dtype} == {torch.int64}
    assert {batch.loss_mask_BT.dtype, batch.support_mask_BTK.dtype} == {torch.bool}
    assert {batch.teacher_logprobs_BT.dtype, batch.teacher_support_logprobs_BTK.dtype} == {torch.float32}


def test_the_teachers_top_k_is_the_support_and_the_recorded_one_is_not_used():
    its_scores = scores([-0.5, -0.25, -2.0], [[-1.0], [-2.0], [-3.0]], ids=[[9], [8], [7]])
    batch = single(LONG, its_scores, support="teacher")
    assert batch.support_ids_BTK.tolist() == [[[9], [8], [7]]]
    assert batch.teacher_support_logprobs_BTK.tolist() == [[[-1], [-2], [-3]]]


def test_without_a_support_there_are_no_columns():
    batch = single(LONG, scores([-0.5, -0.25, -2.0], [[], [], []]), support="none")
    assert batch.support_ids_BTK.shape == (1, 3, 0)


def test_ids_that_one_side_does_not_have_leave_the_support():
    """Id 12 is beyond the shared ids, id 4 is one that the teacher gives -inf; the others close ranks."""
    one = rollout([50], [1, 2], [[12, 4, 1], [4, 12]])
    batch = single(one, scores([-1.0, -1.0], [[-0.5, -np.inf, -0.25], [-np.inf, -0.5]]))
    assert batch.support_ids_BTK.tolist() == [[[1], [0]]]
    assert batch.support_mask_BTK.tolist() == [[[True], [False]]]
    assert batch.teacher_support_logprobs_BTK.tolist() == [[[-0.25], [0.0]]]


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("objective", ["opd", "vopd", "vopd-rb", "topk-kl"])
def test_a_teacher_that_lacks_a_likely_id_makes_no_nan_in_any_objective(objective, tail):
    """The student's likeliest id has teacher logprob -inf: its mass moves to the tail."""
    one = rollout([50], [1, 2], [[4, 1], [4]])
    batch = single(one, scores([-1.0, -2.0], [[-np.inf, -0.3], [-np.inf]]))
    student_BTV = torch.linspace(-1, 1, 20).reshape(1, 2, 10).log_softmax(-1)
    leaf_BTV = student_BTV.clone().requires_grad_()
    student = Outputs(
        sampled_logprobs_BT=leaf_BTV.gather(-1, batch.completion_ids_BT[..., None])[..., 0],
        support_logprobs_BTK=leaf_BTV.gather(-1, batch.support_ids_BTK),
        sum_pi_squared_BT=student_BTV.exp().square().sum(-1),
    )
    output = compute_loss(objective, student, batch, tail=tail)
    output.loss_sum.backward()
    assert all(value.isfinite() for value in output.sums.values())
    assert leaf_BTV.grad.isfinite().all()


def test_a_sampled_token_that_the_teacher_lacks_is_an_error_that_names_it():
    batch = single(rollout([50], [1, 2], [[], []]), scores([-1.0, -np.inf], [[], []]))
    zeros_BT = torch.zeros(1, 2)
    student = Outputs(zeros_BT, torch.zeros(1, 2, 0), zeros_BT, None)
    with pytest.raises(NonFiniteError, match=r"token 1 \(id 2\) of data:1 is -inf"):
        compute_loss("opd", student, batch)


def test_a_dropped_end_token_leaves_the_loss_but_stays_in_the_input():
    one = rollout([50], [1, 77], [[1], [77, 2]], ended=True)
    batch = single(one, scores([-1.0, -np.inf], [[-1.0], [np.nan, -2.0]]), drop_end_ids=frozenset({77}))
    assert batch.input_ids_BS.tolist() == [[50, 1, 77]]
    assert batch.loss_mask_BT.tolist() == [[True, False]]
    assert batch.completion_ids_BT.tolist() == [[1, 0]]
    assert batch.support_mask_BTK.tolist() == [[[True], [False]]]
    assert batch.teacher_logprobs_BT.tolist() == [[-1.0, 0.0]]


def test_a_dropped_end_token_has_no_place_in_a_support_either():
    one = rollout([50], [1, 2], [[1, 77], [77, 2]])
    batch = single(one, scores([-1.0, -1.0], [[-1.0, -30.0], [-30.0, -2.0]]), drop_end_ids=frozenset({77}))
    assert batch.support_ids_BTK.tolist() == [[[1], [2]]]
    assert batch.teacher_support_logprobs_BTK.tolist() == [[[-1.0], [-2.0]]]


@pytest.mark.parametrize(("ended", "last_id"), [(False, 7), (True, 6)])
def test_only_an_end_token_that_is_to_be_dropped_is_dropped(ended, last_id):
    one = rollout([50], [1, last_id], [[], []], ended=ended)
    batch = single(one, scores([-1.0, -1.0], [[], []]), drop_end_ids=frozenset({7}))
    assert batch.loss_mask_BT.tolist() == [[True, True]]


def test_an_empty_completion_is_a_row_without_valid_tokens():
    empty = rollout([50, 51], [], [])
    batch = collate(
        [empty, SHORT], [scores([], []), SHORT_SCORES], prompt_names=("data:1", "data:2"), pad_id=0, num_shared_ids=10
    )
    assert batch.loss_mask_BT.tolist() == [[False], [True]]
    assert single(empty, scores([], [])).loss_mask_BT.shape == (1, 0)


def test_hidden_states_take_the_place_of_a_support_and_are_padded():
    with_states = [
        replace(scores([-1.0] * num_tokens, [[]] * num_tokens), hidden_states_TH=np.full((num_tokens, 4), value))
        for num_tokens, value in ((3, np.float32(-1)), (1, np.float32(-2)))
    ]
    batch = collate(
        [LONG, SHORT], with_states, prompt_names=("data:1", "data:2"), pad_id=0, num_shared_ids=10, support="vocabulary"
    )
    assert batch.teacher_hidden_BTH.shape == (2, 3, 4)
    assert batch.teacher_hidden_BTH[:, :, 0].tolist() == [[-1, -1, -1], [-2, 0, 0]]
    assert batch.support_mask_BTK.shape == (2, 3, 0)


def test_a_task_advantage_reaches_every_token_of_its_completion():
    batch = pair(task_advantages=[0.5, -1.0])
    assert batch.task_advantages_BT.tolist() == [[0.5, 0.5, 0.5], [-1.0, 0.0, 0.0]]
    assert not pair().task_advantages_BT.any()


def test_a_batch_moves_with_all_its_tensors_and_keeps_what_is_none():
    moved = pair().to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.teacher_hidden_BTH is None
    assert moved.prompt_names == ("data:1", "data:2")


@pytest.mark.parametrize(
    ("one", "its_scores", "choices", "message"),
    [
        (
            LONG,
            scores([-1.0, -1.0], [[], []]),
            {},
            "2 sampled log-probabilities from the teacher for the 3 completion tokens of data:1",
        ),
        (
            LONG,
            replace(LONG_SCORES, counts_T=ints(2, 0)),
            {},
            "2 support counts from the teacher for the 3 completion tokens of data:1",
        ),
        (
            replace(LONG, behaviour_logprobs_T=floats(-1.0)),
            LONG_SCORES,
            {},
            "1 recorded log-probabilities for the 3 completion tokens of data:1",
        ),
        (
            LONG,
            replace(LONG_SCORES, support_logprobs=floats(-1.0)),
            {},
            "the teacher's support counts of data:1 add up to 5, for 1 entries",
        ),
        (
            LONG,
            replace(LONG_SCORES, counts_T=ints(2, 1, 2)),
            {},
            "the teacher scored 1 support ids at completion token 1 of data:1; 0 were recorded",
        ),
        (
            rollout([50], [1, 2], [[3], [4, 5, 4]]),
            scores([-1.0, -1.0], [[-1.0], [-1.0, -2.0, -1.0]]),
            {},
            "id 4 occurs twice in the support of completion token 1 of data:1",
        ),
        (
            LONG,
            LONG_SCORES,
            {"max_support": 2},
            "completion token 2 of data:1 has 3 ids in its support; at most 2 were asked for",
        ),
        (LONG, LONG_SCORES, {"num_shared_ids": 3}, "completion token 2 of data:1 is id 3; .* share the ids below 3"),
        (replace(LONG, prompt_ids=ints()), LONG_SCORES, {}, "data:1 has an empty prompt"),
        (LONG, LONG_SCORES, {"prompt_names": ()}, "1 rollouts, 1 scores and 0 prompt names make no batch"),
        (LONG, LONG_SCORES, {"support": "vocabulary"}, "no hidden states from the teacher for the 3 completion tokens"),
        (
            LONG,
            replace(LONG_SCORES, hidden_states_TH=np.zeros((2, 4), np.float32)),
            {"support": "vocabulary"},
            "2 hidden states from the teacher for the 3 completion tokens of data:1",
        ),
    ],
)
def test_what_does_not_line_up_is_refused_with_the_facts(one, its_scores, choices, message):
    with pytest.raises(AlignmentError, match=message):
        single(one, its_scores, **choices)


def test_one_id_at_two_positions_is_no_duplicate():
    batch = single(rollout([50], [1, 2], [[4], [4]]), scores([-1.0, -1.0], [[-1.0], [-2.0]]))
    assert batch.support_ids_BTK.tolist() == [[[4], [4]]]


@given(lengths=st.lists(st.integers(1, 300)), max_tokens=st.integers(1, 1000))
def test_a_plan_holds_every_sequence_once_within_the_bound(lengths, max_tokens):
    plan = plan_microbatches(lengths, max_tokens)
    assert sorted(index for microbatch in plan for index in microbatch) == list(range(len(lengths)))
    for microbatch in plan:
        padded_tokens = len(microbatch) * max(lengths[index] for index in microbatch)
        assert padded_tokens <= max_tokens or len(microbatch) == 1
    assert plan_microbatches(lengths, max_tokens) == plan


@given(lengths=st.lists(st.integers(1, 300), min_size=1), max_tokens=st.integers(1, 1000))
def test_no_sequence_is_padded_beyond_the_shortest_of_the_microbatch_before(lengths, max_tokens):
    plan = [[lengths[index] for index in microbatch] for microbatch in plan_microbatches(lengths, max_tokens)]
    for earlier, later in itertools.pairwise(plan):
        assert max(later) <= min(earlier)


def test_padding_is_a_small_part_of_a_plan():
    """Lengths from 20 to 1000, 16 thousand tokens a microbatch; in order of arrival nearly half would be padding."""
    generator = random.Random(0)
    lengths = [generator.randint(20, 1000) for _ in range(512)]
    plan = plan_microbatches(lengths, 16_384)
    padded_tokens = sum(len(microbatch) * max(lengths[index] for index in microbatch) for microbatch in plan)
    assert padded_tokens < 1.07 * sum(lengths)


def test_padding_stays_under_a_fifth_where_one_step_fits_one_microbatch():
    """Sixteen rollouts of the demo's kind and of prompts six times as long, in one step."""
    generator = random.Random(1)
    lengths = [generator.randint(40, 256) + generator.randint(1, 64) for _ in range(16)]
    assert padding_fraction(lengths, [list(range(16))]) > 0.3
    assert padding_fraction(lengths, plan_microbatches(lengths, 16_384)) < 0.2
