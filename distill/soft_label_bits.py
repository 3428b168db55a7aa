"""Numbers of a few bits, packed without gaps, lowest bit first; many rows at once.

Shapes: N rows, K numbers in each, S bytes in each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_PLACES = np.arange(8, dtype=np.uint64)
_FEW = 4096
"""Groups of eight below which the calls cost more than the work; above, one place at a time takes an eighth of the memory."""


def pack_bits(values_NK: Bytes, bits: int) -> Bytes:
    """uint8 [N,K] below 2 ** bits -> uint8 [N, ceil(K * bits / 8)]: eight values are `bits` bytes."""
    num, count = values_NK.shape
    padded = np.zeros((num, -(-count // 8) * 8), dtype=np.uint8)
    padded[:, :count] = values_NK
    if bits == 8:
        return values_NK
    words = np.zeros((num, padded.shape[1] // 8), dtype="<u8")
    for place in range(8):
        words |= padded[:, place::8].astype("<u8") << np.uint64(place * bits)
    packed = words.view(np.uint8).reshape(num, -1, 8)[:, :, :bits].reshape(num, -1)
    return packed[:, : packed_bytes(count, bits)]


def unpack_bits(bytes_NS: Bytes, count: int, bits: int) -> Bytes:
    """The inverse, from the first bytes of each row: uint8 [N,count]."""
    if bits == 8:
        return bytes_NS[:, :count]
    num, used = len(bytes_NS), packed_bytes(count, bits)
    groups = -(-count // 8)
    padded = np.zeros((num, groups * bits), dtype=np.uint8)
    padded[:, :used] = bytes_NS[:, :used]
    spread = np.zeros((num, groups, 8), dtype=np.uint8)
    spread[:, :, :bits] = padded.reshape(num, groups, bits)
    words = spread.view("<u8")[:, :, 0]
    mask = np.uint64(2**bits - 1)
    if words.size < _FEW:
        values = (words[:, :, None] >> _PLACES * np.uint64(bits) & mask).astype(np.uint8)
    else:
        values = np.empty((num, groups, 8), dtype=np.uint8)
        for place in range(8):
            values[:, :, place] = words >> np.uint64(place * bits) & mask
    return values.reshape(num, -1)[:, :count]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` numbers take."""
    return -(-count * bits // 8)


def planes(num_bits: int) -> list[tuple[int, int]]:
    """(shift, width) of the parts in which numbers are packed, each at most 8 bits wide, the lowest first."""
    return [(shift, min(8, num_bits - shift)) for shift in range(0, num_bits, 8)]
