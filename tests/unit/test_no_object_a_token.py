"""Between the engine's arrays and the loss's, nothing in Python grows with the number of tokens but arrays.

Counted, not timed: calls are the same for 16 tokens and for 1,600, and allocated blocks nearly so: the interpreter's
own caches make a few dozen come and go.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vopd_client.batch import collate
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.teacher.codec import FLOAT_TYPES, FloatTypeName, decode_scores, pack_ids, sequence_message
from vopd_client.types import Candidates, SequenceScores, SequenceToScore, TeacherTopK
from vopd_proto import teacher_pb2 as pb
from vopd_server import types as served
from vopd_server.answer_codec import AnswerFormat, pack_chunks
from vopd_server.codec import shape_of, unpack_ids, unpack_sequence
from vopd_server.validation import check_scores

VOCAB_SIZE, K, CONTEXT = 49_152, 100, 64
FEW, MANY = 16, 1600  # tokens
FEW_BLOCKS = (MANY - FEW) // 10  # one object for every ten tokens would be more
ONE_CHUNK = 2**30
SupportName = str


@dataclass(frozen=True)
class Journey:
    """One sequence on its way to the engine and back."""

    sequence: SequenceToScore
    scores: served.Scores
    answer_format: AnswerFormat

    def to_engine(self) -> served.ScoreRequest:
        """What the client sends, as the server reads it."""
        sent = sequence_message(self.sequence, sequence_id="1").SerializeToString()
        context = pack_ids("context_ids", self.sequence.context_ids).SerializeToString()
        message, ids = pb.Sequence.FromString(sent), pb.UIntArray.FromString(context)
        shape_of(message, field="sequence", num_context_ids=CONTEXT)
        context_ids = unpack_ids(ids, "context")
        return unpack_sequence(message, field="sequence", context_ids=context_ids, request_id="r", temperature=1.0)

    def answered(self, request: served.ScoreRequest) -> list[bytes]:
        check_scores(request, self.scores, hidden_size=1)
        chunks = pack_chunks("1", request, self.scores, self.answer_format, max_bytes=ONE_CHUNK)
        return [chunk.SerializeToString() for chunk in chunks]

    def received(self, answer: list[bytes]) -> SequenceScores:
        chunks = [pb.ScoreChunk.FromString(data).scores for data in answer]
        return decode_scores(self.sequence, chunks, vocab_size=VOCAB_SIZE, hidden_size=1)

    def whole(self) -> Any:
        """There, back, and into a batch for the loss."""
        scores = self.received(self.answered(self.to_engine()))
        num_tokens = len(self.sequence.completion_ids)
        rollout = Rollout(
            key=RolloutKey(1, 0, 0),
            prompt_ids=self.sequence.context_ids,
            completion_ids=self.sequence.completion_ids,
            behaviour_logprobs_T=np.zeros(num_tokens, np.float32),
            support_ids=scores.support_ids,
            support_counts_T=scores.counts_T,
            support_mass_T=np.ones(num_tokens, np.float32),
            ended=False,
        )
        return collate([rollout], [scores], prompt_names=["a:1"], pad_id=0, num_shared_ids=VOCAB_SIZE)


def journey(support: SupportName, float_type: FloatTypeName, num_tokens: int) -> Journey:
    rng = np.random.default_rng(0)
    ids_TK = (rng.integers(VOCAB_SIZE, size=(num_tokens, 1)) + 491 * np.arange(K)) % VOCAB_SIZE  # distinct in a row
    logprobs_TK = -rng.random((num_tokens, K), np.float32)
    asked = Candidates(ids_TK.reshape(-1), np.full(num_tokens, K)) if support == "candidates" else TeacherTopK(K)
    sequence = SequenceToScore(rng.integers(VOCAB_SIZE, size=CONTEXT), rng.integers(VOCAB_SIZE, size=num_tokens), asked)
    sampled_T = -rng.random(num_tokens, np.float32)
    scores = (
        served.Scores(sampled_T, logprobs_TK.reshape(-1), None)
        if support == "candidates"
        else served.Scores(sampled_T, logprobs_TK, ids_TK)
    )
    return Journey(sequence, scores, AnswerFormat(FLOAT_TYPES[float_type], pb.FLOAT32, 1))


def num_calls(work: Callable[[], Any]) -> int:
    """Calls of Python and C functions while `work` runs, without the garbage collector's, which come when they like."""
    count = 0

    def counting(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    former = sys.getprofile()
    gc.collect()
    gc.disable()
    sys.setprofile(counting)
    try:
        work()
    finally:
        sys.setprofile(former)
        gc.enable()
    return count


def num_blocks(work: Callable[[], Any]) -> int:
    """Blocks of Python's allocator that the result of `work` holds."""
    gc.collect()
    before = sys.getallocatedblocks()
    result = work()
    gc.collect()
    blocks = sys.getallocatedblocks() - before
    del result
    return blocks


def peak_bytes(work: Callable[[], Any]) -> int:
    """Memory of arrays, bytes and objects while `work` runs, at most."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = work()
        peak = tracemalloc.get_traced_memory()[1]
        del result
    finally:
        tracemalloc.stop()
    return peak - before


@pytest.mark.parametrize("support", ["candidates", "teacher_top_k"])
@pytest.mark.parametrize("float_type", list(FLOAT_TYPES))
def test_a_hundred_times_the_tokens_are_the_same_calls_and_objects(
    support: SupportName, float_type: FloatTypeName
) -> None:
    few, many = (journey(support, float_type, num_tokens) for num_tokens in (FEW, MANY))
    few.whole()  # imports and caches
    assert num_calls(many.whole) == num_calls(few.whole)
    assert abs(num_blocks(many.whole) - num_blocks(few.whole)) < FEW_BLOCKS


@pytest.mark.parametrize("support", ["candidates", "teacher_top_k"])
@pytest.mark.parametrize("float_type", list(FLOAT_TYPES))
def test_an_answer_is_unpacked_into_the_arrays_that_the_loss_reads_and_nothing_beside_them(
    support: SupportName, float_type: FloatTypeName
) -> None:
    """Beside the arrays themselves there is one mask of a byte a number at a time, for the checks."""
    many = journey(support, float_type, MANY)
    chunks = [pb.ScoreChunk.FromString(data).scores for data in many.answered(many.to_engine())]
    scores = decode_scores(many.sequence, chunks, vocab_size=VOCAB_SIZE, hidden_size=1)
    kept = scores.sampled_logprobs_T.nbytes + scores.support_logprobs.nbytes
    kept += scores.support_ids.nbytes * (support == "teacher_top_k")  # candidates are the client's own
    decoded = peak_bytes(lambda: decode_scores(many.sequence, chunks, vocab_size=VOCAB_SIZE, hidden_size=1))
    payload = sum(len(chunk.support_logprobs.data) + len(chunk.support_ids.data) for chunk in chunks)
    masks = 3 * MANY * K  # is NaN, is infinite, either
    assert decoded <= kept + payload + masks + 64 * 2**10
