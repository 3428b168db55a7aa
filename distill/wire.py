"""Tensor names, and the binary bodies of the REST gateway: crops on the way in, soft labels on the way out.

Flow: client --crops--> gateway --(gRPC tensors, named here)--> teacher --> gateway --soft labels--> client.
Unit of data: one message about B crops. Everything is little-endian; a message is exactly as long as its header says.

    crops         "DCRP"  version u16  0 u16  B u32  H u32  W u32   uint8 [B,H,W,3]
    soft labels   "DSLB"  version u16  0 u16  header size u32       header JSON, padded with spaces to a multiple of 4
                                                                    uint32 [B,R] class ids (only if the header says R = top_k)
                                                                    float32 [B,R] values (R = K without top_k)

A row of a crop that failed is NaN throughout and is named under `errors` in the header, so that it cannot pass for a label.
Shapes: B images, H W pixels, K classes, R retained classes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distill.config import Section, validate
from distill.errors import ConfigError, RequestRefused, TeacherAnswerError

IMAGES = "images"
TEMPERATURE = "temperature"
LOGITS = "logits"
SOFT_LABELS = "soft_labels"
TOP_IDS = "top_ids"
TOP_LOGITS = "top_logits"

LABELS_PATH = "/v1/soft-labels"
CROPS_MEDIA_TYPE = "application/x-distill-crops"
SOFT_LABELS_MEDIA_TYPE = "application/x-distill-soft-labels"
WIRE_VERSION = 1

Kind = Literal["probs", "logits", "log_probs"]
CropPolicy = Literal["teacher", "as-is"]

_CROPS_MAGIC = b"DCRP"
_LABELS_MAGIC = b"DSLB"
_CROPS_HEAD = struct.Struct("<4sHHIII")
_LABELS_HEAD = struct.Struct("<4sHHI")
_LARGEST_HEADER = 16 * 2**20
_LARGEST_SIDE = 4096


class ItemError(Section):
    """Why one image of a request has no label."""

    index: int = Field(ge=0)
    """Position of the image in the request."""
    code: str
    """Short machine-readable name of the failure."""
    message: str
    """The same for a person."""


class SoftLabelsHeader(Section):
    """What the numbers of one answer mean, and whose they are."""

    model: str
    """Name of the teacher."""
    version: int = Field(ge=1)
    """Version of the teacher."""
    fingerprint: str
    """Fingerprint of the teacher."""
    temperature: float = Field(gt=0, le=100)
    """Temperature of `probs` and `log_probs`; logits are before it."""
    kind: Kind
    """What the values are."""
    num_images: int = Field(ge=0)
    """B."""
    num_classes: int = Field(ge=2)
    """K."""
    top_k: int | None = Field(default=None, ge=1)
    """R: the classes with the largest values, largest first; none: all classes in the order of their ids."""
    crop: CropPolicy | None = None
    """Whether the teacher's own evaluation crop was cut from the images, or they were crops already."""
    class_names: tuple[str, ...] | None = None
    """Names of all K classes in the order of their ids, if they were asked for."""
    errors: tuple[ItemError, ...] = ()
    """The images without a label; their rows are NaN."""


@dataclass(frozen=True)
class SoftLabelsMessage:
    """One answer: `values_BR` float32 and, with top_k, `class_ids_BR` uint32."""

    header: SoftLabelsHeader
    values_BR: NDArray[np.float32]
    class_ids_BR: NDArray[np.uint32] | None = None


def encode_crops(crops_BHWC: NDArray[np.uint8]) -> bytes:
    """uint8 [B,H,W,3] as one message.

    Raises:
        RequestRefused: another dtype or shape.
    """
    if crops_BHWC.dtype != np.uint8 or crops_BHWC.ndim != 4 or crops_BHWC.shape[3] != 3:
        raise RequestRefused(f"crops must be uint8 [B,H,W,3], got {crops_BHWC.dtype} {list(crops_BHWC.shape)}")
    num_crops, height, width, _ = crops_BHWC.shape
    head = _CROPS_HEAD.pack(_CROPS_MAGIC, WIRE_VERSION, 0, num_crops, height, width)
    return b"".join((head, np.ascontiguousarray(crops_BHWC).data))  # copies the pixels once, `+` would do it twice


