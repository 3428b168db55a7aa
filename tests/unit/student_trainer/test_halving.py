"""Who stops when: rungs worked out by hand, decisions from given scores, and the crops that the scores come from."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from student_trainer.halving import HeldOut, Selection, rung_steps
from student_trainer.label_path import LabelRules
from student_trainer.loss import distillation_loss
from student_trainer.settings import EarlyStopSettings, HalvingSettings, TrainSettings
from student_trainer.store import SoftLabelStore
from student_trainer.stream import LabelledStream
from teacher_server.fake import FakeTeacher, fake_logits


def settings_of(num_students: int, **more: Any) -> TrainSettings:
    students = [{"name": f"s{number}", "network": {}} for number in range(num_students)]
    return TrainSettings.model_validate({"students": students, **more})


def scores_of(*values: float, first: int = 0) -> dict[str, float]:
    return {f"s{number}": value for number, value in enumerate(values, start=first)}


class TestRungs:
    @pytest.mark.parametrize(
        ("eta", "num_students", "expected"),
        [
            (3, 9, [100, 300]),  # 9 -> 3 -> 1
            (3, 8, [300]),  # 8 -> 2
            (2, 8, [112, 225, 450]),  # 8 -> 4 -> 2 -> 1
            (3, 2, []),
            (3, 1, []),
            (1.5, 2, [600]),
        ],
    )
    def test_by_default_as_many_as_bring_them_down_to_one(self, eta: float, num_students: int, expected: list[int]) -> None:
        assert rung_steps(HalvingSettings(eta=eta), num_students, 900) == expected

    def test_as_they_are_given(self) -> None:
        assert rung_steps(HalvingSettings(rungs=[0.5, 0.1]), 4, 100) == [10, 50]
        assert rung_steps(HalvingSettings(rungs=[0.001, 0.999]), 4, 10) == [1]  # none before the first step, none after the last
        with pytest.raises(ValidationError, match="rungs"):
            HalvingSettings(rungs=[0.5, 1.0])


class TestHalving:
    def test_the_best_go_on_and_of_equals_the_first(self) -> None:
        selection = Selection(settings_of(9, halving={"eta": 3}), 900)
        assert [selection.is_rung(done) for done in (99, 100, 101)] == [False, True, True]
        stopped = selection.cut(scores_of(0.1, 0.9, 0.5, 0.5, 0.5, -math.inf, 0.2, 0.3, 0.4), 100)
        assert selection.rungs[-1]["kept"] == ["s1", "s2", "s3"]
        assert list(stopped) == ["s4", "s8", "s7", "s6", "s0", "s5"]
        assert (stopped["s4"].why, stopped["s4"].step) == ("halving", 100)
        assert stopped["s4"].detail == "number 4 of 9 at rung 1, where 3 go on (agreement 50.0%)"
        assert not selection.is_rung(101)
        assert selection.is_rung(300)
        assert list(selection.cut({"s1": 0.1, "s2": 0.3, "s3": 0.2}, 300)) == ["s3", "s1"]
        assert not selection.is_rung(899)

    def test_students_that_stopped_before_leave_their_place_to_others(self) -> None:
        selection = Selection(settings_of(4, halving={"eta": 2}), 100)
        assert selection.cut({"s1": 0.1, "s3": 0.2}, 25) == {}

    def test_goes_on_from_its_state(self) -> None:
        settings = settings_of(9, halving={"eta": 3}, early_stop={"patience": 2})
        whole = Selection(settings, 900)
        whole.follow(scores_of(*[0.3] * 9), 50)
        whole.cut(scores_of(*range(9)), 100)
        resumed = Selection(settings, 900, json.loads(json.dumps(whole.state())))
        assert resumed.state() == whole.state()
        assert not resumed.is_rung(100)
        for selection in (whole, resumed):
            assert list(selection.follow(scores_of(0.3, 0.31, 0.3, first=6), 150)) == []
            assert list(selection.follow(scores_of(0.3, 0.3, 0.3, first=6), 200)) == ["s6", "s8"]


def test_a_score_that_is_no_number_goes_through_json() -> None:
    settings = settings_of(1, early_stop={"patience": 2})
    before = Selection(settings, 100)
    before.follow({"s0": -math.inf}, 10)
    resumed = Selection(settings, 100, json.loads(json.dumps(before.state(), allow_nan=False)))
    for selection in (before, resumed):
        assert selection.follow({"s0": -math.inf}, 20) == {}
        assert list(selection.follow({"s0": -math.inf}, 30)) == ["s0"]


class TestEarlyStop:
    def run(self, scores: list[float], **settings: Any) -> list[str]:
        """Words of the evaluations at which it stops."""
        selection = Selection(settings_of(1, early_stop=settings), 100)
        return [stopped["s0"].detail for score in scores if (stopped := selection.follow({"s0": score}, 7))]

    def test_after_so_many_evaluations_without_a_rise(self) -> None:
        assert self.run([0.1, 0.2, 0.3, 0.4, 0.5], patience=1) == []
        assert self.run([0.1, 0.3, 0.2, 0.25], patience=2) == ["no better for 2 evaluations than agreement 30.0%"]
        assert self.run([0.1, 0.3, 0.2, 0.35, 0.3, 0.3], patience=2) == ["no better for 2 evaluations than agreement 35.0%"]

    def test_a_small_rise_is_none(self) -> None:
        assert self.run([0.1, 0.15, 0.199], patience=2, min_delta=0.1) == ["no better for 2 evaluations than agreement 10.0%"]
        assert self.run([0.1, 0.15, 0.201], patience=2, min_delta=0.1) == []

    def test_the_loss_falls(self) -> None:
        assert self.run([-2.0, -1.0, -1.5], patience=1, metric="loss") == ["no better for 1 evaluations than loss 1.0000"]

    def test_without_it_nobody_stops(self) -> None:
        assert Selection(settings_of(1), 10).follow({"s0": 0.0}, 5) == {}
        assert EarlyStopSettings().patience == 5


class TestHeldOut:
    @pytest.fixture
    def stream(self, loader_of: Any, store: SoftLabelStore) -> Any:
        rules = LabelRules(1.0, (1.0,), 0.02, 5.0)
        with LabelledStream(loader_of(num_views=3, global_batch=5), store, lambda: FakeTeacher(10), rules, 2) as stream:
            yield stream

    def test_is_a_view_that_no_student_sees_labelled_by_the_teacher(
        self, stream: LabelledStream, held_by: Any, store: SoftLabelStore
    ) -> None:
        held = HeldOut(stream, settings_of(1, num_views=3, held_out_images=7), epochs=4)
        assert held._crops_NHWC.shape == (10, 8, 8, 3)  # two whole batches
        crops = {crop.tobytes() for crop in held._crops_NHWC}
        seen = {crop.tobytes() for epoch in range(4) for batch in stream.loader.epoch(epoch) for crop in batch.crops_VBHWC[0]}
        assert not crops & seen
        stream.commit()
        assert {view for view, _, _ in held_by(store)} == {3}
        again = HeldOut(stream, settings_of(1, num_views=3, held_out_images=7), epochs=4)
        assert np.array_equal(again._crops_NHWC, held._crops_NHWC)
        assert stream.path.num_from_store == 10

    def test_scores(self, stream: LabelledStream) -> None:
        held = HeldOut(stream, settings_of(1, num_views=3, held_out_images=10), epochs=4)

        def teacher(crops_BHWC: Any) -> Any:
            return fake_logits(crops_BHWC, 10)

        assert held.score(teacher, "agreement") == 1
        assert held.score(lambda crops: -teacher(crops), "agreement") == 0
        loss = distillation_loss(torch.zeros(10, 10), torch.from_numpy(teacher(held._crops_NHWC)), 1.0)
        assert held.score(lambda crops: np.zeros((len(crops), 10), np.float32), "loss") == pytest.approx(-loss.item())
        assert held.score(teacher, "loss") > -loss.item()
        assert held.score(lambda crops: np.full((len(crops), 10), np.nan, np.float32), "loss") == -math.inf
        assert held.score(lambda crops: np.full((len(crops), 10), np.nan, np.float32), "agreement") == -math.inf
