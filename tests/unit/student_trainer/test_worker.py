"""The training loop as a whole, with a fake teacher on 20 images: going on after a death, alpha, the labelled set, several workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.checkpoint import Checkpoint, Write, load_checkpoint
from distill.cluster.worker import LocalWorker, Row
from distill.errors import CheckpointError, TeacherUnavailable, TrainingDiverged
from distill.loader import CropLoader
from distill.models.classifier import build_classifier
from distill.models.saved_classifier import ClassifierCard, load_classifier, save_classifier
from distill.rejections import RejectionLog
from student_trainer import lessons
from student_trainer.job import TrainJob
from student_trainer.labelled_images import labelled_batches
from student_trainer.store import StoreIdentity
from student_trainer.train import keep_students
from student_trainer.worker import is_evaluated, train_worker
from teacher_server.fake import FakeTeacher

CLASSES = ("cat", "dog")
CPU = torch.device("cpu")
JobOf = Callable[..., TrainJob]


@pytest.fixture(autouse=True)
def _few_threads(one_thread: None) -> None:
    """See `one_thread`."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 images of noise in each of two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for image in range(10):
            pixels = np.clip(random.integers(0, 100) + 150 * number + random.normal(0, 30, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")
    return folder


@pytest.fixture
def job_of(photos: Path, tmp_path: Path) -> JobOf:
    """A job of one small student; 20 unlabelled images in batches of 5 are 4 steps an epoch."""

    def make(*, objective: str = "distill", epochs: int = 1, student: dict[str, Any] | None = None, **train: Any) -> TrainJob:
        images = {"path": str(photos)}
        network = {"depth": 10, "width_multiplier": 0.125, "stem": "cifar"}
        settings = {"name": "small", "network": network, "optimizer": {"learning_rate": 0.02}, **(student or {})}
        job = {
            "objective": objective,
            "data": {"unlabelled": images, "labelled": images, "test": images, "image_size": 8, "class_names": CLASSES},
            "train": {"students": [settings], "global_batch": 5, "num_views": 1, "precision": "fp32", "requests_in_flight": 2, **train},
            "epochs": epochs,
            "seed": 3,
            "class_names": CLASSES,
            "rejected_path": str(tmp_path / "rejected.jsonl"),
            "teacher": {"model": "fake", "repository": "nowhere"},
            "store_folder": str(tmp_path / "store"),
        }
        made = TrainJob.model_validate(job)
        digest = made.open_images().digest()
        identity = StoreIdentity(fingerprint="f" * 64, num_classes=2, recipe=made.recipe, seed=3, images=digest)
        return made.replace(store_identity=identity)

    return make


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeTeacher]]:
    """Every teacher that the loop opened; all were closed at the end."""
    opened: list[FakeTeacher] = []

    def open_fake(address: object) -> FakeTeacher:
        opened.append(FakeTeacher(len(CLASSES)))
        return opened[-1]

    monkeypatch.setattr(lessons, "open_teacher", open_fake)
    yield opened
    assert all(teacher.closed for teacher in opened)


class Killed(Exception):
    """What happened to the worker; no error of the loop's."""


class MortalWorker(LocalWorker):
    """Dies right after its first checkpoint."""

    def checkpoint(self, prepare: Callable[[], Write]) -> None:
        super().checkpoint(prepare)
        raise Killed


