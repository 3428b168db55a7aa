"""What is said of a classifier's answers: accuracy, calibration, and how near they are to the teacher's.

All in numpy on whole sets. Shapes: N images, K classes, M bins, P pairs of classes. `labels_N` are class ids; every image has one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distill.config import Section

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class ReliabilityBin(Section):
    """The images whose largest probability falls in one bin."""

    confidence: float
    """Their mean largest probability."""
    accuracy: float
    """Share of them that are right."""
    num_images: int
    """How many there are."""


class ClassifierScores(Section):
    """Accuracy and calibration on a labelled set."""

    num_images: int
    """N."""
    top1: float
    """Share of images whose largest logit is at their class."""
    top5: float
    """Share of images whose class is among the five largest logits (all K, if fewer)."""
    nll: float
    """Mean negative log-likelihood in nats."""
    ece: float
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017)."""
    reliability: tuple[ReliabilityBin, ...]
    """The bins that hold images."""


class Confusions(Section):
    """How often each class was taken for which: the cells of the confusion matrix that are not empty, at most N of the K x K."""

    num_classes: int
    """K."""
    cells: tuple[tuple[int, int, int], ...]
    """(true class, class with the largest logit, number of images), in order."""

    def matrix(self) -> IntArray:
        """int64 [K,K]: row = true class, column = answer."""
        matrix_KK = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        for true, answer, count in self.cells:
            matrix_KK[true, answer] = count
        return matrix_KK


class TeacherAgreement(Section):
    """How near a student is to its teacher, on the same crops at T = 1."""

    top1_agreement: float
    """Share of images on which both have the same largest logit."""
    kl: float
    """Mean KL(teacher || student) in nats."""


def log_softmax(logits_NK: FloatArray) -> npt.NDArray[np.float64]:
    """float64 [N,K]."""
    shifted = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def score(logits_NK: FloatArray, labels_N: IntArray) -> ClassifierScores:
    """Accuracy and calibration of `logits_NK` against `labels_N`."""
    log_probs_NK = log_softmax(logits_NK)
    probs_NK = np.exp(log_probs_NK)
    right_N = logits_NK.argmax(axis=1) == labels_N
    order_NK = np.argsort(-logits_NK, axis=1, kind="stable")[:, :5]
    bins = _reliability(probs_NK.max(axis=1), right_N)
    return ClassifierScores(
        num_images=len(labels_N),
        top1=float(right_N.mean()),
        top5=float((order_NK == labels_N[:, None]).any(axis=1).mean()),
        nll=float(-log_probs_NK[np.arange(len(labels_N)), labels_N].mean()),
        ece=sum(abs(b.confidence - b.accuracy) * b.num_images for b in bins) / len(labels_N),
        reliability=bins,
    )


def confusions(logits_NK: FloatArray, labels_N: IntArray) -> Confusions:
    """Which classes were taken for which."""
    pairs_P2, count_P = np.unique(np.stack([labels_N, logits_NK.argmax(axis=1)], axis=1), axis=0, return_counts=True)
    cells = tuple((int(true), int(answer), int(count)) for (true, answer), count in zip(pairs_P2, count_P, strict=True))
    return Confusions(num_classes=logits_NK.shape[1], cells=cells)


def _reliability(confidence_N: npt.NDArray[np.float64], right_N: npt.NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    bin_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
    return tuple(
        ReliabilityBin(
            confidence=float(confidence_N[bin_N == m].mean()),
            accuracy=float(right_N[bin_N == m].mean()),
            num_images=int((bin_N == m).sum()),
        )
        for m in range(NUM_BINS)
        if (bin_N == m).any()
    )


def agreement(teacher_NK: FloatArray, student_NK: FloatArray) -> TeacherAgreement:
    """How near the student's logits are to the teacher's."""
    teacher_log, student_log = log_softmax(teacher_NK), log_softmax(student_NK)
    kl_N = (np.exp(teacher_log) * (teacher_log - student_log)).sum(axis=1)
    same_N = teacher_NK.argmax(axis=1) == student_NK.argmax(axis=1)
    return TeacherAgreement(top1_agreement=float(same_N.mean()), kl=float(kl_N.mean()))
