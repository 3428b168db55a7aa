"""From a teacher's tensors to the body of a REST answer, JSON for people or binary for programs.

Flow: logits or soft labels of the good crops -> the classes asked for -> JSON or the binary form of distill/wire.py; images that failed
keep their places. Only `ask_teacher` belongs to the event loop, the rest is arithmetic for a thread.
Unit of data: one request. Shapes: B images, G good ones, K classes, R retained classes.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.errors import RequestRefused
from distill.teacher_info import TeacherInfo
from distill.wire import SoftLabelsHeader, SoftLabelsMessage, encode_soft_labels
from teacher_server.backend import Floats, TeacherBackend
from teacher_server.intake import Intake
from teacher_server.schemas import SoftLabelsQuery

S = TypeVar("S", bound=np.generic)


async def ask_teacher(
    teacher: TeacherBackend, query: SoftLabelsQuery, temperature: float, crops_GHWC: NDArray[np.uint8], fingerprint: str
) -> Floats:
    """fp32 [G,K]: soft labels for `probs`, else logits; only that tensor is asked of the teacher, and only of this very teacher."""
    if query.kind == "probs":
        temperature_G1 = np.full((len(crops_GHWC), 1), temperature, np.float32)
        _, probs_GK = await teacher.soft_labels(crops_GHWC, temperature_G1, fingerprint=fingerprint)
        return probs_GK
    return await teacher.logits(crops_GHWC, fingerprint=fingerprint)


def log_softmax(scores_BK: Floats) -> Floats:
    """fp32 [B,K], computed in float64."""
    shifted_BK = scores_BK.astype(np.float64) - scores_BK.max(axis=1, keepdims=True)
    return (shifted_BK - np.log(np.exp(shifted_BK).sum(axis=1, keepdims=True))).astype(np.float32)


def check_query(query: SoftLabelsQuery, info: TeacherInfo) -> None:
    """Raises RequestRefused for what only this teacher makes impossible."""
    if query.top_k is not None and query.top_k > info.num_classes:
        raise RequestRefused(f"top_k {query.top_k} is over the {info.num_classes} classes of {info.name}")


def make_message(info: TeacherInfo, query: SoftLabelsQuery, temperature: float, intake: Intake, answered_GK: Floats) -> SoftLabelsMessage:
    """The answer for all B images, from what `ask_teacher` gave: rows of failed ones are NaN."""
    header = SoftLabelsHeader(
        model=info.name,
        version=info.version,
        fingerprint=info.fingerprint,
        temperature=temperature,
        kind=query.kind,
        num_images=intake.num_images,
        num_classes=info.num_classes,
        top_k=query.top_k,
        crop=intake.policy,
        class_names=info.class_names if query.names else None,
        errors=intake.errors,
    )
    # From the logits: the logarithm of a probability that fp32 rounded to 0 would be minus infinity.
    values_GK = log_softmax(answered_GK / np.float32(temperature)) if query.kind == "log_probs" else answered_GK
    if query.top_k is None:
        return SoftLabelsMessage(header, _in_place(values_GK, intake, np.float32(np.nan)))
    ids_GR = largest(values_GK, query.top_k)
    values_BR = _in_place(np.take_along_axis(values_GK, ids_GR, axis=1), intake, np.float32(np.nan))
    return SoftLabelsMessage(header, values_BR, _in_place(ids_GR.astype(np.uint32), intake, np.uint32(0)))


def _in_place(rows_GR: NDArray[S], intake: Intake, filling: S) -> NDArray[S]:
    """[B,R] with the rows of the good images in their places, and `filling` in the others."""
    if not intake.errors:
        return rows_GR
    rows_BR = np.full((intake.num_images, rows_GR.shape[1]), filling, rows_GR.dtype)
    rows_BR[intake.positions_G] = rows_GR
    return rows_BR


def largest(values_BK: Floats, count: int) -> NDArray[np.intp]:
    """Class ids [B,count] of the largest values, largest first; of equal values the smaller id comes first."""
    return np.argsort(-values_BK, axis=1, kind="stable")[:, :count]


def binary_body(message: SoftLabelsMessage) -> bytes:
    """See distill/wire.py."""
    return encode_soft_labels(message)


def json_body(message: SoftLabelsMessage) -> bytes:
    """A SoftLabelsAnswer (schemas.py) as JSON. Values have 7 significant digits, which is what fp32 holds."""
    header = message.header
    names = [json.dumps(name) for name in header.class_names or ()]
    every_class = range(header.num_classes)
    failures = {error.index: error for error in header.errors}
    # One C call for a row: 3 times as fast as a list of rounded floats, and the other threads want the interpreter too.
    row_format = '"values":[' + ",".join(["%.7g"] * message.values_BR.shape[1]) + "]"
    items = []
    for position in range(header.num_images):
        if position in failures:
            error = failures[position]
            items.append(json.dumps({"error": {"code": error.code, "message": error.message}}))
            continue
        parts = [row_format % tuple(message.values_BR[position].tolist())]
        ids = every_class
        if message.class_ids_BR is not None:
            ids = message.class_ids_BR[position].tolist()
            parts.append(f'"class_ids":[{",".join(map(str, ids))}]')
        if names:
            parts.append(f'"class_names":[{",".join([names[k] for k in ids])}]')
        items.append("{" + ",".join(parts) + "}")
    about = header.model_dump(include={"model", "version", "fingerprint", "temperature", "kind", "crop"})
    return "".join(chain(json.dumps(about, separators=(",", ":"))[:-1], ',"items":[', ",".join(items), "]}")).encode()