def decode_crops(body: bytes) -> NDArray[np.uint8]:
    """The read-only uint8 [B,H,W,3] view of a message.

    Raises:
        RequestRefused: not this format or version, a side outside 1 to 4096, or not exactly as long as announced.
    """
    if len(body) < _CROPS_HEAD.size:
        raise RequestRefused(f"crops body of {len(body)} bytes is shorter than its header of {_CROPS_HEAD.size}")
    magic, version, reserved, num_crops, height, width = _CROPS_HEAD.unpack_from(body)
    if magic != _CROPS_MAGIC or version != WIRE_VERSION or reserved:
        raise RequestRefused(f"crops body is not of format {_CROPS_MAGIC.decode()} version {WIRE_VERSION}")
    if not (1 <= height <= _LARGEST_SIDE and 1 <= width <= _LARGEST_SIDE):
        raise RequestRefused(f"crops of {height} x {width} pixels are outside 1 to {_LARGEST_SIDE}")
    expected = _CROPS_HEAD.size + num_crops * height * width * 3
    if len(body) != expected:
        raise RequestRefused(f"crops body holds {len(body)} bytes, its header announces {expected}")
    return np.frombuffer(body, np.uint8, offset=_CROPS_HEAD.size).reshape(num_crops, height, width, 3)


def encode_soft_labels(message: SoftLabelsMessage) -> bytes:
    """One answer as bytes. The shapes must be those that its header states: that is ours to get right."""
    header = message.header
    shape = _shape(header)
    assert message.values_BR.shape == shape, (message.values_BR.shape, shape)
    assert (message.class_ids_BR is None) == (header.top_k is None)
    text = json.dumps(header.model_dump(mode="json"), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    parts = [_LABELS_HEAD.pack(_LABELS_MAGIC, WIRE_VERSION, 0, len(text)), text]
    if message.class_ids_BR is not None:
        assert message.class_ids_BR.shape == shape, (message.class_ids_BR.shape, shape)
        parts.append(message.class_ids_BR.astype("<u4").tobytes())
    parts.append(message.values_BR.astype("<f4").tobytes())
    return b"".join(parts)


def decode_soft_labels(body: bytes) -> SoftLabelsMessage:
    """The answer in `body`, arrays as read-only views.

    Raises:
        TeacherAnswerError: not this format or version, a damaged header, not exactly as long as announced, or a class id out of range.
    """
    if len(body) < _LABELS_HEAD.size:
        raise TeacherAnswerError(f"soft labels body of {len(body)} bytes is shorter than its header of {_LABELS_HEAD.size}")
    magic, version, reserved, header_size = _LABELS_HEAD.unpack_from(body)
    if magic != _LABELS_MAGIC or version != WIRE_VERSION or reserved:
        raise TeacherAnswerError(f"soft labels body is not of format {_LABELS_MAGIC.decode()} version {WIRE_VERSION}")
    start = _LABELS_HEAD.size + header_size
    if header_size % 4 or header_size > min(_LARGEST_HEADER, len(body)):
        raise TeacherAnswerError(f"soft labels body announces a header of {header_size} bytes, which it cannot hold")
    header = _read_header(body[_LABELS_HEAD.size : start])
    shape = _shape(header)
    num_values = shape[0] * shape[1]
    expected = start + 4 * num_values * (1 if header.top_k is None else 2)
    if len(body) != expected:
        raise TeacherAnswerError(f"soft labels body holds {len(body)} bytes, its header announces {expected}")
    class_ids_BR = None
    if header.top_k is not None:
        class_ids_BR = np.frombuffer(body, "<u4", num_values, start).reshape(shape)
        if num_values and int(class_ids_BR.max()) >= header.num_classes:
            raise TeacherAnswerError(f"soft labels body names class {int(class_ids_BR.max())} of {header.num_classes}")
    values_BR = np.frombuffer(body, "<f4", num_values, expected - 4 * num_values).reshape(shape)
    return SoftLabelsMessage(header, values_BR, class_ids_BR)


def _read_header(text: bytes) -> SoftLabelsHeader:
    try:
        return validate(SoftLabelsHeader, json.loads(text), origin="soft labels header")
    except ConfigError as error:
        raise TeacherAnswerError(str(error)) from error
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise TeacherAnswerError("soft labels header is not JSON") from error


def _shape(header: SoftLabelsHeader) -> tuple[int, int]:
    """(B, R)."""
    if header.top_k is not None and header.top_k > header.num_classes:
        raise TeacherAnswerError(f"soft labels header keeps {header.top_k} of {header.num_classes} classes")
    return header.num_images, header.top_k or header.num_classes
