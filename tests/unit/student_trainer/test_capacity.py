"""The arithmetic of `distill plan` against closed forms written out here, and at sizes that nobody has run."""

from __future__ import annotations

import pytest

from student_trainer.capacity import MOST_IDLE, StageRates, Work, needs, predict, undisturbed, ways, workers_for
from student_trainer.capacity_scale import growth, memory, traffic

RATES = StageRates(
    teacher=400,
    decode=250,
    students={"large": 1000, "small": 4000},
    label_bytes=90,
    crop_bytes=150_528,
    answer_bytes=4000,
    encoded_bytes=110_000,
)
WORK = Work(images=100_000, epochs=300, views=50, global_batch=500, num_classes=1000)
BILLION = Work(images=10**9, epochs=100, views=50, global_batch=8192, num_classes=1000, images_per_shard=1000)


def test_students_on_one_stream_add_up_their_times() -> None:
    assert RATES.all_students == pytest.approx(1 / (1 / 1000 + 1 / 4000))


def test_needs_are_the_closed_form_with_a_little_room_for_variation() -> None:
    found = needs(RATES, WORK, workers=4)
    demand = 4 * 800
    assert demand / 400 <= found.teachers <= 1.5 * demand / 400
    assert 800 / 250 <= found.decode_threads <= 7
    assert found.waits["student"] >= 1 - MOST_IDLE
    assert 0.8 * demand <= found.images_per_s <= demand, "workers in step wait for the slowest of them"


def test_who_is_slow_is_bought_more_of() -> None:
    slow_teacher = needs(RATES.replace(teacher=50), WORK, workers=1)
    assert slow_teacher.teachers >= 16
    assert slow_teacher.decode_threads == needs(RATES, WORK, workers=1).decode_threads
    slow_decode = needs(RATES.replace(decode=20), WORK, workers=1)
    assert slow_decode.decode_threads >= 40
    assert slow_decode.teachers == needs(RATES, WORK, workers=1).teachers


@pytest.mark.parametrize(("changes", "station"), [({"keep": 100}, "store"), ({"teacher_latency_s": 10}, "in flight")])
def test_where_teachers_are_not_what_is_waited_for_no_more_are_bought(changes: dict[str, float], station: str) -> None:
    found = needs(RATES.replace(**changes), WORK, workers=1)
    assert not found.converged
    assert found.limited_by == station
    assert found.teachers <= 4, "800 / 400 and a little"
    assert found.decode_threads <= 8
    assert needs(RATES, WORK, workers=1).converged


def test_the_labels_of_shards_in_use_are_those_of_the_job() -> None:
    held = {row.what: row.value for row in memory(RATES, WORK.replace(views_held=40, mixing_cache_bytes=3e8), workers=1)}
    assert held["labels of shards in use"] == 40 * 1000 * 1000 * 4
    assert held["plain crops that wait for mixing"] == 3e8


def test_hours_become_workers() -> None:
    assert WORK.trained == 300 * 100_000
    assert workers_for(RATES, WORK, hours=1) == 11  # 30e6 / (800 * 0.95) s = 10.96 h
    assert workers_for(RATES, WORK, hours=100) == 1


def test_the_ways_are_their_formulas() -> None:
    found = needs(RATES, WORK, workers=4).model_copy(update={"teachers": 8, "decode_threads": 8})
    by_name = {way.name: way for way in ways(RATES, WORK, found, price_per_hour=2.0)}
    live, ahead = by_name["labels asked while training"], by_name["labels made ahead"]
    images, asked = 30e6, 50 * 100_000
    assert WORK.asked == asked
    assert live.seconds == pytest.approx(images / 3200), "8 teachers do what 4 workers want"
    assert live.device_hours == pytest.approx((asked / 3200 * 12 + (images - asked) / 3200 * 4) / 3600)
    assert live.cost == pytest.approx(2 * live.device_hours)
    assert [(phase.name, phase.devices) for phase in ahead.phases] == [("label", 8), ("train", 4)]
    assert ahead.seconds == pytest.approx(asked / 3200 + images / 3200)
    inline = by_name["inline, all students in one loop"]
    assert inline.images_per_s == pytest.approx(12 / (1 / 400 + 1 / 800))
    one_by_one = by_name["inline, one student after the other"]
    assert one_by_one.seconds == pytest.approx(images * (2 / 400 + 1 / 1000 + 1 / 4000) / 12)


