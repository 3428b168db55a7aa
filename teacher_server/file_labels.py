"""Labels of image files: what a client gets for each, and how many files go into one request.

Flow: encoded images -> parts below the gateway's limits -> answers -> one result per file, in order.
Unit of data: one image file. Shapes: K classes, R retained classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.wire import SOFT_LABELS, SoftLabelsMessage
from teacher_server.backend import Floats, check_answer, check_probs


@dataclass(frozen=True)
class FileLabels:
    """The soft labels of one image: fp32 `probs_R`; with top_k the classes `class_ids_R` that they belong to, largest first."""

    probs_R: Floats
    class_ids_R: NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class FileRefused:
    """An image without labels: a short stable `code` for programs, and the same for a person."""

    code: str
    message: str


FileResult = FileLabels | FileRefused


async def read_files(files: Sequence[bytes | Path]) -> list[bytes | FileRefused]:
    """The bytes of each file. One that cannot be read is refused like one that cannot be decoded: the others still get their labels."""
    return await asyncio.to_thread(lambda: [file if isinstance(file, bytes) else _read(Path(file)) for file in files])


def _read(path: Path) -> bytes | FileRefused:
    try:
        return path.read_bytes()
    except OSError as error:
        return FileRefused("unreadable_file", f"{path}: {error.strerror}")


def parts_of(sizes_bytes: Sequence[int], max_bytes: int, max_count: int) -> list[range]:
    """Positions of the files of each request, in order: at most so many files and bytes together, but always at least one file."""
    parts, start, total = [], 0, 0
    for position, size in enumerate(sizes_bytes):
        if position > start and (total + size > max_bytes or position - start == max_count):
            parts.append(range(start, position))
            start, total = position, 0
        total += size
    if len(sizes_bytes) > start:
        parts.append(range(start, len(sizes_bytes)))
    return parts


def results_of(message: SoftLabelsMessage) -> list[FileResult]:
    """One result per file of an answer with probabilities. Raises TeacherAnswerError for labels that are none."""
    refused = {error.index: FileRefused(error.code, error.message) for error in message.header.errors}
    good = [position for position in range(message.header.num_images) if position not in refused]
    probs_GR = message.values_BR[good]  # a copy, which belongs to the caller
    check_answer(probs_GR, SOFT_LABELS, len(good), probs_GR.shape[1])
    if message.class_ids_BR is None:
        check_probs(probs_GR)
    results: dict[int, FileResult] = {**refused}
    for position, probs_R in zip(good, probs_GR, strict=True):
        results[position] = FileLabels(probs_R, None if message.class_ids_BR is None else message.class_ids_BR[position].copy())
    return [results[position] for position in range(message.header.num_images)]
