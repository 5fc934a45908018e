"""Bytes that are computed without sending anything, against the messages that both sides really make."""

from __future__ import annotations

import numpy as np
import pytest

from vopd_client.teacher.codec import FLOAT_TYPES, sequence_message
from vopd_client.types import Candidates, SequenceToScore, TeacherTopK
from vopd_client.wire_bytes import bytes_of_sequence
from vopd_server import types as server_types
from vopd_server.answer_codec import AnswerFormat, pack_scores

LARGEST_IDS = [200, 49_151, 151_935]  # of 1, 2 and 3 bytes


@pytest.mark.parametrize("largest_id", LARGEST_IDS)
@pytest.mark.parametrize("float_type", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_they_are_those_of_the_messages(owner, float_type, largest_id):
    rng = np.random.default_rng(0)
    completion_ids = rng.integers(largest_id, size=30)
    counts_T = rng.integers(1, 100, size=30) if owner == "student" else np.full(30, 16)
    ids = rng.integers(largest_id, size=counts_T.sum())
    ids[0] = largest_id
    logprobs = rng.normal(size=len(ids)).astype(np.float32)
    sampled_T = rng.normal(size=30).astype(np.float32)
    answer_format = AnswerFormat(FLOAT_TYPES[float_type], FLOAT_TYPES[float_type], hidden_size=1)
    nobody = np.empty(0, np.int64)
    if owner == "student":
        request = sequence_message(SequenceToScore(nobody, completion_ids, Candidates(ids, counts_T)), sequence_id="0")
        support = server_types.Candidates(ids, counts_T)
        scores = server_types.Scores(sampled_T, support_logprobs=logprobs, queue_time_s=1.0, engine_time_s=1.0)
    else:
        request = sequence_message(SequenceToScore(nobody, completion_ids, TeacherTopK(16)), sequence_id="0")
        support = server_types.TeacherTopK(16)
        scores = server_types.Scores(
            sampled_T,
            support_logprobs=logprobs.reshape(30, 16),
            support_ids_TK=ids.reshape(30, 16),
            queue_time_s=1.0,
            engine_time_s=1.0,
        )
    asked = server_types.ScoreRequest("id", np.array([1]), completion_ids, support)
    answer = pack_scores("0", asked, scores, answer_format)
    computed = bytes_of_sequence(completion_ids, counts_T, largest_id=largest_id, owner=owner, float_type=float_type)
    assert computed == request.ByteSize() + answer.ByteSize()
