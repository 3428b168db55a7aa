"""From a teacher's tensors to the body of a REST answer, JSON for people or binary for programs.

Flow: logits or soft labels of the good crops -> the classes asked for -> JSON or the binary form of distill/wire.py; images that failed
keep their places.
Unit of data: one request. Shapes: B images, G good ones, K classes, R retained classes.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from distill.errors import RequestRefused
from distill.teacher_info import TeacherInfo
from distill.wire import SoftLabelsHeader, SoftLabelsMessage, encode_soft_labels
from teacher_server.backend import Floats, TeacherBackend
from teacher_server.intake import Intake
from teacher_server.schemas import Failure, LabelItem, SoftLabelsAnswer, SoftLabelsQuery


async def ask_teacher(teacher: TeacherBackend, query: SoftLabelsQuery, temperature: float, crops_GHWC: NDArray[np.uint8]) -> Floats:
    """fp32 [G,K] of the kind asked for; only the tensor needed for it is asked of the teacher."""
    if query.kind == "probs":
        temperature_G1 = np.full((len(crops_GHWC), 1), temperature, np.float32)
        _, probs_GK = await teacher.soft_labels(crops_GHWC, temperature_G1)
        return probs_GK
    logits_GK = await teacher.logits(crops_GHWC)
    # From the logits: the logarithm of a probability that fp32 rounded to 0 would be minus infinity.
    return logits_GK if query.kind == "logits" else log_softmax(logits_GK / np.float32(temperature))


def log_softmax(scores_BK: Floats) -> Floats:
    """fp32 [B,K], computed in float64."""
    shifted_BK = scores_BK.astype(np.float64) - scores_BK.max(axis=1, keepdims=True)
    return (shifted_BK - np.log(np.exp(shifted_BK).sum(axis=1, keepdims=True))).astype(np.float32)


def check_query(query: SoftLabelsQuery, info: TeacherInfo, *, binary: bool) -> None:
    """Raises RequestRefused for what only this teacher or this form of answer makes impossible."""
    if query.top_k is not None and query.top_k > info.num_classes:
        raise RequestRefused(f"top_k {query.top_k} is over the {info.num_classes} classes of {info.name}")
    if query.names and binary:
        raise RequestRefused(f"names come in JSON answers only; GET /v1/models/{info.name} lists them once")


def make_message(info: TeacherInfo, query: SoftLabelsQuery, temperature: float, intake: Intake, values_GK: Floats) -> SoftLabelsMessage:
    """The answer for all B images: rows of failed ones are NaN."""
    header = SoftLabelsHeader(
        model=info.name,
        version=info.version,
        fingerprint=info.fingerprint,
        temperature=temperature,
        kind=query.kind,
        num_images=intake.num_images,
        num_classes=info.num_classes,
        top_k=query.top_k,
        errors=intake.errors,
    )
    ids_GR = None
    if query.top_k is not None:
        ids_GR = largest(values_GK, query.top_k)
        values_GK = np.take_along_axis(values_GK, ids_GR, axis=1)
    values_BR = np.full((intake.num_images, values_GK.shape[1]), np.nan, np.float32)
    values_BR[intake.positions_G] = values_GK
    if ids_GR is None:
        return SoftLabelsMessage(header, values_BR)
    class_ids_BR = np.zeros(values_BR.shape, np.uint32)
    class_ids_BR[intake.positions_G] = ids_GR
    return SoftLabelsMessage(header, values_BR, class_ids_BR)


def largest(values_BK: Floats, count: int) -> NDArray[np.intp]:
    """Class ids [B,count] of the largest values, largest first; of equal values the smaller id comes first."""
    return np.argsort(-values_BK, axis=1, kind="stable")[:, :count]


def binary_body(message: SoftLabelsMessage) -> bytes:
    """See distill/wire.py."""
    return encode_soft_labels(message)


def json_body(message: SoftLabelsMessage, class_names: tuple[str, ...] | None) -> bytes:
    """A SoftLabelsAnswer as JSON, with names if they are given."""
    header = message.header
    failures = {error.index: Failure(code=error.code, message=error.message) for error in header.errors}
    items = []
    for position, row in enumerate(message.values_BR):
        if position in failures:
            items.append(LabelItem(error=failures[position]))
            continue
        ids = None if message.class_ids_BR is None else message.class_ids_BR[position].tolist()
        names = [class_names[k] for k in (range(header.num_classes) if ids is None else ids)] if class_names else None
        items.append(LabelItem(class_ids=ids, values=[float(f"{value:.7g}") for value in row.tolist()], class_names=names))
    answer = SoftLabelsAnswer(
        model=header.model,
        version=header.version,
        fingerprint=header.fingerprint,
        temperature=header.temperature,
        kind=header.kind,
        items=items,
    )
    return json.dumps(answer.model_dump(mode="json", exclude_none=True), allow_nan=False, separators=(",", ":")).encode()
