"""What is said of who waits for whom."""

from __future__ import annotations

import pytest

from student_trainer.waits import ADVICE, Waits


def test_seconds_add_up_under_their_name_and_the_original_stays() -> None:
    start = Waits()
    assert start.plus("teacher", 1.5).plus("teacher", 0.5).plus("decode", 1) == Waits(decode=1, teacher=2)
    assert start == Waits()


def test_nothing_measured_yet() -> None:
    assert Waits().describe() == "starting"


def test_small_waits_are_not_complained_of() -> None:
    assert Waits(student=96, decode=4).describe() == "student busy 96%"


@pytest.mark.parametrize("name", sorted(ADVICE))
def test_the_longest_wait_is_named_with_what_to_scale(name: str) -> None:
    waits = Waits(student=50, decode=1, store=1, teacher=1).plus(name, 47)
    assert waits.describe() == f"student busy 50%, waits for {name} 48% ({ADVICE[name]})"


def test_every_wait_but_training_has_advice() -> None:
    assert set(ADVICE) == set(Waits.model_fields) - {"student"}


def test_the_last_half_minute_is_a_difference() -> None:
    earlier, now = Waits(student=10, teacher=90), Waits(student=40, teacher=90, decode=2)
    assert now.since(earlier) == Waits(student=30, decode=2)
    assert earlier.bottleneck() == {"for": "teacher", "share": 0.9, "scale": ADVICE["teacher"]}
    assert now.since(earlier).bottleneck() is None


def test_nothing_waited_for_is_no_bottleneck() -> None:
    assert Waits().bottleneck() is None
