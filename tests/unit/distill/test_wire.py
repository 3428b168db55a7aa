"""The binary bodies: decode(encode(x)) is x, and nothing else is accepted."""

from __future__ import annotations

import json
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distill.errors import DistillError, RequestRefused, TeacherAnswerError
from distill.wire import (
    ItemError,
    SoftLabelsHeader,
    SoftLabelsMessage,
    decode_crops,
    decode_soft_labels,
    encode_crops,
    encode_soft_labels,
)


def header(**changes: object) -> SoftLabelsHeader:
    fields = {"model": "m", "version": 1, "fingerprint": "f", "temperature": 2.0, "kind": "probs", "num_images": 2, "num_classes": 3}
    return SoftLabelsHeader.model_validate({**fields, **changes})


def message(**changes: object) -> SoftLabelsMessage:
    head = header(**changes)
    shape = (head.num_images, head.top_k or head.num_classes)
    values_BR = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    ids_BR = np.tile(np.arange(shape[1], dtype=np.uint32), (shape[0], 1)) if head.top_k else None
    return SoftLabelsMessage(head, values_BR, ids_BR)


def rewritten(body: bytes, **changes: object) -> bytes:
    """The same message with other header fields and the payload left alone."""
    size = struct.unpack_from("<I", body, 8)[0]
    text = json.dumps({**json.loads(body[12 : 12 + size]), **changes}).encode()
    text += b" " * (-len(text) % 4)
    return body[:8] + struct.pack("<I", len(text)) + text + body[12 + size :]


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6), st.just(3))))
def test_crops_come_back(crops_BHWC: np.ndarray) -> None:
    decoded = decode_crops(encode_crops(crops_BHWC))
    assert decoded.dtype == np.uint8
    assert decoded.shape == crops_BHWC.shape
    assert (decoded == crops_BHWC).all()


@given(st.integers(0, 4), st.integers(2, 300), st.data())
def test_soft_labels_come_back_bit_for_bit(num_images: int, num_classes: int, data: st.DataObject) -> None:
    top_k = data.draw(st.none() | st.integers(1, num_classes))
    head = header(num_images=num_images, num_classes=num_classes, top_k=top_k, model=data.draw(st.text(max_size=9)))
    shape = (num_images, top_k or num_classes)
    values = data.draw(hnp.arrays(np.uint32, shape)).view(np.float32)  # every bit pattern, NaN and infinities, too
    ids = data.draw(hnp.arrays(np.uint32, shape, elements=st.integers(0, num_classes - 1))) if top_k else None
    decoded = decode_soft_labels(encode_soft_labels(SoftLabelsMessage(head, values, ids)))
    assert decoded.header == head
    assert decoded.values_BR.tobytes() == values.tobytes()
    assert (decoded.class_ids_BR is None) == (ids is None)
    assert ids is None or (decoded.class_ids_BR == ids).all()


def test_the_layout_is_frozen() -> None:
    """Programs in other languages read this: a change of these bytes is a new version."""
    head = "44435250 0100 0000 01000000 01000000 02000000"
    assert encode_crops(np.full((1, 1, 2, 3), 7, np.uint8)) == bytes.fromhex(head) + b"\x07" * 6
    body = encode_soft_labels(message(top_k=1))
    assert body[:8] == b"DSLB\x01\x00\x00\x00"
    assert len(body) % 4 == 0
    assert body[-16:].hex() == "0000000000000000000000000000803f"


@given(st.binary(max_size=200))
def test_noise_raises_nothing_but_our_own_errors(noise: bytes) -> None:
    for magic in (b"", b"DCRP\x01\x00\x00\x00", b"DSLB\x01\x00\x00\x00"):
        for decode in (decode_crops, decode_soft_labels):
            with suppress(DistillError):  # any other exception fails the test
                decode(magic + noise)


@pytest.mark.parametrize("cut", [0, 5, 19, 25])
def test_a_cut_crops_body_is_refused(cut: int) -> None:
    with pytest.raises(RequestRefused, match="bytes"):
        decode_crops(encode_crops(np.zeros((1, 2, 2, 3), np.uint8))[:cut])


def test_every_cut_and_every_addition_to_soft_labels_is_refused() -> None:
    body = encode_soft_labels(message(top_k=2))
    for end in range(len(body)):
        with pytest.raises(TeacherAnswerError):
            decode_soft_labels(body[:end])
    with pytest.raises(TeacherAnswerError, match="announces"):
        decode_soft_labels(body + b"\x00")


def test_other_formats_are_refused() -> None:
    crops = encode_crops(np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(RequestRefused, match="DCRP version 1"):
        decode_crops(crops[:4] + b"\x02" + crops[5:])
    with pytest.raises(RequestRefused, match="uint8"):
        encode_crops(np.zeros((1, 2, 2, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(RequestRefused, match="4096"):
        decode_crops(struct.pack("<4sHHIII", b"DCRP", 1, 0, 0, 5000, 1))
    with pytest.raises(TeacherAnswerError, match="DSLB version 1"):
        decode_soft_labels(b"DSLB\x02" + encode_soft_labels(message())[5:])


def test_a_header_that_lies_is_refused() -> None:
    body = encode_soft_labels(message(top_k=2, num_classes=3))
    ids_BR = np.array([[0, 1], [0, 3]], np.uint32)
    with pytest.raises(TeacherAnswerError, match="names class 3 of 3"):
        decode_soft_labels(encode_soft_labels(SoftLabelsMessage(header(top_k=2), np.zeros((2, 2), np.float32), ids_BR)))
    with pytest.raises(TeacherAnswerError, match="keeps 9 of 3"):
        decode_soft_labels(rewritten(body, top_k=9))
    with pytest.raises(TeacherAnswerError, match="temperature"):
        decode_soft_labels(rewritten(body, temperature=0))
    with pytest.raises(TeacherAnswerError, match="unknown key"):
        decode_soft_labels(rewritten(body, tau=2))


def test_failed_images_are_named() -> None:
    failed = ItemError(index=1, code="bad_image", message="truncated")
    assert decode_soft_labels(encode_soft_labels(message(errors=[failed.model_dump()]))).header.errors == (failed,)
