"""What a sequence takes of the server's memory and of the engine's time, from its lengths: rough, and said so.

Nothing depends on these being right but the shares: a tenant whose work costs more than estimated gets more than its
share, by that much.
"""

from __future__ import annotations

import hashlib

from vopd_server.scheduler import Demand, Work
from vopd_server.types import Candidates, ScoreRequest, TeacherTopK
from vopd_server.validation import SequenceShape

# Ids as they came and unpacked to int64.
BYTES_PER_TOKEN = 12
# The sampled log-probability, in float32 and packed.
BYTES_PER_ROW = 8
# An id as it came and unpacked, its log-probability in float32 and packed.
BYTES_PER_SUPPORT_LOGPROB = 20
# A hidden state's number in float32 and packed.
BYTES_PER_HIDDEN = 8

# What a tenant has at least: room for a completion of 16k tokens with 100 candidates a position, and some more.
MIN_TENANT_BYTES = 64 * 2**20

# In tokens read. The output head is a tenth to a quarter of a model's products, and runs for scored rows only.
ROW_COST = 0.25
# A gathered log-probability, with its way out; measured on two cores with a model of 135M.
SUPPORT_LOGPROB_COST = 0.01


def demand_of(shape: SequenceShape, *, hidden_size: int) -> Demand:
    """Known before anything is unpacked."""
    rows = shape.completion_length
    num_bytes = BYTES_PER_TOKEN * shape.num_tokens + BYTES_PER_ROW * rows
    num_bytes += BYTES_PER_SUPPORT_LOGPROB * shape.num_support
    if shape.kind == "hidden_states":
        num_bytes += BYTES_PER_HIDDEN * hidden_size * rows
    return Demand(shape.num_tokens, num_bytes)


def work_of(request: ScoreRequest) -> Work:
    """Known once it is unpacked."""
    rows = len(request.completion_ids)
    match request.support:
        case TeacherTopK(k=k):
            num_support = k * rows
        case Candidates(ids=ids):
            num_support = len(ids)
        case _:
            num_support = 0
    return Work(
        context_key=hashlib.sha256(request.context_ids.tobytes()).digest(),
        context_tokens=len(request.context_ids),
        own_tokens=rows,
        row_cost=ROW_COST * rows + SUPPORT_LOGPROB_COST * num_support,
    )