def run(
    job: TrainJob, folder: Path, kind: type[LocalWorker] = LocalWorker, wants_stop: Callable[[], bool] = lambda: False
) -> tuple[Checkpoint, list[Row]]:
    """The students' checkpoint at the end, and all rows."""
    rows: list[Row] = []
    train_worker(job.model_dump(mode="json"), kind(folder, rows.append, CPU, wants_stop))
    return load_checkpoint(folder / "checkpoint" / "students"), rows


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    """Weights, statistics and optimiser slots, bit for bit."""
    assert one.weights.keys() == other.weights.keys()
    assert [name for name in one.weights if not torch.equal(one.weights[name], other.weights[name])] == []
    assert one.state is not None
    assert other.state is not None
    mine, theirs = (checkpoint["small"]["optimizer"]["state"] for checkpoint in (one.state, other.state))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n][k], theirs[n][k]) for n in mine for k in mine[n])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_four_steps_are_two_and_a_death_and_two(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher], alpha: float, precision: str
) -> None:
    job = job_of(alpha=alpha, labelled_batch=3, checkpoint_every_steps=2, precision=precision)
    whole, _ = run(job, tmp_path / "whole")
    with pytest.raises(Killed):
        run(job, tmp_path / "cut", MortalWorker)
    half = load_checkpoint(tmp_path / "cut" / "checkpoint" / "students")
    assert (half.manifest["epoch"], half.manifest["step"], half.manifest["totals"]["images"]) == (0, 2, 10)
    resumed, _ = run(job, tmp_path / "cut")
    assert_same(whole, resumed)
    with pytest.raises(AssertionError):  # the oracle can tell
        assert_same(whole, half)
    totals = resumed.manifest["totals"]
    assert (totals["images"], totals["from_store"]) == (20, 20)  # the whole run had filled the store
    assert sum(sum(teacher.calls) for teacher in teachers) == 20


