"""The reader of TensorFlow's tensor bundles: files of TensorFlow itself, files of our own writer, damage of every kind."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import CheckpointError
from teacher_trainer.crc32c import crc32c, masked_crc32c
from teacher_trainer.protobuf_wire import fields, read_varint
from teacher_trainer.tensor_bundle import TensorBundle

REAL = Path(__file__).parent / "simclr_tf"
TF1 = REAL / "tf1_r50_sk1_ft1pct" / "model.ckpt-751"
TF2 = REAL / "tf2_r18_sk1_ft1" / "ckpt-3754"


def slow_crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"123456789", 0xE3069283), (b"", 0)],
)
def test_crc_of_the_standard(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected  # RFC 3720, appendix B.4


@given(st.binary(max_size=5000))
def test_crc_bit_by_bit(data: bytes) -> None:
    assert crc32c(data) == slow_crc32c(data)


@pytest.mark.parametrize("size", [4095, 4096, 20_001])
def test_crc_of_a_buffer_of_several_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_trainer.crc32c.MAX_LANES", 8)  # the real blocks have 64 MiB
    monkeypatch.setattr("teacher_trainer.crc32c.MAX_STEPS", 40)
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    assert crc32c(data) == slow_crc32c(data)


def test_every_tensor_of_tensorflow_has_its_check_sum() -> None:
    for prefix, count in ((TF1, 388), (TF2, 134)):
        bundle = TensorBundle(prefix)
        assert len(bundle.names()) == count
        for name in bundle.names():
            if name == "_CHECKPOINTABLE_OBJECT_GRAPH":
                assert len(bundle.read_text(name)) > 30_000
            else:
                assert bundle.read(name).shape == bundle.shape(name)


def test_values_of_tensorflow() -> None:
    assert TensorBundle(TF1).read("global_step") == 751
    assert TensorBundle(TF2).read("global_step/.ATTRIBUTES/VARIABLE_VALUE").dtype == np.int64
    variance = TensorBundle(TF1).read("base_model/batch_normalization/moving_variance")
    assert variance.dtype == np.float32
    assert (variance > 0).all()


@pytest.fixture
def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    numbers = {f"layer_{i}/kernel": rng.normal(size=(3, i, 2)).astype(np.float32) for i in range(40)}
    return numbers | {
        "double": rng.normal(size=5),
        "half": rng.normal(size=5).astype(np.float16),
        "int32": np.array([[1, -2]], np.int32),
        "step": np.array(751, np.int64),
        "text": b"\x00some bytes" * 30,
    }


@pytest.mark.parametrize("form", [{}, {"num_shards": 3}, {"snappy": True}, {"big_endian": True}])
def test_what_is_written_is_read(tf: Any, tmp_path: Path, tensors: dict[str, Any], form: dict[str, Any]) -> None:
    if "big_endian" in form:
        del tensors["text"]  # its inner numbers are little-endian in every file
    tf.write_bundle(tmp_path / "ckpt-1", tensors, **form)
    bundle = TensorBundle(tmp_path / "ckpt-1")
    assert bundle.names() == sorted(tensors)
    for name, expected in tensors.items():
        if isinstance(expected, bytes):
            assert bundle.read_text(name) == expected
            continue
        found = bundle.read(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        found += 1  # one's own copy, to be written into


def test_bfloat16_is_the_upper_half_of_float32(tf: Any, tmp_path: Path) -> None:
    exact = np.array([1.0, -2.5, 0.15625], np.float32)
    tf.write_bundle(tmp_path / "b", {"x": (exact.view(np.uint32) >> 16).astype(np.uint16)})
    np.testing.assert_array_equal(TensorBundle(tmp_path / "b").read("x"), exact)


def copied(tmp_path: Path) -> Path:
    for suffix in (".index", ".data-00000-of-00001"):
        shutil.copy(TF2.with_name(TF2.name + suffix), tmp_path / f"ckpt{suffix}")
    return tmp_path / "ckpt"


def damaged(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("position", [0, 100, 5000, -60, -48, -1])
def test_a_flipped_bit_in_the_index(tmp_path: Path, position: int) -> None:
    prefix = copied(tmp_path)
    damaged(tmp_path / "ckpt.index", position)
    with pytest.raises(CheckpointError, match=r"ckpt\.index is damaged or no TensorFlow checkpoint"):
        TensorBundle(prefix)


def test_every_length_of_a_truncated_index(tmp_path: Path) -> None:
    prefix = copied(tmp_path)
    data = (tmp_path / "ckpt.index").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "ckpt.index").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"ckpt\.index is damaged"):
            TensorBundle(prefix)


def test_a_flipped_bit_in_a_tensor_names_the_tensor(tmp_path: Path) -> None:
    prefix = copied(tmp_path)
    damaged(tmp_path / "ckpt.data-00000-of-00001", 40_000)  # the object graph lies before, the weights behind
    bundle = TensorBundle(prefix)
    altered = [name for name in bundle.names() if is_altered(bundle, name)]
    assert len(altered) == 1


def is_altered(bundle: TensorBundle, name: str) -> bool:
    try:
        bundle.read_text(name) if name == "_CHECKPOINTABLE_OBJECT_GRAPH" else bundle.read(name)
    except CheckpointError:
        return True
    return False


def test_a_flipped_bit_in_a_text(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "b", {"x": b"some text"})
    damaged(tmp_path / "b.data-00000-of-00001", -1)
    with pytest.raises(CheckpointError, match="is altered"):
        TensorBundle(tmp_path / "b").read_text("x")


def test_truncated_and_missing_data(tmp_path: Path) -> None:
    prefix = copied(tmp_path)
    data = tmp_path / "ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated: 3057422 bytes, and the index says 3057423"):
        TensorBundle(prefix)
    data.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        TensorBundle(prefix)


def test_other_tensors_than_asked_for(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "b", {"x": b"text", "y": np.zeros(2, np.float32)})
    bundle = TensorBundle(tmp_path / "b")
    assert "x" in bundle
    with pytest.raises(CheckpointError, match="holds no tensor z"):
        bundle.shape("z")
    with pytest.raises(CheckpointError, match="type 7, which cannot be read"):
        bundle.read("x")
    with pytest.raises(CheckpointError, match="is no single string"):
        bundle.read_text("y")


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.index cannot be read: No such file"):
        TensorBundle(tmp_path / "none")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):  # and nothing else
        assert all(isinstance(value, (int, memoryview)) for _, value in fields(memoryview(data)))


@given(st.integers(0, 2**64 - 1))
def test_varint(value: int) -> None:
    out, rest = bytearray(), value
    while rest > 127:
        out.append(rest % 128 + 128)
        rest //= 128
    out.append(rest)
    assert read_varint(memoryview(bytes(out) + b"\x01"), 0) == (value, len(out))


def test_mask_is_the_one_of_leveldb() -> None:
    crc = crc32c(b"foo")
    assert masked_crc32c(b"foo") == ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32
