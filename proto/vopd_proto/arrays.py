"""Arrays on the wire: packed little-endian bytes with an explicit width or dtype."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vopd_proto import teacher_pb2 as pb

Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class ArrayError(ValueError):
    """Packed bytes that do not make the array they claim to be."""


def pack_uints(values: npt.NDArray[np.integer]) -> pb.UIntArray:
    """Packs non-negative integers below 2**32 at the narrowest whole number of bytes that holds them all.

    Raises: ArrayError for a value outside [0, 2**32).
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size == 0:
        return pb.UIntArray(bytes_per_item=1)
    largest, smallest = int(flat.max()), int(flat.min())
    if smallest < 0 or largest >= 2**32:
        raise ArrayError(f"cannot pack integers in [{smallest}, {largest}]: they must lie in [0, 2**32)")
    bytes_per_item = max(1, (largest.bit_length() + 7) // 8)
    little_endian = flat.astype("<u4").view(np.uint8).reshape(-1, 4)
    return pb.UIntArray(bytes_per_item=bytes_per_item, data=little_endian[:, :bytes_per_item].tobytes())


def unpack_uints(*arrays: pb.UIntArray) -> IntArray:
    """The integers of the arrays, one after the other, [N] int64, in memory of their own and nothing beside it.

    Raises: ArrayError when a width is not 1 to 4 or bytes are not a whole number of items.
    """
    for array in arrays:
        _check_uints(array)
    joined = np.empty(sum(num_uints(array) for array in arrays), np.int64)
    start = 0
    for array in arrays:
        part = joined[start : start + num_uints(array)]
        if array.bytes_per_item == 3:
            little_endian = part.view(np.uint8).reshape(-1, 8)
            little_endian[:] = 0
            little_endian[:, :3] = np.frombuffer(array.data, np.uint8).reshape(-1, 3)
        elif len(part):
            part[:] = np.frombuffer(array.data, f"<u{array.bytes_per_item}")
        start += len(part)
    return joined


def _check_uints(array: pb.UIntArray) -> None:
    width = array.bytes_per_item
    if not array.data:
        return
    if width not in (1, 2, 3, 4):
        raise ArrayError(f"bytes_per_item is {width}; it must be 1, 2, 3 or 4")
    if len(array.data) % width:
        raise ArrayError(f"{len(array.data)} bytes are not a whole number of {width}-byte items")


def num_uints(array: pb.UIntArray) -> int:
    """How many items `array` holds, without unpacking it (0 for a width that is not valid)."""
    return len(array.data) // array.bytes_per_item if array.bytes_per_item in (1, 2, 3, 4) else 0


def pack_floats(values: npt.NDArray[np.floating], float_type: pb.FloatType) -> pb.FloatArray:
    """Packs floats, row-major; FLOAT_TYPE_UNSPECIFIED means FLOAT32. bfloat16 rounds to nearest even.

    Raises: ArrayError for a float type this version does not know.
    """
    flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    if float_type in (pb.FLOAT_TYPE_UNSPECIFIED, pb.FLOAT32):
        return pb.FloatArray(type=pb.FLOAT32, data=flat.tobytes())
    if float_type == pb.FLOAT16:
        with np.errstate(over="ignore"):  # beyond 65504 nats is infinite to anyone
            return pb.FloatArray(type=pb.FLOAT16, data=flat.astype("<f2").tobytes())
    if float_type == pb.BFLOAT16:
        bits = flat.view("<u4")
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        quiet_nan = (bits >> 16) | 0x40
        halves = np.where(np.isnan(flat), quiet_nan, rounded >> 16).astype("<u2")
        return pb.FloatArray(type=pb.BFLOAT16, data=halves.tobytes())
    raise ArrayError(f"float type {float_type} is not known; FLOAT32, FLOAT16 and BFLOAT16 are")


def unpack_floats(*arrays: pb.FloatArray) -> Float32Array:
    """The floats of the arrays, one after the other, [N] float32, in memory of their own and nothing beside it.

    Raises: ArrayError for an unknown type or bytes that are not a whole number of items.
    """
    sizes = [_num_floats(array) for array in arrays]
    joined = np.empty(sum(sizes), np.float32)
    start = 0
    for array, size in zip(arrays, sizes, strict=True):
        part = joined[start : start + size]
        if array.type == pb.BFLOAT16:
            bits = part.view(np.uint32)
            bits[:] = np.frombuffer(array.data, "<u2")
            bits <<= 16
        else:
            part[:] = np.frombuffer(array.data, "<f2" if array.type == pb.FLOAT16 else "<f4")
        start += size
    return joined


def _num_floats(array: pb.FloatArray) -> int:
    widths = {pb.FLOAT32: 4, pb.FLOAT16: 2, pb.BFLOAT16: 2}
    if not array.data:
        return 0
    if array.type not in widths:
        raise ArrayError(f"float type {array.type} is not known; FLOAT32, FLOAT16 and BFLOAT16 are")
    if len(array.data) % widths[array.type]:
        raise ArrayError(f"{len(array.data)} bytes are not a whole number of {widths[array.type]}-byte floats")
    return len(array.data) // widths[array.type]
