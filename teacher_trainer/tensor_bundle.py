"""A TensorFlow checkpoint, read without TensorFlow: named tensors in `PREFIX.index` and `PREFIX.data-00000-of-00001` (and further shards).

Unit of data: one tensor, read when it is asked for. The index is a sorted table (`sorted_table.py`): under the empty key stands a
BundleHeaderProto (shards, byte order), under each name a BundleEntryProto (type, shape, shard, offset, size, check sum); the shards are raw
bytes (tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto). Damage is found: every block of the index and
every tensor that is read carries a check sum, and a shard that is too short for its tensors is refused when the bundle is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from distill.errors import CheckpointError
from teacher_trainer.crc32c import masked_crc32c
from teacher_trainer.protobuf_wire import fields, messages, read_varint
from teacher_trainer.sorted_table import read_table

_STRING, _BFLOAT16 = 7, 14
_NUMPY_TYPES = {1: "f4", 2: "f8", 3: "i4", 4: "u1", 5: "i2", 6: "i1", 9: "i8", 10: "?", 17: "u2", 19: "f2", 22: "u4", 23: "u8"}
"""TensorFlow's DataType -> numpy's name. bfloat16 has none: it is read as the float32 that it is the upper half of."""


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size_bytes: int
    checksum: int
    sliced: bool


class TensorBundle:
    """The tensors of a checkpoint, by name.

    Args:
        prefix: the path without `.index`, as TensorFlow names checkpoints.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or is no checkpoint of this kind.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = prefix.with_name(prefix.name + ".index")
        try:
            table = read_table(memoryview(index.read_bytes()))
            header = table.pop("", None)
            if header is None:
                raise ValueError("it has no header")
            self._num_shards, big_endian = _parse_header(header)
            self._entries = {name: _parse_entry(value) for name, value in table.items()}
        except OSError as error:
            raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{index} is damaged or no TensorFlow checkpoint ({error}); copy or download it again") from error
        self._byte_order: Literal[">", "<"] = ">" if big_endian else "<"
        self._check_shards()

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it.

        Raises:
            CheckpointError: no tensor of this name.
        """
        return self._entry(name).shape

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor of numbers, in the byte order of this machine; bfloat16 comes as float32.

        Raises:
            CheckpointError: no tensor of this name, one of another kind, or damaged.
        """
        entry = self._entry(name)
        item_type = "u2" if entry.dtype == _BFLOAT16 else _NUMPY_TYPES.get(entry.dtype)
        if item_type is None or entry.sliced:
            kind = "in slices" if entry.sliced else f"of TensorFlow's type {entry.dtype}"
            raise CheckpointError(f"tensor {name} in {self.prefix} is stored {kind}, which cannot be read; save it whole, as float32")
        dtype = np.dtype(item_type).newbyteorder(self._byte_order)
        if entry.size_bytes != dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64)):
            raise CheckpointError(f"tensor {name} in {self.prefix} has {entry.size_bytes} bytes, not those of its shape {entry.shape}")
        data = self._bytes_of(name, entry)
        self._check(name, entry, data)
        array = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=True).reshape(entry.shape)
        return (array.astype(np.uint32) << 16).view(np.float32) if entry.dtype == _BFLOAT16 else array

    def read_text(self, name: str) -> bytes:
        """A scalar string, as bytes.

        Raises:
            CheckpointError: no tensor of this name, one of another kind, or damaged.
        """
        entry = self._entry(name)
        if entry.dtype != _STRING or entry.shape:
            raise CheckpointError(f"tensor {name} in {self.prefix} is no single string")
        data = memoryview(self._bytes_of(name, entry))
        try:  # the length as a varint, a check sum of the length, the characters
            length, start = read_varint(data, 0)
        except ValueError as error:
            raise CheckpointError(f"tensor {name} in {self.prefix} is damaged ({error})") from error
        if start + 4 + length != len(data):
            raise CheckpointError(f"tensor {name} in {self.prefix} is damaged: {len(data)} bytes do not hold {length} characters")
        # What is summed is the length as a plain integer, not the varint that is stored.
        self._check(name, entry, length.to_bytes(4 if length < 1 << 32 else 8, "little") + bytes(data[start:]))
        return bytes(data[start + 4 :])

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.prefix} holds no tensor {name}")
        return self._entries[name]

    def _shard(self, shard: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self._num_shards:05d}")

    def _check_shards(self) -> None:
        ends: dict[int, int] = {}
        for entry in self._entries.values():
            ends[entry.shard] = max(ends.get(entry.shard, 0), entry.offset + entry.size_bytes)
        for shard, end in sorted(ends.items()):
            path = self._shard(shard)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: the checkpoint's index names it")
            if path.stat().st_size < end:
                raise CheckpointError(
                    f"{path} is truncated: {path.stat().st_size} bytes, and the index says {end}; copy or download it again"
                )

    def _bytes_of(self, name: str, entry: _Entry) -> bytes:
        path = self._shard(entry.shard)
        try:
            with path.open("rb") as file:
                file.seek(entry.offset)
                data = file.read(entry.size_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != entry.size_bytes:
            raise CheckpointError(f"{path} is truncated inside tensor {name}; copy or download it again")
        return data

    def _check(self, name: str, entry: _Entry, data: bytes) -> None:
        if masked_crc32c(data) != entry.checksum:
            raise CheckpointError(
                f"tensor {name} in {self._shard(entry.shard)} is altered (its check sum is wrong); copy or download it again"
            )


def _parse_header(message: memoryview) -> tuple[int, bool]:
    """BundleHeaderProto -> number of shards, and whether numbers are big-endian."""
    found = dict(fields(message))
    return _number(found.get(1, 1)), _number(found.get(2, 0)) == 1


def _parse_entry(message: memoryview) -> _Entry:
    """BundleEntryProto -> where the tensor lies."""
    found = dict(fields(message))
    shape = found.get(2, memoryview(b""))
    if isinstance(shape, int):
        raise ValueError("an entry has a number in place of its shape")
    return _Entry(
        dtype=_number(found.get(1, 0)),
        shape=tuple(_number(dict(fields(dimension)).get(1, 0)) for dimension in messages(shape, 2)),
        shard=_number(found.get(3, 0)),
        offset=_number(found.get(4, 0)),
        size_bytes=_number(found.get(5, 0)),
        checksum=_number(found.get(6, 0)),
        sliced=7 in found,
    )


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes in place of a number")
    return value
