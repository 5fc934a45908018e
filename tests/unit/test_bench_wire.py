"""The figures of the wire benchmark, from numbers whose cost is known."""

from __future__ import annotations

import numpy as np
import pytest

from vopd_proto import teacher_pb2 as pb
from wire import Scored, gaps, id_rows, rounding, varint_bytes


def test_gaps_give_the_ids_back_row_by_row() -> None:
    rng = np.random.default_rng(0)
    counts_N = np.array([3, 0, 1, 7])
    ids_M = rng.permutation(1000)[: counts_N.sum()]
    gaps_M, order_M = gaps(ids_M, counts_N)
    rows_M = np.repeat(np.arange(4), counts_N)
    for row in range(4):
        ascending = np.cumsum(gaps_M[rows_M == row])
        assert ascending.tolist() == sorted(ids_M[rows_M == row].tolist())
    assert ids_M[order_M].tolist() == [value for row in range(4) for value in sorted(ids_M[rows_M == row].tolist())]


@pytest.mark.parametrize(("value", "size"), [(0, 1), (127, 1), (128, 2), (16_383, 2), (16_384, 3), (2_097_152, 4)])
def test_a_varint_is_as_long_as_protobufs(value: int, size: int) -> None:
    assert varint_bytes(np.array([value])) == size
    # A field's key is one byte, its value the rest; protobuf leaves zeros out.
    assert value == 0 or pb.TeacherTopK(k=value).ByteSize() == 1 + size


def test_rounding_is_nothing_in_float32_and_what_the_mantissa_leaves_in_16_bits() -> None:
    scored = Scored(
        np.array([-10.003], np.float32), np.arange(2), np.array([2]), np.array([-0.0101, -4.62], np.float32)
    )
    assert set(rounding(scored, pb.FLOAT32).values()) == {0.0}
    for float_type, eps in ((pb.FLOAT16, 2**-11), (pb.BFLOAT16, 2**-8)):
        found = rounding(scored, float_type)
        assert 0 < found["sampled_max_nats"] <= 10.003 * eps
        assert 0 < found["support_max_nats"] <= 4.62 * eps
        assert found["support_value_max_nats"] < found["support_max_nats"]


def test_bytes_of_ids_follow_the_vocabulary() -> None:
    counts_N = np.full(50, 100)
    ids_M = np.concatenate([np.sort(np.random.default_rng(row).permutation(49_152)[:100]) for row in range(50)])
    scored = Scored(np.zeros(50, np.float32), ids_M, counts_N, np.zeros(len(ids_M), np.float32))
    small, large = ({row["way"]: row["bytes_a_token"] for row in id_rows(scored, v, "")} for v in (49_152, 151_936))
    assert (small["four bytes"], small["narrowest whole bytes"]) == (400, 200)
    assert large["narrowest whole bytes"] == 300
    assert small["gaps, seven bits a byte"] < large["gaps, seven bits a byte"] < 200
