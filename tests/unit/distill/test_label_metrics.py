"""Accuracy, calibration and agreement against small numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from distill.label_metrics import agreement, confusions, log_softmax, score


def logits_of(probs_NK: list[list[float]]) -> npt.NDArray[np.float32]:
    """Logits whose softmax is `probs_NK`, each row off by a constant that must not matter."""
    logits_NK = np.log(np.array(probs_NK, dtype=np.float64))
    return (logits_NK + np.arange(len(logits_NK))[:, None]).astype(np.float32)


def labels_of(*labels: int) -> npt.NDArray[np.int64]:
    return np.array(labels, dtype=np.int64)


class TestScore:
    def test_four_images_by_hand(self) -> None:
        probs = [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1, 0.85, 0.05], [0.3, 0.28, 0.42]]
        found = score(logits_of(probs), labels_of(0, 1, 1, 0))
        assert found.num_images == 4
        assert found.top1 == 0.5  # images 0 and 2
        assert found.top5 == 1.0  # three classes only
        assert found.nll == pytest.approx(-(math.log(0.7) + math.log(0.2) + math.log(0.85) + math.log(0.3)) / 4, abs=1e-6)
        # Bins of 1/15: 0.42 is in bin 6 (0.4 to 0.467), wrong; 0.7 in bin 10 (0.667 to 0.733), twice, one right; 0.85 in bin 12, right.
        assert [(b.num_images, b.accuracy, round(b.confidence, 5)) for b in found.reliability] == [
            (1, 0, 0.42),
            (2, 0.5, 0.7),
            (1, 1, 0.85),
        ]
        assert found.ece == pytest.approx((1 * 0.42 + 2 * 0.2 + 1 * 0.15) / 4, abs=1e-6)

    def test_certain_and_right(self) -> None:
        logits = np.where(np.eye(3, dtype=bool), 1000.0, -1000.0).astype(np.float32)
        found = score(logits, labels_of(0, 1, 2))
        assert (found.top1, found.top5, found.nll, found.ece) == (1, 1, 0, 0)
        assert [(b.confidence, b.num_images) for b in found.reliability] == [(1.0, 3)]  # a confidence of 1 is in the last bin

    def test_certain_and_wrong(self) -> None:
        found = score(np.array([[0, 50]], dtype=np.float32), labels_of(0))
        assert (found.top1, found.ece) == (0, 1)
        assert found.nll == pytest.approx(50)

    def test_top5_of_seven(self) -> None:
        descending = np.arange(7, 0, -1, dtype=np.float32)
        found = score(np.tile(descending, (7, 1)), labels_of(*range(7)))
        assert found.top1 == pytest.approx(1 / 7)
        assert found.top5 == pytest.approx(5 / 7)

    def test_in_top1_means_in_top5_on_ties(self) -> None:
        """Where all logits are alike, argmax and the five largest must not contradict each other."""
        found = score(np.zeros((8, 8), dtype=np.float32), labels_of(*range(8)))
        assert found.top1 == 1 / 8
        assert found.top5 == 5 / 8

    def test_a_calibrated_classifier_has_no_calibration_error(self) -> None:
        """75 % sure and right in 3 of 4."""
        found = score(logits_of([[0.75, 0.25]] * 8), labels_of(*[0] * 6, 1, 1))
        assert found.ece == pytest.approx(0, abs=1e-6)

    def test_bins_hold_every_image(self) -> None:
        random = np.random.default_rng(0)
        found = score(random.normal(0, 3, (500, 10)).astype(np.float32), random.integers(0, 10, 500))
        assert sum(b.num_images for b in found.reliability) == 500
        assert sum(b.num_images * b.accuracy for b in found.reliability) == pytest.approx(500 * found.top1)
        for one in found.reliability:
            assert math.floor(one.confidence * 15 + 1e-9) < 15


class TestAgreement:
    def test_by_hand(self) -> None:
        teacher, student = [[0.5, 0.5], [0.75, 0.25]], [[0.25, 0.75], [0.75, 0.25]]
        # KL of the first: 0.5 ln 2 + 0.5 ln(2/3) = 0.5 ln(4/3); of the second: 0. The teacher's tie counts for its first class.
        found = agreement(logits_of(teacher), logits_of(student))
        assert found.kl == pytest.approx(0.5 * math.log(4 / 3) / 2, abs=1e-6)
        assert found.top1_agreement == 0.5

    def test_kl_is_of_the_teacher_from_the_student(self) -> None:
        sharp, flat = logits_of([[0.9, 0.1]]), logits_of([[0.5, 0.5]])
        assert agreement(sharp, flat).kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
        assert agreement(flat, sharp).kl == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), abs=1e-6)

    def test_the_same_up_to_a_constant(self) -> None:
        logits = np.random.default_rng(1).normal(0, 5, (20, 7)).astype(np.float32)
        found = agreement(logits, logits + np.float32(64))
        assert found.top1_agreement == 1
        assert found.kl == pytest.approx(0, abs=1e-9)

    def test_far_logits_stay_finite(self) -> None:
        """The teacher gives a class all its mass, the student e^-2000 of it: 2000 nats, not infinity."""
        assert agreement(np.array([[2000, 0]], np.float32), np.array([[0, 2000]], np.float32)).kl == pytest.approx(2000)


class TestConfusions:
    def test_by_hand(self) -> None:
        found = confusions(np.array([[9, 0, 0], [0, 9, 0], [9, 0, 0], [0, 9, 0]], dtype=np.float32), labels_of(0, 0, 2, 0))
        assert found.cells == ((0, 0, 1), (0, 1, 2), (2, 0, 1))
        assert found.matrix().tolist() == [[1, 2, 0], [0, 0, 0], [1, 0, 0]]

    def test_it_agrees_with_the_score(self) -> None:
        random = np.random.default_rng(0)
        logits, labels = random.normal(0, 1, (300, 7)).astype(np.float32), random.integers(0, 7, 300)
        matrix = confusions(logits, labels).matrix()
        assert np.trace(matrix) / 300 == score(logits, labels).top1
        assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=7).tolist()


def test_log_softmax_is_in_float64() -> None:
    found = log_softmax(np.array([[0, math.log(3)], [-1000, 1000]], dtype=np.float32))
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.exp(found[0]), [0.25, 0.75], atol=1e-7)
    assert found[1].tolist() == [-2000, 0]
