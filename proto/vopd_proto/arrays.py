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


def unpack_uints(array: pb.UIntArray) -> IntArray:
    """The integers of `array`, [N] int64.

    Raises: ArrayError when the width is not 1 to 4 or the bytes are not a whole number of items.
    """
    width = array.bytes_per_item
    if not array.data:
        return np.empty(0, np.int64)
    if width not in (1, 2, 3, 4):
        raise ArrayError(f"bytes_per_item is {width}; it must be 1, 2, 3 or 4")
    if len(array.data) % width:
        raise ArrayError(f"{len(array.data)} bytes are not a whole number of {width}-byte items")
    if width == 3:
        padded = np.zeros((len(array.data) // 3, 4), np.uint8)
        padded[:, :3] = np.frombuffer(array.data, np.uint8).reshape(-1, 3)
        return padded.view("<u4").reshape(-1).astype(np.int64)
    return np.frombuffer(array.data, f"<u{width}").astype(np.int64)


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


def unpack_floats(array: pb.FloatArray) -> Float32Array:
    """The floats of `array`, [N] float32.

    Raises: ArrayError for an unknown type or bytes that are not a whole number of items.
    """
    widths = {pb.FLOAT32: 4, pb.FLOAT16: 2, pb.BFLOAT16: 2}
    if not array.data:
        return np.empty(0, np.float32)
    if array.type not in widths:
        raise ArrayError(f"float type {array.type} is not known; FLOAT32, FLOAT16 and BFLOAT16 are")
    if len(array.data) % widths[array.type]:
        raise ArrayError(f"{len(array.data)} bytes are not a whole number of {widths[array.type]}-byte floats")
    if array.type == pb.BFLOAT16:
        return (np.frombuffer(array.data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float32)
    return np.frombuffer(array.data, "<f4" if array.type == pb.FLOAT32 else "<f2").astype(np.float32)
