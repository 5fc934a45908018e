"""Packing is exact for integers and float32, and rounds to nearest for the 16-bit floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import ArrayError, num_uints, pack_floats, pack_uints, unpack_floats, unpack_uints


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_integers_come_back_as_they_were(values: list[int]) -> None:
    packed = pack_uints(np.array(values, np.int64))
    assert unpack_uints(packed).tolist() == values
    assert num_uints(packed) == len(values)


@pytest.mark.parametrize(("largest", "width"), [(0, 1), (255, 1), (256, 2), (49_151, 2), (65_536, 3), (2**24, 4)])
def test_integers_take_the_narrowest_width(largest: int, width: int) -> None:
    packed = pack_uints(np.array([0, largest], np.int64))
    assert (packed.bytes_per_item, len(packed.data)) == (width, 2 * width)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_integers_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(ArrayError, match=str(value)):
        pack_uints(np.array([value], np.int64))


@pytest.mark.parametrize(
    "array", [pb.UIntArray(bytes_per_item=3, data=b"1234"), pb.UIntArray(bytes_per_item=5, data=b"12345")]
)
def test_bytes_that_are_no_integers_are_refused(array: pb.UIntArray) -> None:
    with pytest.raises(ArrayError):
        unpack_uints(array)


@pytest.mark.parametrize(
    "array",
    [pb.FloatArray(type=pb.FLOAT32, data=b"12345"), pb.FloatArray(type=pb.FLOAT_TYPE_UNSPECIFIED, data=b"1234")],
)
def test_bytes_that_are_no_floats_are_refused(array: pb.FloatArray) -> None:
    with pytest.raises(ArrayError):
        unpack_floats(array)


def test_an_unknown_float_type_is_refused() -> None:
    with pytest.raises(ArrayError, match="float type 9"):
        pack_floats(np.zeros(1, np.float32), 9)  # type: ignore[arg-type]


@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_float32_is_exact(values: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack_floats(pack_floats(values, pb.FLOAT32)), values)


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)))
def test_16_bit_floats_round_as_torch_does(values: np.ndarray) -> None:
    for float_type, dtype in [(pb.FLOAT16, torch.float16), (pb.BFLOAT16, torch.bfloat16)]:
        expected = torch.from_numpy(values).to(dtype).float().numpy()
        np.testing.assert_array_equal(unpack_floats(pack_floats(values, float_type)), expected)
