"""The outer form of Protocol Buffers messages: numbered fields, without a schema (protobuf.dev, "Encoding").

Unit of data: one message. TensorFlow describes tensors, object graphs and function graphs in such messages; a reader picks the few fields
that it needs and steps over the rest, which is most of a saved graph.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """An unsigned integer, seven bits a byte, and the position behind it.

    Raises:
        ValueError: the data end inside it, or it is longer than 64 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("the data end inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is longer than 64 bits")


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message in order: number and value. Values are integers (varint, fixed) or the bytes of a string or sub-message.

    Raises:
        ValueError: this is no message.
    """
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = read_varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            size, position = read_varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"field {number} is of unknown kind {kind}")
        if position + size > len(message):
            raise ValueError(f"the data end inside field {number}")
        content = message[position : position + size]
        position += size
        yield number, content if kind == _BYTES else int.from_bytes(content, "little")


def messages(message: memoryview, number: int) -> Iterator[memoryview]:
    """The sub-messages (or strings) in field `number`, in order.

    Raises:
        ValueError: this is no message, or the field holds a plain integer.
    """
    for found, value in fields(message):
        if found == number:
            if isinstance(value, int):
                raise ValueError(f"field {number} is a number, not a message")
            yield value


def text(message: memoryview, number: int) -> str:
    """The string in field `number`; empty where it is left out.

    Raises:
        ValueError: this is no message, or the field is no UTF-8 text.
    """
    return next((str(value, "utf-8") for value in messages(message, number)), "")
