"""The simulation against the closed form in the limits where that is exact, and never above it anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.pipeline_simulation import Pipeline, bounds, simulate

AMPLE = Pipeline(
    batch=32, decode_threads=8, decode_rate=1e5, teachers=8, teacher_rate=1e5, student_rate=1e5, in_flight=16, batches_ahead=16
)


@pytest.mark.parametrize(
    ("changes", "station", "expected"),
    [
        ({"student_rate": 500.0}, "student", 500),
        ({"student_rate": 500.0, "workers": 3}, "student", 1500),
        ({"decode_rate": 100.0, "decode_threads": 3}, "decode", 300),
        ({"teacher_rate": 200.0, "teachers": 2}, "teacher", 400),
        ({"teacher_rate": 200.0, "teachers": 2, "workers": 4}, "teacher", 400),
        ({"teacher_rate": 200.0, "teachers": 2, "failure_share": 0.25}, "teacher", 300),
        ({"latency_s": 1.0, "in_flight": 2, "part": 32, "teacher_rate": 1e9}, "in flight", 64),
        ({"keep_rate": 250.0}, "store", 250),
    ],
)
@pytest.mark.parametrize("variation", [0.0, 0.1])
def test_the_slowest_station_alone_decides(changes: dict[str, float], station: str, expected: float, variation: float) -> None:
    pipeline = AMPLE.replace(**changes, variation=variation, student_variation=variation)
    found = bounds(pipeline)
    assert min(found, key=lambda name: found[name]) == station
    assert found[station] == pytest.approx(expected, rel=1e-3)
    # Workers in step wait for the slowest of them: with variation they lose a little. How many messages fail is chance, too.
    assert simulate(pipeline).images_per_s == pytest.approx(expected, rel=0.02 if variation == 0 and not pipeline.failure_share else 0.1)


def test_each_wait_is_named_by_its_cause() -> None:
    for changes, cause in (
        ({"student_rate": 500.0}, "student"),
        ({"decode_rate": 50.0}, "decode"),
        ({"teacher_rate": 50.0}, "teacher"),
        ({"keep_rate": 250.0, "asks": False}, "store"),
        ({"keep_rate": 250.0}, "store"),
    ):
        waits = simulate(AMPLE.replace(**changes)).waits
        assert sum(waits.values()) == pytest.approx(1)
        assert max(waits, key=lambda name: waits[name]) == cause
        assert waits[cause] > 0.9


def test_labels_from_the_store_ask_nobody() -> None:
    found = simulate(AMPLE.replace(asks=False, teacher_rate=1.0, student_rate=500.0))
    assert found.images_per_s == pytest.approx(500, rel=0.05)
    assert found.teacher_busy == 0
    assert found.waits["teacher"] == 0


def test_busy_shares_are_the_bottleneck_law() -> None:
    """Every station works at (throughput / its most)."""
    pipeline = AMPLE.replace(student_rate=400.0, teacher_rate=100.0, decode_rate=100.0, variation=0.0)
    found = simulate(pipeline, num_batches=1000)
    assert found.teacher_busy == pytest.approx(400 / (8 * 100), rel=0.05)
    assert found.decode_busy == pytest.approx(400 / (8 * 100), rel=0.05)


def test_workers_in_step_wait_for_the_slowest() -> None:
    """The mean of the largest of 3 normal variables is 0.846 standard deviations above theirs."""
    found = simulate(AMPLE.replace(student_rate=500.0, workers=3, student_variation=0.1), num_batches=2000)
    assert found.images_per_s == pytest.approx(1500 / (1 + 0.846 * 0.1), rel=0.02)


def test_balanced_stations_with_variation_lose_what_buffers_do_not_hold() -> None:
    """No closed form is exact here: that is what the simulation is for."""
    balanced = Pipeline(
        batch=32,
        decode_threads=1,
        decode_rate=400,
        teachers=1,
        teacher_rate=400,
        student_rate=400,
        part=32,
        variation=0.5,
        student_variation=0.5,
    )
    small, large = (simulate(balanced.replace(in_flight=n, batches_ahead=n)).images_per_s for n in (1, 16))
    assert small < 0.9 * 400
    assert small < large <= 400


@settings(max_examples=25)
@given(
    workers=st.integers(1, 3),
    decode_threads=st.integers(1, 4),
    teachers=st.integers(1, 4),
    in_flight=st.integers(1, 6),
    rates=st.tuples(*[st.floats(50, 5000)] * 4),
    latency_s=st.floats(0, 0.5),
    part=st.sampled_from([4, 8, 32]),
    failure_share=st.sampled_from([0.0, 0.2]),
)
def test_nothing_is_ever_faster_than_its_slowest_station(
    workers: int,
    decode_threads: int,
    teachers: int,
    in_flight: int,
    rates: tuple[float, ...],
    latency_s: float,
    part: int,
    failure_share: float,
) -> None:
    decode, teacher, student, keep = rates
    pipeline = Pipeline(
        batch=32, workers=workers, decode_threads=decode_threads, decode_rate=decode, teachers=teachers, teacher_rate=teacher,
        student_rate=student, keep_rate=keep, in_flight=in_flight, latency_s=latency_s, part=part, failure_share=failure_share, variation=0,
        student_variation=0,
    )  # fmt: skip
    limits = bounds(pipeline)
    if failure_share:  # how many messages fail in 100 batches is chance
        limits["teacher"] *= 1.1
    # Batches that were made while the count had not begun are in it: at most the buffers of a worker.
    assert simulate(pipeline, num_batches=100).images_per_s <= 1.15 * min(limits.values())
