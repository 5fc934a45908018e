"""The golden sequence of replicas, and how far apart their scores of it may be."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fake_teacher import FakeTeacher
from vopd_client.errors import HandshakeError
from vopd_client.teacher.agreement import GoldenScores, check_agreement, golden_sequence
from vopd_client.teacher.codec import teacher_info


def compare(distance_T: np.ndarray, dtype: str) -> None:
    """Two replicas, the second of which scores so much less."""
    scripted = FakeTeacher().info()
    scripted.dtype = dtype
    first = np.linspace(-15, -1, len(distance_T)).astype(np.float32)
    other = (first - distance_T).astype(np.float32)
    check_agreement(GoldenScores("grpc://a:1", first), GoldenScores("grpc://b:1", other), teacher_info(scripted))


@pytest.mark.parametrize("vocab_size", [2, 259, 50_000, 151_936])
def test_the_golden_sequence_is_the_same_for_all_and_spread_over_the_vocabulary(vocab_size):
    one, other = (golden_sequence(vocab_size=vocab_size, max_context_length=8192) for _ in range(2))
    np.testing.assert_array_equal(one.context_ids, other.context_ids)
    np.testing.assert_array_equal(one.completion_ids, other.completion_ids)
    assert (len(one.context_ids), len(one.completion_ids)) == (8, 56)
    ids = np.concatenate([one.context_ids, one.completion_ids])
    assert 0 <= ids.min() <= ids.max() < vocab_size
    quarters = np.bincount(ids * 4 // vocab_size, minlength=4)
    assert vocab_size == 2 or quarters.min() >= 14


@pytest.mark.parametrize(("max_length", "lengths"), [(2, (1, 1)), (3, (1, 2)), (20, (8, 12)), (64, (8, 56))])
def test_the_golden_sequence_fits_any_teacher(max_length, lengths):
    sequence = golden_sequence(vocab_size=300, max_context_length=max_length)
    assert (len(sequence.context_ids), len(sequence.completion_ids)) == lengths


def test_what_kernels_and_batches_make_of_the_same_weights_agrees():
    """The largest differences that were measured, mean and single."""
    compare(np.full(56, 1e-5), "float32")
    compare(np.full(56, 0.005), "float32")  # TF32
    compare(np.r_[0.3, np.full(55, 0.055)], "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "distance_T", "figures"),
    [
        ("float32", np.full(56, 0.06), "0.06 nats on average and 0.06 at most; float32 allows 0.01 and 0.1"),  # 8 bits
        ("float32", np.r_[0.5, np.zeros(55)], "0.0089 nats on average and 0.5 at most"),  # one token is wrong
        ("bfloat16", np.full(56, 0.32), "0.32 nats on average and 0.32 at most; bfloat16 allows 0.2 and 2"),  # FP8
        ("float16", np.r_[4.0, np.zeros(55)], "0.071 nats on average and 4 at most; float16 allows 0.2 and 2"),
    ],
)
def test_other_weights_are_refused_with_both_urls_and_the_figures(dtype, distance_T, figures):
    with pytest.raises(HandshakeError, match=re.escape(figures)) as caught:
        compare(distance_T, dtype)
    message = str(caught.value)
    assert message.startswith("grpc://b:1 and grpc://a:1 both say model revision 'revision-1', but score the same 56")


def test_a_score_that_is_not_a_number_does_not_agree():
    with pytest.raises(HandshakeError, match="nan nats"):
        compare(np.full(56, np.nan), "bfloat16")
