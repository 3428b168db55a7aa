"""Students beside each other: whom nobody beats, what each cost, and which mistakes changed; against small cases worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.label_metrics import Confusions, confusions
from student_trainer.changed_confusions import changed_pairs, mistakes, most_changed_classes
from student_trainer.comparison import candidates, costs_of, pareto_front


class TestParetoFront:
    def test_by_hand(self) -> None:
        points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.8), (4.0, 0.9), (1.0, 0.5)]
        assert pareto_front(points) == [1, 3, 0]  # 2 is beaten by 3, 4 by 0; of the equals 1 and 5 the first
        assert pareto_front([]) == []

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
    def test_it_holds_exactly_those_that_no_other_beats(self, points: list[tuple[int, int]]) -> None:
        def beaten(one: tuple[int, int]) -> bool:
            return any(o != one and o[0] <= one[0] and o[1] >= one[1] for o in points)

        front = [points[n] for n in pareto_front(points)]
        assert front == sorted({one for one in points if not beaten(one)})


TOTALS = {
    "asked": 900.0, "images": 1000.0, "images of a": 1000.0, "seconds of a": 8.0, "images of b": 500.0, "seconds of b": 1.0,
}  # fmt: skip


def test_a_label_is_shared_by_those_who_learn_from_it() -> None:
    costs = costs_of({"totals": TOTALS, "store": {"size_bytes": 3000}})
    assert costs["a"].stream_share == pytest.approx(2 / 3)
    assert (costs["a"].teacher_calls, costs["b"].teacher_calls) == (pytest.approx(600), pytest.approx(300))
    assert (costs["a"].label_bytes, costs["b"].label_bytes) == (pytest.approx(2000), pytest.approx(1000))
    assert (costs["b"].images, costs["b"].step_seconds) == (500, 1)
    on_four = costs_of({"totals": TOTALS, "store": {"size_bytes": 3000}, "num_workers": 4})
    assert (on_four["b"].images, on_four["b"].step_seconds) == (500, 4)


def test_students_are_in_order_and_one_that_diverged_is_still_named() -> None:
    def judged(top1: float) -> dict[str, Any]:
        return {"scores": {"top1": top1}, "to_teacher": {"top1_agreement": top1}, "num_parameters": 10}

    stop = {"why": "diverged", "step": 7, "detail": "the loss is not finite"}
    stages = {
        "evaluate": {"students": {"a": judged(0.5), "b": judged(0.75)}},
        "train": {"totals": TOTALS, "store": {"size_bytes": 3000}, "stopped": {"c": stop}},
        "export-student": None,
    }
    found = candidates({"stages": stages})
    assert [(one.name, one.top1, one.stopped) for one in found] == [
        ("b", 0.75, ""),
        ("a", 0.5, ""),
        ("c", None, "diverged at step 7: the loss is not finite"),
    ]


def entry_of(answers: list[list[int]]) -> dict[str, Any]:
    """The evaluation of somebody who gives these answers to the images of each class."""
    labels_N = np.array([true for true, said in enumerate(answers) for _ in said])
    logits_NK = np.eye(len(answers), dtype=np.float32)[[answer for said in answers for answer in said]]
    return {"confusions": confusions(logits_NK, labels_N).model_dump(mode="json")}


NAMES = ["cat", "dog", "fox"]
TEACHER = entry_of([[0, 0, 0, 0], [1, 1], [2, 2, 2, 0]])
CONTROL = entry_of([[0, 1, 1, 1], [1, 0], [2, 2, 2, 2]])
STUDENT = entry_of([[0, 0, 0, 1], [1, 1], [2, 2, 1, 2]])


def test_the_matrix_comes_back_from_its_cells() -> None:
    kept = Confusions.model_validate(CONTROL["confusions"])
    assert kept.matrix().tolist() == [[1, 3, 0], [1, 1, 0], [0, 0, 4]]
    assert kept.cells == ((0, 0, 1), (0, 1, 3), (1, 0, 1), (1, 1, 1), (2, 2, 4))


def test_rates_are_of_the_true_class_and_right_answers_are_no_mistakes() -> None:
    assert mistakes(CONTROL).tolist() == [[0, 0.75, 0], [0.5, 0, 0], [0, 0, 0]]


def test_what_changed_against_the_control() -> None:
    pairs = changed_pairs(STUDENT, CONTROL, TEACHER, NAMES)
    found = [(p.true, p.answer, p.student, p.control, p.teacher, p.num_images) for p in pairs]
    assert found == [("cat", "dog", 1, 3, 0, 4), ("dog", "cat", 0, 1, 0, 2), ("fox", "dog", 1, 0, 0, 4)]


def test_without_a_control_the_teacher_is_the_measure() -> None:
    pairs = changed_pairs(STUDENT, None, TEACHER, NAMES)
    assert {(p.true, p.answer) for p in pairs} == {("cat", "dog"), ("fox", "cat"), ("fox", "dog")}
    assert all(p.control is None for p in pairs)
    assert changed_pairs(STUDENT, STUDENT, TEACHER, NAMES) == []


def test_a_heat_map_keeps_the_classes_that_changed_most() -> None:
    change_KK = np.zeros((50, 50))
    change_KK[40, 7] = -0.5
    change_KK[3, 40] = 0.1
    shown = most_changed_classes(change_KK)
    assert len(shown) == 20
    assert {3, 7, 40} <= set(shown)
    assert shown == sorted(shown)