def test_alpha_changes_what_is_learnt(job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
    weights = [run(job_of(alpha=alpha), tmp_path / str(alpha))[0].weights["small/body.linear.weight"] for alpha in (1.0, 0.5, 0.1)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_labelled_images_are_few_and_cycled(job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
    """2 labels for 4 steps of 5 images: each step draws both, and the teacher is not asked about them beside its own images."""
    job = job_of(alpha=0.5)
    job = job.replace(data=job.data.replace(label_fraction=0.1))
    assert job.labelled_loading(job.open_labelled()).global_batch == 2
    run(job, tmp_path / "run")
    assert sum(teachers[0].calls) == 20


def test_only_the_labelled_images_are_asked_about(job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
    job = job_of(images="labelled", epochs=3, num_views=2)
    job = job.replace(data=job.data.replace(label_fraction=0.2))
    identity = job.store_identity
    assert identity is not None
    assert job.loading(job.open_images()).global_batch == 4  # all there are
    found, rows = run(job.replace(store_identity=identity.replace(images=job.open_images().digest())), tmp_path / "run")
    assert teachers[0].calls == [4, 4]  # two views; the third epoch reads the first one's from the store
    assert (found.manifest["totals"]["images"], found.manifest["totals"]["from_store"]) == (12, 4)
    assert {row["images"] for row in rows if row["kind"] == "step"} == {4}


def test_steps_of_a_pass(job_of: JobOf) -> None:
    assert job_of().steps_per_epoch() == 4
    assert job_of(global_batch=3).steps_per_epoch() == 6  # two images are left out, others each time
    assert job_of(images="labelled", global_batch=64).steps_per_epoch() == 1
    assert job_of(objective="labels", global_batch=64).steps_per_epoch() == 1


def test_the_control_learns_from_labels_and_asks_nobody(job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
    found, rows = run(job_of(objective="labels", epochs=15, num_evaluations=1), tmp_path / "run")
    assert teachers == []
    assert found.manifest["totals"]["images"] == 300
    (epoch,) = [row for row in rows if row["kind"] == "epoch"]
    assert epoch["top1"]["small"] >= 0.9  # one class is brighter
    assert epoch["loss"]["small"] < 0.69  # ln 2: knows nothing
    assert all("store" not in row["note"] for row in rows if row["kind"] == "step")


def test_rows_say_how_far_it_is(job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.worker.POST_EVERY_S", -1.0)
    _, rows = run(job_of(epochs=2), tmp_path / "run")
    steps = [row for row in rows if row["kind"] == "step"]
    assert [(row["step"], row["of"], row["images"]) for row in steps] == [(step, 8, 5) for step in range(1, 9)]
    assert steps[0]["note"].startswith("loss small 0.693, 0% of labels from the store, student busy")
    assert steps[-1]["totals"]["images"] == 40
    assert steps[-1]["totals"]["from_store"] == 20
    json.dumps(rows)  # what the journal does with them


def test_a_student_starts_from_its_checkpoint_and_a_resumed_one_from_where_it_was(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]
) -> None:
    job = job_of(student={"optimizer": {"learning_rate": 1e-9}, "num_head_layers": 1}, checkpoint_every_steps=2)
    network = job.train.students[0].network
    torch.manual_seed(11)
    teacher = build_classifier(network, 2, job.data.preprocessing, num_head_layers=1)
    torch.nn.init.normal_(teacher.body.linear.weight)
    card = ClassifierCard(network=network, num_head_layers=1, class_names=CLASSES, preprocessing=job.data.preprocessing)
    save_classifier(tmp_path / "teacher", teacher, card)
    job = job.replace(initial_checkpoints={"small": str(tmp_path / "teacher")})
    with pytest.raises(Killed):
        run(job, tmp_path / "run", MortalWorker)
    (tmp_path / "teacher").rename(tmp_path / "gone")  # a resumed run needs it no more
    found, _ = run(job, tmp_path / "run")
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(found.weights[f"small/{name}"], parameter.detach(), rtol=0, atol=1e-6)
    keep_students(tmp_path / "run" / "checkpoint" / "students", job, tmp_path / "run")
    kept = load_classifier(tmp_path / "run" / "students" / "small")
    assert kept.card.num_head_layers == 1
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        run(job, tmp_path / "afresh")


def test_weights_for_a_student_that_is_not_there_are_refused(job_of: JobOf) -> None:
    with pytest.raises(ValueError, match="initial_checkpoints names big, which is no student of this job"):
        job_of().replace(initial_checkpoints={"big": "somewhere"})


def student_of(name: str, learning_rate: float = 0.02, **more: Any) -> dict[str, Any]:
    network = {"depth": 10, "width_multiplier": 0.125, "stem": "cifar"}
    return {"name": name, "network": network, "optimizer": {"learning_rate": learning_rate, "warmup_share": 0}, **more}


class TestDivergence:
    def test_one_student_is_stopped_and_named_and_the_others_do_not_notice(
        self, job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]
    ) -> None:
        job = job_of(students=[student_of("small"), student_of("wild", learning_rate=1e38)], checkpoint_every_steps=3)
        alone, _ = run(job_of(students=[student_of("small")]), tmp_path / "alone")
        with pytest.raises(Killed):
            run(job, tmp_path / "both", MortalWorker)
        stopped = load_checkpoint(tmp_path / "both" / "checkpoint" / "students").manifest["stopped"]
        assert (list(stopped), stopped["wild"]["why"]) == (["wild"], "diverged")
        found, rows = run(job, tmp_path / "both")  # goes on without it
        assert found.manifest["stopped"] == stopped
        assert [row for row in rows if row["kind"] == "stopped"] == [{"kind": "stopped", "student": "wild", **stopped["wild"]}]
        assert rows[0]["kind"] == "stopped"  # said again: who watches this process has not heard it
        assert [name for name, tensor in alone.weights.items() if not torch.equal(tensor, found.weights[name])] == []
        (epoch,) = [row for row in rows if row["kind"] == "epoch"]
        assert (list(epoch["loss"]), list(epoch["top1"])) == (["small"], ["small"])
        json.dumps(rows, allow_nan=False)
        keep_students(tmp_path / "both" / "checkpoint" / "students", job, tmp_path / "kept")
        assert [path.name for path in (tmp_path / "kept" / "students").iterdir()] == ["small"]

    def test_it_is_said_when_it_happens(self, job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
        _, rows = run(job_of(students=[student_of("small"), student_of("wild", learning_rate=1e38)]), tmp_path / "run")
        (row,) = [row for row in rows if row["kind"] == "stopped"]
        assert (row["student"], row["why"]) == ("wild", "diverged")
        assert row["detail"].endswith(f"is not finite at step {row['step']}; try a smaller learning_rate")

    def test_where_none_is_left_the_run_fails_and_keeps_its_last_checkpoint(
        self, job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]
    ) -> None:
        job = job_of(students=[student_of("wild", learning_rate=1e38)], checkpoint_every_steps=1)
        with pytest.raises(TrainingDiverged, match=r"no student is left: student wild: the (loss|gradient) is not finite at step"):
            run(job, tmp_path / "run")
        kept = load_checkpoint(tmp_path / "run" / "checkpoint" / "students").manifest
        assert kept["stopped"] == {}
        assert kept["step"] > 0


class TestSelection:
    """Three students, of which the second learns and the others do not: the order at any rung is known."""

    def job(self, job_of: JobOf, **more: Any) -> TrainJob:
        rates = {"still": 1e-12, "small": 0.05, "slow": 1e-7}
        students = [student_of(name, learning_rate) for name, learning_rate in rates.items()]
        selection = {"halving": {"eta": 3, "rungs": [0.5], "metric": "loss"}, "held_out_images": 10}
        return job_of(epochs=2, students=students, num_evaluations=2, **{**selection, **more})

    def test_halving_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
        self, job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]
    ) -> None:
        """8 steps, a rung after 3, checkpoints after each: the run is cut off before the rung, and after it."""
        job = self.job(job_of, checkpoint_every_steps=1, halving={"eta": 3, "rungs": [3 / 8], "metric": "loss"})
        whole, rows = run(job, tmp_path / "whole")
        assert {name: (s["why"], s["step"]) for name, s in whole.manifest["stopped"].items()} == dict.fromkeys(
            ("still", "slow"), ("halving", 3)
        )
        (rung,) = [row for row in rows if row["kind"] == "rung"]
        assert (rung["step"], rung["kept"], list(rung["scores"])) == (3, ["small"], ["still", "small", "slow"])
        for cut_off in range(6):
            with pytest.raises(Killed):
                run(job, tmp_path / "cut", MortalWorker)
            kept = load_checkpoint(tmp_path / "cut" / "checkpoint" / "students").manifest
            assert set(kept["stopped"]) == ({"still", "slow"} if cut_off >= 2 else set())
        resumed, _ = run(job, tmp_path / "cut")
        assert_same(whole, resumed)
        assert resumed.manifest["selection"] == whole.manifest["selection"]
        assert resumed.manifest["stopped"] == whole.manifest["stopped"]
        alone, _ = run(self.job(job_of, halving=None), tmp_path / "alone")
        assert [n for n in alone.weights if n.startswith("small/") and not torch.equal(alone.weights[n], whole.weights[n])] == []

    def test_who_is_cut_keeps_what_it_had_learnt(self, job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
        job = self.job(job_of)
        run(job, tmp_path / "run")
        kept = keep_students(tmp_path / "run" / "checkpoint" / "students", job, tmp_path / "run")
        assert sorted(path.name for path in (tmp_path / "run" / "students").iterdir()) == ["slow", "small", "still"]
        assert len(kept["selection"]["rungs"]) == 1
        assert kept["steps"] == {"still": 4, "small": 8, "slow": 4}

    def test_where_all_stop_early_the_run_is_over(self, job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
        stop = {"patience": 1, "min_delta": 1000, "metric": "loss"}
        job = self.job(job_of, halving=None, early_stop=stop).replace(epochs=9)
        job = job.replace(train=job.train.replace(num_evaluations=9))
        found, rows = run(job, tmp_path / "run")
        assert {(s["why"], s["step"]) for s in found.manifest["stopped"].values()} == {("early stop", 8)}
        assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2]
        again, rows = run(job, tmp_path / "run")
        assert again.manifest["totals"]["images"] == found.manifest["totals"]["images"] == 40
        assert [(row["kind"], row["student"]) for row in rows] == [("stopped", name) for name in ("still", "small", "slow")]

    def test_the_control_trains_all(self, job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
        found, _ = run(self.job(job_of, objective="labels", early_stop={"patience": 1}), tmp_path / "run")
        assert found.manifest["stopped"] == {}


def test_a_wish_to_stop_is_heard_while_the_teacher_is_silent(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept goes on with the step that could not be taken."""
    silent = FakeTeacher(len(CLASSES), unavailable_calls=10**9)
    monkeypatch.setattr(lessons, "open_teacher", lambda address: silent)
    monkeypatch.setattr("student_trainer.stream.TELL_EVERY_S", 0.01)
    answers = iter([False, True])
    stopped, _ = run(job_of(), tmp_path / "run", wants_stop=lambda: next(answers))
    assert (stopped.manifest["epoch"], stopped.manifest["step"], stopped.manifest["totals"]["images"]) == (0, 0, 0)
    monkeypatch.setattr(lessons, "open_teacher", lambda address: FakeTeacher(len(CLASSES)))
    whole, _ = run(job_of(), tmp_path / "whole")
    assert_same(run(job_of(), tmp_path / "run")[0], whole)


class Leaving(FakeTeacher):
    """Answers a number of questions, and then nobody any more."""

    def __init__(self, answers: int) -> None:
        super().__init__(len(CLASSES))
        self._answers = answers

    async def _infer(self, *question: Any) -> dict[str, Any]:
        self.unavailable_calls = 10**9 if len(self.calls) == self._answers else self.unavailable_calls
        return await super()._infer(*question)


def test_when_patience_ends_what_is_trained_is_kept(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "open_teacher", lambda address: Leaving(2))
    job = job_of(teacher_patience_s=0.1, requests_in_flight=1)
    with pytest.raises(TeacherUnavailable, match=r"limit train\.teacher_patience_s=0\.1"):
        run(job, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoint" / "students").manifest["step"] == 2
    monkeypatch.setattr(lessons, "open_teacher", lambda address: FakeTeacher(len(CLASSES)))
    whole, _ = run(job, tmp_path / "whole")
    assert_same(run(job, tmp_path / "run")[0], whole)


def test_patience_that_ends_at_a_rung_goes_back_to_the_checkpoint_before(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a step and its rung there is no state to go on from."""
    monkeypatch.setattr(lessons, "open_teacher", lambda address: Leaving(4))  # the training crops of an epoch, not the held-out ones
    job = job_of(teacher_patience_s=0.1, requests_in_flight=1, early_stop={"patience": 1}, num_evaluations=2, epochs=2)
    job = job.replace(epochs=2)
    with pytest.raises(TeacherUnavailable):
        run(job, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()
    monkeypatch.setattr(lessons, "open_teacher", lambda address: FakeTeacher(len(CLASSES)))
    whole, _ = run(job, tmp_path / "whole")
    assert_same(run(job, tmp_path / "run")[0], whole)


def run_pair(job: TrainJob, folder: Path, *stop_after: int) -> Checkpoint:
    """As `run`, in two processes."""
    script = Path(__file__).with_name("train_in_processes.py")
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", str(script), str(folder), job.model_dump_json(), *map(str, stop_after)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert made.returncode == 0, made.stderr
    return load_checkpoint(folder / "checkpoint" / "students")


@pytest.mark.parametrize("first", ["one worker", "two workers"])
def test_on_other_workers_it_goes_on_as_if_it_had_not_stopped(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher], first: str
) -> None:
    """Batches of 5 taught and 3 labelled images, cut 3 + 2 and 2 + 1 among two workers: loss, the images' weights in it, batch norm,
    averaged weights and totals are of them all. A stop in the middle, and another number of workers for the rest."""
    student = {"optimizer": {"learning_rate": 0.01, "max_grad_norm": 0.5}, "ema_decay": 0.9}
    job = job_of(alpha=0.5, labelled_batch=3, weighting="entropy", student=student)
    alone, _ = run(job, tmp_path / "alone")
    job = job.replace(store_folder=str(tmp_path / "pair-store"))
    if first == "one worker":
        answers = iter([False, False, True])
        stopped, _ = run(job, tmp_path / "pair", wants_stop=lambda: next(answers))
        pair = run_pair(job, tmp_path / "pair")
    else:
        stopped = run_pair(job, tmp_path / "pair", 2)
        pair, _ = run(job, tmp_path / "pair")
    assert (stopped.manifest["epoch"], stopped.manifest["step"], stopped.manifest["totals"]["images"]) == (0, 2, 10)
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(pair.weights[name], tensor, rtol=1e-4, atol=1e-5)
    totals = pair.manifest["totals"]
    assert totals["images"] == totals["asked"] + totals["from_store"] == 20


def test_crops_go_through_the_filter_of_the_data(job_of: JobOf) -> None:
    job = job_of(mixing={"kind": "mixup"})
    sharp = job.replace(data=job.data.replace(interpolation="bicubic"))
    assert [recipe.interpolation for recipe in (sharp.recipe, sharp.plain_recipe)] == ["bicubic", "bicubic"]
    assert [recipe.interpolation for recipe in (job.recipe, job.plain_recipe)] == ["bilinear", "bilinear"]


class TestLabelledBatches:
    def loader(self, job: TrainJob, batch: int) -> CropLoader:
        job = job.replace(train=job.train.replace(labelled_batch=batch))
        source = job.open_labelled()
        log = RejectionLog(Path(job.rejected_path), 0.0)
        return CropLoader(source, job.recipe, job.labelled_loading(source), lambda epoch: (epoch,), log)

    def take(self, loader: CropLoader, first_step: int, count: int) -> list[tuple[int, int, list[str], bytes]]:
        endless = labelled_batches(loader, first_step)
        taken = [next(endless) for _ in range(count)]
        endless.close()
        return [(batch.epoch, batch.step, batch.image_ids, batch.crops_VBHWC.tobytes()) for batch in taken]

    def test_step_s_is_a_function_of_s_and_passes_follow_each_other(self, job_of: JobOf) -> None:
        whole = self.take(self.loader(job_of(), 8), 0, 7)  # 20 images: 2 steps a pass
        assert [(epoch, step) for epoch, step, _, _ in whole] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
        for first in (1, 2, 5):
            assert self.take(self.loader(job_of(), 8), first, 7 - first) == whole[first:]
        loader = self.loader(job_of(), 8)
        assert [(b.epoch, b.step, b.image_ids, b.crops_VBHWC.tobytes()) for e in range(3) for b in loader.epoch(e)] == whole[:6]

    def test_a_pass_of_one_step_holds_every_image_each_time_cut_anew(self, job_of: JobOf) -> None:
        taken = self.take(self.loader(job_of(), 100), 0, 3)
        assert [len(set(image_ids)) for _, _, image_ids, _ in taken] == [20, 20, 20]
        assert len({crops for _, _, _, crops in taken}) == 3

    def test_images_count_as_seen_once(self, job_of: JobOf) -> None:
        loader = self.loader(job_of(), 10)
        self.take(loader, 0, 9)
        assert loader.rejections.num_seen == 20


def kept_at(rows: list[Row]) -> list[int]:
    return [row["step"] for row in rows if row["kind"] == "checkpoint"]


@pytest.mark.parametrize(("every", "expected"), [(6, [6, 12]), (8, [8, 12]), (4, [4, 8, 12]), (100, [12])])
def test_checkpoints_are_counted_over_the_epochs(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher], every: int, expected: list[int]
) -> None:
    """3 epochs of 4 steps, of which only the last is evaluated."""
    found, rows = run(job_of(epochs=3, num_evaluations=1, checkpoint_every_steps=every), tmp_path / "run")
    assert kept_at(rows) == expected
    assert (found.manifest["epoch"], found.manifest["step"]) == (3, 0)


def test_a_rung_at_the_end_of_an_epoch_is_kept(job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]) -> None:
    students = [student_of("one"), student_of("two")]
    job = job_of(epochs=3, students=students, num_evaluations=1, halving={"eta": 2, "rungs": [1 / 3]}, held_out_images=5)
    assert kept_at(run(job, tmp_path / "run")[1]) == [4, 12]


def test_the_mean_loss_of_an_epoch_is_of_all_its_steps_also_after_a_death(
    job_of: JobOf, tmp_path: Path, teachers: list[FakeTeacher]
) -> None:
    job = job_of(epochs=3, num_evaluations=1, checkpoint_every_steps=6)
    _, rows = run(job, tmp_path / "whole")
    with pytest.raises(Killed):
        run(job, tmp_path / "cut", MortalWorker)
    _, resumed = run(job, tmp_path / "cut")
    whole, cut = ([row["loss"] for row in found if row["kind"] == "epoch"] for found in (rows, resumed))
    assert len(whole) == 1
    assert cut == whole


def test_where_test_images_have_no_labels_there_is_no_accuracy(
    job_of: JobOf, photos: Path, tmp_path: Path, teachers: list[FakeTeacher]
) -> None:
    job = job_of(epochs=2)
    flat = job.data.test.replace(path=str(next(photos.iterdir())))
    _, rows = run(job.replace(data=job.data.replace(test=flat)), tmp_path / "run")
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["top1"] for row in epochs] == [{}, {}]
    assert all(row["loss"]["small"] > 0 for row in epochs)


def test_evaluations_are_spread_evenly_and_the_last_epoch_is_one() -> None:
    assert [epoch for epoch in range(1, 11) if is_evaluated(epoch, 10, 3)] == [4, 7, 10]
    assert [epoch for epoch in range(1, 4) if is_evaluated(epoch, 3, 20)] == [1, 2, 3]