def test_labels_that_are_slow_to_keep_hold_up_those_who_ask_only() -> None:
    rates = RATES.replace(keep=100, read=1e6)
    found = needs(rates, WORK, workers=4).model_copy(update={"teachers": 8, "decode_threads": 8})
    live = ways(rates, WORK, found)[0]
    assert [(phase.limited_by, phase.seconds) for phase in live.phases] == [
        ("store", pytest.approx(5e6 / 400)),
        ("student", pytest.approx(25e6 / 3200)),
    ]


def test_with_few_teachers_the_first_epochs_are_theirs() -> None:
    found = needs(RATES, WORK, workers=4).model_copy(update={"teachers": 1, "decode_threads": 8})
    live = ways(RATES, WORK, found)[0]
    assert [phase.limited_by for phase in live.phases] == ["teacher", "student"]
    assert live.phases[0].seconds == pytest.approx(5e6 / 400)
    assert live.cost is None


def test_one_machine_shares_its_cores() -> None:
    rates = RATES.replace(
        teacher_core_s=0.004, decode_core_s=0.002, student_core_s=0.003, keep_core_s=0.001, read_core_s=0.0005, evaluation=50
    )
    work = Work(images=1000, epochs=4, views=2, global_batch=100, num_classes=10, test_images=500, evaluations=2)
    found = predict(rates, work, workers=1, cores=2)
    assert found.limited_by == "cores"
    assert found.asking_rate == pytest.approx(2 / 0.010, rel=0.1)
    assert found.reading_rate == pytest.approx(2 / 0.0055, rel=0.1)
    assert (found.asked, found.from_store, found.images) == (2000, 2000, 4000)
    assert found.evaluation_s == pytest.approx(20)
    assert found.seconds == pytest.approx(2000 / found.asking_rate + 2000 / found.reading_rate + 20)
    assert sum(found.waits.values()) == pytest.approx(1)
    alone = predict(rates, work, workers=1, cores=1000)
    assert alone.limited_by == "teacher"
    assert alone.asking_rate == pytest.approx(400, rel=0.1)
    assert predict(rates, work, workers=1, cores=2, stored=1500).asked == 500


def test_core_seconds_tell_what_a_machine_would_do_undisturbed() -> None:
    """Measured while other jobs took two thirds of every core."""
    rates = RATES.replace(
        teacher=100, decode=100, students={"one": 50.0}, teacher_core_s=0.004, decode_core_s=0.002, student_core_s=0.005, evaluation=10
    )
    free = undisturbed(rates, cores=4, student_threads=2)
    assert (free.teacher, free.decode) == (pytest.approx(4 / 0.004), pytest.approx(1 / 0.002))
    assert free.all_students == pytest.approx(2 / 0.005)
    assert free.evaluation == pytest.approx(10 * 5), "decoding became 5 times as fast, training 8 times"
    remote = undisturbed(rates.replace(teacher_core_s=None), cores=4, student_threads=8)
    assert remote.teacher == 100
    assert remote.all_students == pytest.approx(4 / 0.005), "no more threads than cores"


def test_a_last_batch_that_is_not_full_is_left_out() -> None:
    work = WORK.replace(images=1099, epochs=3, views=2, global_batch=100)
    assert (work.trained, work.asked) == (3000, 2000)


def test_at_a_billion_images_small_shards_bite_and_large_ones_do_not() -> None:
    bites = {quantity.what: quantity.bites for quantity in growth(RATES, BILLION)}
    assert bites["segments (files) of the store"]
    assert bites["manifest in memory, each process"]
    assert bites["opening the store, each process"]
    assert not bites["order of the shards in memory, each worker"], "the plan holds shards, not images"
    large = BILLION.replace(images_per_shard=100_000)
    assert not any(quantity.bites for quantity in growth(RATES, large))
    too_large = memory(RATES, large, workers=8)
    assert [quantity.what for quantity in too_large if quantity.bites] == ["image shards"], "8 shards of 100,000 files of 110 kB"
    assert not any(
        quantity.bites for quantity in memory(RATES, large.replace(window_shards=1), workers=8) if quantity.what != "image shards"
    )


def test_bytes_follow_from_the_rate() -> None:
    flows = {quantity.what: quantity.value for quantity in traffic(RATES, WORK, images_per_s=1000)}
    assert flows["crops to the teachers"] == 1000 * 150_528
    assert flows["logits back"] == 1000 * 4000
    assert flows["store"] == 50 * 100_000 * 90
