"""TensorFlow's sorted table of keys and values, which is LevelDB's (leveldb/doc/table_format.md): the `.index` file of a checkpoint.

Unit of data: one table. File: data blocks, index block, footer of 48 bytes. A block is a run of entries whose keys leave out what they
share with the key before, then the restart positions, which only a search needs. Behind it stand its compression (one byte) and a check
sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from teacher_trainer.crc32c import masked_crc32c
from teacher_trainer.protobuf_wire import read_varint

FOOTER_SIZE = 48
MAGIC = 0xDB4775248B80FB57
BLOCK_TRAILER_SIZE = 5  # one byte that names the compression, four of check sum
_PLAIN, _SNAPPY = 0, 1


def read_table(file: memoryview) -> dict[str, memoryview]:
    """All keys and values, in the order of the file (sorted by key).

    Raises:
        ValueError: this is no such table, or it is truncated or altered.
    """
    if len(file) < FOOTER_SIZE or int.from_bytes(file[-8:], "little") != MAGIC:
        raise ValueError("its last 8 bytes are not those of a sorted table: truncated, or another kind of file")
    footer = file[-FOOTER_SIZE:]
    _block(file, footer)  # of properties: there are none here, but damage is to be found
    position = 0
    for _ in range(2):
        _, position = read_varint(footer, position)
    table: dict[str, memoryview] = {}
    for _, handle in _entries(_block(file, footer[position:])):
        for key, value in _entries(_block(file, handle)):
            table[str(key, "utf-8")] = value
    return table


def _block(file: memoryview, handle: memoryview) -> memoryview:
    """The content of the block that a handle (offset and size) points at, checked and unpacked."""
    offset, position = read_varint(handle, 0)
    size, _ = read_varint(handle, position)
    end = offset + size + BLOCK_TRAILER_SIZE
    if end > len(file) - FOOTER_SIZE:
        raise ValueError(f"a block at byte {offset} ends behind the data")
    content, compression = file[offset : offset + size], file[offset + size]
    if masked_crc32c(file[offset : offset + size + 1]) != int.from_bytes(file[end - 4 : end], "little"):
        raise ValueError(f"the check sum of the block at byte {offset} is wrong")
    if compression == _PLAIN:
        return content
    if compression != _SNAPPY:
        raise ValueError(f"the block at byte {offset} is compressed in an unknown way ({compression})")
    unpacked_size, _ = read_varint(content, 0)
    return memoryview(pa.Codec("snappy").decompress(content, decompressed_size=unpacked_size, asbytes=True))


def _entries(block: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The entries of a block, keys completed."""
    num_restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (num_restarts + 1)
    if end < 0:
        raise ValueError("a block is shorter than its list of restart positions")
    position, key = 0, b""
    while position < end:
        shared, position = read_varint(block, position)
        fresh, position = read_varint(block, position)
        value_size, position = read_varint(block, position)
        if shared > len(key) or position + fresh + value_size > end:
            raise ValueError("an entry of a block ends behind the block")
        key = key[:shared] + bytes(block[position : position + fresh])
        position += fresh
        yield key, block[position : position + value_size]
        position += value_size
