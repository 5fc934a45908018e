"""What scoring a completion with some support takes on the wire, without sending it. No torch.

Axes: T completion tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from vopd_client.teacher.codec import FLOAT_TYPES, FloatTypeName, sequence_message
from vopd_client.types import Candidates, SequenceToScore, TeacherTopK
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import IntArray, pack_floats, pack_uints


def bytes_of_sequence(
    completion_ids: IntArray,
    counts_T: IntArray,
    *,
    largest_id: int,
    owner: Literal["student", "teacher"],
    float_type: FloatTypeName,
) -> int:
    """Bytes of one completion's message and of its answer, both packed as the codec packs them.

    Ids of a message all have the width of the largest one, so their number and `largest_id` tell their bytes. The
    context is left out: it does not depend on the support, and completions share it.

    Args:
        counts_T: ids in the support of each position; for the teacher's own top-k the same k everywhere.
    """
    support_ids = np.full(int(counts_T.sum()), largest_id, np.int64)
    support = Candidates(support_ids, counts_T) if owner == "student" else TeacherTopK(int(counts_T[0]))
    request = sequence_message(SequenceToScore(np.empty(0, np.int64), completion_ids, support), sequence_id="0")
    answer = pb.SequenceScores(
        sequence_id="0",
        num_rows=len(completion_ids),
        sampled_logprobs=pack_floats(np.zeros(len(completion_ids)), FLOAT_TYPES[float_type]),
        support_logprobs=pack_floats(np.zeros(len(support_ids)), FLOAT_TYPES[float_type]),
        queue_time_s=1.0,
        engine_time_s=1.0,
    )
    if isinstance(support, TeacherTopK):
        answer.k = support.k
        answer.support_ids.CopyFrom(pack_uints(support_ids))
    return request.ByteSize() + answer.ByteSize()
