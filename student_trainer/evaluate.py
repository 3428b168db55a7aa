"""What the teacher, the students and the controls are worth on the test images, and how near the students are to the teacher.

Shapes: N images, K classes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from distill.data_settings import DataSettings
from distill.evaluation import evaluate_on, evaluation_batches, network_logits, require_labels
from distill.image_sets import open_labelled
from distill.label_metrics import FloatArray, IntArray, agreement, confusions, score
from distill.models.saved_classifier import load_classifier
from distill.rejections import RejectionLog
from teacher_server.address import TeacherAddress, open_teacher


def evaluate_all(
    teacher: TeacherAddress, students: dict[str, Path], controls: dict[str, Path], data: DataSettings, rejections: RejectionLog
) -> dict[str, Any]:
    """Scores of everyone on the same crops.

    Args:
        students, controls: name -> folder of a saved classifier.

    Returns:
        Plain data: the `teacher`'s `scores` (with reliability bins) and `confusions`; for each student and control the same, agreement and
        KL `to_teacher`, and `num_parameters`.

    Raises:
        SourceError: test images without labels.
    """
    test = open_labelled(data.test, data)
    teacher_NK, labels_N = _ask(teacher, data, rejections)

    def judge(folder: Path) -> dict[str, Any]:
        network = load_classifier(folder).network
        logits_NK, _ = evaluate_on(network_logits(network), test, data, rejections)
        return {
            **_judge(logits_NK, labels_N),
            "to_teacher": agreement(teacher_NK, logits_NK).model_dump(),
            "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        }

    return {
        "teacher": _judge(teacher_NK, labels_N),
        "students": {name: judge(folder) for name, folder in students.items()},
        "controls": {name: judge(folder) for name, folder in controls.items()},
    }


def evaluate_teacher(teacher: TeacherAddress, data: DataSettings, rejections: RejectionLog) -> dict[str, Any]:
    """`scores` and `confusions` of a served teacher alone: plain data.

    Raises:
        SourceError: test images without labels.
    """
    return _judge(*_ask(teacher, data, rejections))


def _judge(logits_NK: FloatArray, labels_N: IntArray) -> dict[str, Any]:
    return {"scores": score(logits_NK, labels_N).model_dump(), "confusions": confusions(logits_NK, labels_N).model_dump(mode="json")}


def _ask(teacher: TeacherAddress, data: DataSettings, rejections: RejectionLog) -> tuple[FloatArray, IntArray]:
    logits_NK, labels_N = asyncio.run(_ask_teacher(teacher, data, rejections))
    return logits_NK, require_labels(labels_N, data)


async def _ask_teacher(address: TeacherAddress, data: DataSettings, rejections: RejectionLog) -> tuple[FloatArray, IntArray]:
    """(logits float32 [N,K], labels int64 [N]) from the served teacher, one and the same for all: what is judged is what labels.

    Raises:
        TeacherChanged: another version took its place meanwhile.
    """
    backend = open_teacher(address)
    logits, labels = [], []
    try:
        fingerprint = (await backend.info()).fingerprint
        for batch in evaluation_batches(open_labelled(data.test, data), data, rejections):
            logits.append(await backend.logits(batch.crops_VBHWC[0], fingerprint=fingerprint))
            labels.append(batch.labels_B)
    finally:
        await backend.close()
    return np.concatenate(logits), np.concatenate(labels)
