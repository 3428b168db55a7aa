"""CRC-32C of large buffers in numpy: the check sum that TensorFlow puts behind every block and every tensor of a checkpoint.

Unit of data: one buffer of bytes. It is cut into lanes of equal length whose remainders are computed side by side, four bytes a step; the
lanes are then joined in pairs, because appending zeros to a message is a linear map on its remainder (Castagnoli's polynomial, RFC 3720
appendix B.4; the masked form is LevelDB's, doc/log_format.md).
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

POLYNOMIAL = 0x82F63B78  # reflected
MASK_DELTA = 0xA282EAD8
MAX_LANES = 1 << 14  # more lanes no longer fit the processor's cache
MIN_STEPS = 32  # words of a lane, below which joining lanes costs more than it saves
MIN_WORDS = 512  # of a buffer, below which plain Python is faster
MAX_STEPS = 1 << 10  # words of a lane, above which the turned copy of a block (64 MiB) is larger than it need be
_ALL_ONES = np.uint32(0xFFFFFFFF)


def masked_crc32c(data: bytes | memoryview) -> int:
    """The form that is stored: a check sum of data that holds check sums would be weak, so it is rotated and shifted by a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C of a buffer."""
    words = np.frombuffer(data, np.dtype("<u4"), count=len(data) // 4)
    crc = _ALL_ONES
    position = 0
    while len(words) - position >= MIN_WORDS:
        # A power of two of lanes, so that they join in pairs; what is left over goes round again with fewer.
        num_lanes = min(MAX_LANES, 1 << ((len(words) - position) // MIN_STEPS).bit_length() - 1)
        steps = min((len(words) - position) // num_lanes, MAX_STEPS)
        block = words[position : position + num_lanes * steps].reshape(num_lanes, steps)
        crc = _remainder_of_lanes(block, crc)
        position += num_lanes * steps
    table, rest = _byte_table(), int(crc)
    for byte in bytes(data[4 * position :]):
        rest = table[(rest ^ byte) & 0xFF] ^ (rest >> 8)
    return rest ^ 0xFFFFFFFF


def _remainder_of_lanes(words_LS: Words, start: np.uint32) -> np.uint32:
    """The remainder after L lanes of S words each, in order, having begun with `start`."""
    tables = _byte_tables()
    crc_L = np.zeros(len(words_LS), np.uint32)
    crc_L[0] = start
    for word_L in np.ascontiguousarray(words_LS.T):
        crc_L = crc_L ^ word_L
        crc_L = tables[3][crc_L & 0xFF] ^ tables[2][(crc_L >> 8) & 0xFF] ^ tables[1][(crc_L >> 16) & 0xFF] ^ tables[0][crc_L >> 24]
    num_bytes = 4 * words_LS.shape[1]
    while len(crc_L) > 1:
        crc_L = _append_zeros(crc_L[0::2], num_bytes) ^ crc_L[1::2]
        num_bytes *= 2
    return np.uint32(crc_L[0])


@functools.cache
def _byte_table() -> list[int]:
    """What one byte does to the remainder, as plain numbers."""
    return [int(entry) for entry in _byte_tables()[0]]


@functools.cache
def _byte_tables() -> Words:
    """[4,256]: what one byte does to the remainder, alone and with one, two and three zero bytes behind it."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1).astype(np.uint32)
    tables = [table]
    for _ in range(3):
        tables.append(table[tables[-1] & 0xFF] ^ (tables[-1] >> 8))
    return np.stack(tables)


def _append_zeros(crc_L: Words, num_bytes: int) -> Words:
    """Each remainder after `num_bytes` zero bytes more."""
    return _apply(_zeros_map(num_bytes), crc_L)


@functools.lru_cache(maxsize=256)
def _zeros_map(num_bytes: int) -> Words:
    """[32]: where each single bit of a remainder goes when `num_bytes` zero bytes follow."""
    if num_bytes == 1:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return _byte_tables()[0][bits & 0xFF] ^ (bits >> 8)
    half = _zeros_map(num_bytes // 2)
    doubled = _apply(half, half)
    return _apply(_zeros_map(1), doubled) if num_bytes % 2 else doubled


def _apply(images_32: Words, crc_L: Words) -> Words:
    """The linear map that sends bit b to `images_32[b]`, on every remainder."""
    bits_L32 = (crc_L[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return np.bitwise_xor.reduce(bits_L32 * images_32, axis=1)
