"""The students and their common checkpoint: going on is the same as never having stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.checkpoint import load_checkpoint, save_checkpoint
from distill.cluster.worker import LocalWorker
from distill.errors import CheckpointError, ConfigError
from distill.models.classifier import Classifier, build_classifier
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings
from distill.teacher_info import Preprocessing
from student_trainer.loss import Lesson, distillation_loss
from student_trainer.settings import StudentSettings, TrainSettings
from student_trainer.students import Stopped, Student, prepare_students, restore_students, save_students

SIZE = 16
CPU = torch.device("cpu")
NUM_STEPS = 4


def settings_of(name: str, optimizer: str, depth: int = 10) -> StudentSettings:
    return StudentSettings.model_validate(
        {
            "name": name,
            "network": NetworkSettings(depth=depth, width_multiplier=0.125, stem="cifar"),
            "optimizer": OptimizerSettings(name=optimizer, learning_rate=0.01),
        }
    )


TRAIN = TrainSettings(students=[settings_of("first", "sgd"), settings_of("second", "adamw")], precision="fp32")


def new_students(*wanted: StudentSettings, seed: int = 0) -> list[Student]:
    torch.set_num_threads(1)
    students = []
    for number, settings in enumerate(wanted or TRAIN.students):
        torch.manual_seed(seed + number)
        network = build_classifier(settings.network, 10, Preprocessing(image_size=SIZE), settings.num_head_layers)
        students.append(Student(settings, network, CPU, global_batch=8, seed=0))
    return students


def lesson(step: int, kind: str = "soft labels") -> Lesson:
    random = torch.Generator().manual_seed(step)
    crops_BHWC = torch.randint(0, 256, (8, SIZE, SIZE, 3), generator=random, dtype=torch.uint8)
    teacher_BK, labels_B = 3 * torch.randn(8, 10, generator=random), torch.randint(0, 10, (8,), generator=random)
    if kind == "both":
        return Lesson(crops_BHWC, teacher_BK[:5], labels_B[5:])
    return Lesson(crops_BHWC, labels_L=labels_B) if kind == "labels" else Lesson(crops_BHWC, teacher_BK)


def train(students: list[Student], first: int, last: int, *, kind: str = "soft labels", settings: TrainSettings = TRAIN) -> None:
    for step in range(first, last):
        for student in students:
            student.step(lesson(step, kind), settings, step, NUM_STEPS)


def everything(students: list[Student]) -> dict[str, torch.Tensor]:
    """Weights, batch-norm statistics and optimiser states."""
    found = {f"{s.settings.name}/{name}": tensor.clone() for s in students for name, tensor in s.network.state_dict().items()}
    for s in students:
        for number, slots in s.optimizer.state_dict()["state"].items():
            found |= {f"{s.settings.name}/{number}/{key}": torch.as_tensor(value).clone() for key, value in slots.items()}
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["soft labels", "labels", "both"])
def test_four_steps_are_two_and_a_restart_and_two(tmp_path: Path, kind: str, precision: str) -> None:
    settings = TRAIN.replace(precision=precision, alpha=0.5)
    whole = new_students()
    train(whole, 0, 4, kind=kind, settings=settings)
    begun = new_students()
    train(begun, 0, 2, kind=kind, settings=settings)
    save_students(tmp_path / "students", begun, {"epoch": 1, "step": 2, "totals": {"images": 16.0}})
    resumed = new_students(seed=99)  # other initial weights: all must come from the checkpoint
    progress = restore_students(tmp_path / "students", resumed)
    assert (progress["epoch"], progress["step"], progress["totals"]) == (1, 2, {"images": 16.0})
    train(resumed, 2, 4, kind=kind, settings=settings)
    assert_same(everything(whole), everything(resumed))
    assert [s.loss for s in whole] == [s.loss for s in resumed]
    with pytest.raises(AssertionError):  # the oracle can tell
        assert_same(everything(whole), everything(begun))


def test_students_on_one_stream_are_what_they_are_alone(tmp_path: Path) -> None:
    both, alone = new_students(), new_students()[1:]
    train(both, 0, 2)
    train(alone, 0, 2)
    assert_same(everything(both[1:]), everything(alone))


def test_labels_and_soft_labels_go_through_in_one_pass_and_are_weighed_by_alpha() -> None:
    """Equation 3 by hand on the logits of one forward pass over all 8 crops; in two passes batch norm would see other batches."""
    (student,), (twin,) = new_students(settings_of("first", "sgd")), new_students(settings_of("first", "sgd"))
    for network in (student.network, twin.network):
        torch.nn.init.normal_(network.body.linear.weight, generator=torch.Generator().manual_seed(1))  # it starts at 0: all logits alike
    both = lesson(0, "both")
    assert both.teacher_UK is not None
    assert both.labels_L is not None
    student_BK = twin.network.train()(both.crops_BHWC)
    hard = -sum(student_BK[5:].log_softmax(1)[row, label] for row, label in enumerate(both.labels_L)) / 3
    expected = 0.3 * distillation_loss(student_BK[:5], both.teacher_UK, 2.0) + 0.7 * hard
    student.step(both, TRAIN.replace(alpha=0.3, temperature=2.0), 0, 1)
    assert student.loss == pytest.approx(expected.item(), rel=1e-5)
    apart_BK = torch.cat([twin.network(both.crops_BHWC[:5]), twin.network(both.crops_BHWC[5:])])
    assert not torch.allclose(apart_BK, student_BK, rtol=1e-3)


def test_a_step_lowers_the_loss_on_its_own_batch() -> None:
    (student,) = new_students(settings_of("first", "sgd"))
    losses = []
    for step in range(8):
        student.step(lesson(0), TRAIN, step, 8)
        losses.append(student.loss)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_whose_loss_is_not_finite_is_stopped_where_it_was(tmp_path: Path, value: float) -> None:
    spoilt_one, good_one = students = new_students()
    train(students, 0, 1)
    before = {name: parameter.clone() for name, parameter in spoilt_one.network.named_parameters()}
    loss, spoilt = spoilt_one.loss, lesson(1)
    assert spoilt.teacher_UK is not None
    spoilt.teacher_UK[0, 0] = value
    spoilt_one.step(spoilt, TRAIN, 1, NUM_STEPS)
    assert spoilt_one.stopped == Stopped(why="diverged", step=1, detail="the loss is not finite at step 1; try a smaller learning_rate")
    assert_same(before, dict(spoilt_one.network.named_parameters()))
    assert spoilt_one.loss == loss
    train([good_one], 1, 2)
    save_students(tmp_path / "students", students, {"epoch": 0, "step": 2})
    resumed = new_students(seed=99)
    restore_students(tmp_path / "students", resumed)
    assert [student.stopped for student in resumed] == [spoilt_one.stopped, None]
    assert_same(everything(resumed), everything(students))


def test_a_gradient_that_is_not_finite_stops_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of a feature that is 0 everywhere: the loss is finite and its derivative is not."""
    (student,) = new_students(settings_of("first", "sgd"))
    forward = student.network.body.forward
    monkeypatch.setattr(student.network.body, "forward", lambda images: forward(images) + student.network.body.linear.bias.sqrt())
    student.step(lesson(0), TRAIN, 0, NUM_STEPS)
    assert student.stopped is not None
    assert student.stopped.detail.startswith("the gradient is not finite at step 0")
    assert student.network.body.linear.bias.tolist() == [0.0] * 10


class WorkerOne(LocalWorker):
    """The second of two, whose gradients nobody averages."""

    rank = 1


class TestDraws:
    """What dropout draws."""

    def student(self, name: str = "first", seed: int = 0, initial: int = 0) -> Student:
        torch.manual_seed(initial)
        body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 10))
        network = Classifier(body, Preprocessing(image_size=SIZE))
        return Student(settings_of(name, "adamw"), network, CPU, global_batch=8, seed=seed)

    def trained(self, student: Student, steps: int = 2) -> dict[str, torch.Tensor]:
        train([student], 0, steps)
        return everything([student])

    def test_four_steps_are_two_and_a_restart_and_two(self, tmp_path: Path) -> None:
        whole, begun, resumed = self.student(), self.student(), self.student(initial=99)
        expected = self.trained(whole, 4)
        train([begun], 0, 2)
        save_students(tmp_path / "students", [begun], {"epoch": 0, "step": 2})
        torch.manual_seed(5)  # as another process
        restore_students(tmp_path / "students", [resumed])
        train([resumed], 2, 4)
        assert_same(everything([resumed]), expected)

    def test_a_student_beside_it_changes_nothing_whether_it_trains_or_is_stopped(self) -> None:
        alone = self.trained(self.student())
        for stopped in (False, True):
            beside, student = self.student("beside"), self.student()
            for step in range(2):
                if not (stopped and step):
                    train([beside], step, step + 1)
                train([student], step, step + 1)
            assert_same(everything([student]), alone)

    def test_differ_between_steps_students_seeds_and_workers(self, tmp_path: Path) -> None:
        def gradient(step: int, student: Student) -> bytes:
            """Of the same weights on the same batch."""
            student.step(lesson(0), TRAIN, step, NUM_STEPS)
            return bytes(student.optimizer.state_dict()["state"][0]["exp_avg"].numpy().tobytes())

        other_worker = self.student()
        other_worker.join(WorkerOne(tmp_path, device=CPU))
        found = [gradient(0, self.student()), gradient(1, self.student()), gradient(0, self.student("second"))]
        found += [gradient(0, self.student(seed=1)), gradient(0, other_worker)]
        assert len(set(found)) == len(found)
        assert gradient(0, self.student()) == found[0]


def test_tied_weights_are_averaged_once_a_step_and_kept(tmp_path: Path) -> None:
    def student(seed: int) -> Student:
        torch.manual_seed(seed)
        tied = torch.nn.Linear(3 * SIZE**2, 3 * SIZE**2, bias=False)
        again = torch.nn.Linear(3 * SIZE**2, 3 * SIZE**2, bias=False)
        again.weight = tied.weight
        body = torch.nn.Sequential(torch.nn.Flatten(), tied, again, torch.nn.Linear(3 * SIZE**2, 10))
        wanted = settings_of("first", "sgd").replace(ema_decay=0.9)
        return Student(wanted, Classifier(body, Preprocessing(image_size=SIZE)), CPU, global_batch=8, seed=0)

    one, resumed = student(0), student(99)
    seen = []
    for step in range(2):
        train([one], step, step + 1)
        seen.append(one.network.body[1].weight.detach().clone())
    decay = 2 / 11
    average = one.judged.state_dict()
    torch.testing.assert_close(average["body.1.weight"], decay * seen[0] + (1 - decay) * seen[1])
    save_students(tmp_path / "students", [one], {"epoch": 0, "step": 2})
    restore_students(tmp_path / "students", [resumed])
    assert_same(everything([resumed]), everything([one]))
    assert_same(resumed.judged.state_dict(), average)
    save_checkpoint(tmp_path / "kept", average, {})
    assert_same(load_checkpoint(tmp_path / "kept").weights, average)


class TestAveragedWeights:
    def test_against_a_slow_loop_in_float64(self) -> None:
        """Weights and batch-norm statistics; the counters are those of the network."""
        (student,) = new_students(settings_of("first", "sgd").replace(ema_decay=0.3))
        assert student.averaged is not None
        expected: dict[str, torch.Tensor] = {}
        for step in range(NUM_STEPS):
            student.step(lesson(step), TRAIN, step, NUM_STEPS)
            decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0
            for name, tensor in student.network.state_dict().items():
                old = expected.get(name, torch.zeros(()))
                expected[name] = decay * old + (1 - decay) * tensor.double() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in student.judged.state_dict().items():
            torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(student.judged.body.linear.weight, student.network.body.linear.weight)
        assert not student.judged.training

    def test_goes_on_after_a_restart(self, tmp_path: Path) -> None:
        wanted = settings_of("first", "adamw").replace(ema_decay=0.9)
        whole, begun, resumed = (new_students(wanted, seed=seed) for seed in (0, 0, 99))
        train(whole, 0, 4)
        train(begun, 0, 2)
        save_students(tmp_path / "students", begun, {"epoch": 0, "step": 2})
        restore_students(tmp_path / "students", resumed)
        train(resumed, 2, 4)
        assert_same(whole[0].judged.state_dict(), resumed[0].judged.state_dict())
        assert_same(everything(whole), everything(resumed))

    def test_a_checkpoint_without_them_is_refused(self, tmp_path: Path) -> None:
        save_students(tmp_path / "students", new_students(settings_of("first", "sgd")), {"epoch": 0, "step": 0})
        with pytest.raises(CheckpointError, match=r"the averaged weights of student first in .* belongs to another network"):
            restore_students(tmp_path / "students", new_students(settings_of("first", "sgd").replace(ema_decay=0.9)))


def test_what_is_saved_is_what_was_there_when_it_was_prepared(tmp_path: Path) -> None:
    students = new_students(settings_of("first", "adamw").replace(ema_decay=0.9))
    train(students, 0, 2)
    progress: dict[str, Any] = {"epoch": 0, "step": 2, "epochs": [{"epoch": 1}]}
    before, write = everything(students), prepare_students(students, progress)
    train(students, 2, 4)
    progress["epochs"].append({"epoch": 2})
    write(tmp_path / "students")
    resumed = new_students(settings_of("first", "adamw").replace(ema_decay=0.9), seed=99)
    assert restore_students(tmp_path / "students", resumed)["epochs"] == [{"epoch": 1}]
    assert_same(everything(resumed), before)


def mlp() -> Classifier:
    """So few kernels that compiling them to C++ takes seconds."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    return Classifier(body, Preprocessing(image_size=SIZE))


class TestCompiled:
    def check(self, plain: Student, compiled: Student, backend: str, folder: Path) -> None:
        compiled.join(LocalWorker(folder, device=CPU), backend)
        train([plain], 0, 2)
        train([compiled], 0, 2)
        for name, tensor in plain.network.state_dict().items():
            torch.testing.assert_close(compiled.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
        assert compiled.trained is not compiled.network
        save_students(folder / "students", [compiled], {"epoch": 0, "step": 2})
        names = load_checkpoint(folder / "students").weights
        assert [name for name in names if "_orig_mod" in name] == []
        assert len(names) == 2 * len(plain.network.state_dict())

    def test_learns_the_same_and_leaves_no_trace_in_the_checkpoint(self, tmp_path: Path) -> None:
        wanted = settings_of("first", "sgd")
        self.check(*new_students(wanted), *new_students(wanted.replace(ema_decay=0.9)), "aot_eager", tmp_path)

    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own use of it
    def test_to_cpp(self, tmp_path: Path) -> None:
        wanted = settings_of("first", "sgd")
        plain, compiled = (Student(w, mlp(), CPU, global_batch=8, seed=0) for w in (wanted, wanted.replace(ema_decay=0.9)))
        self.check(plain, compiled, "inductor", tmp_path)

    def test_a_backend_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        (student,) = new_students(settings_of("first", "sgd"))
        with pytest.raises(ConfigError, match=r"train\.compile_backend 'inducter' is none of torch\.compile's: .*inductor"):
            student.join(LocalWorker(tmp_path, device=CPU), "inducter")


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ([settings_of("first", "sgd")], "holds the students first, second, not first"),
        ([settings_of("first", "sgd"), settings_of("third", "sgd")], "holds the students first, second, not first, third"),
        ([settings_of("first", "sgd"), settings_of("second", "adamw", depth=18)], "student second in .* belongs to another network"),
    ],
    ids=["fewer", "another name", "another network"],
)
def test_a_checkpoint_of_other_students_is_refused(tmp_path: Path, wanted: list[StudentSettings], complaint: str) -> None:
    save_students(tmp_path / "students", new_students(), {"epoch": 0, "step": 0})
    with pytest.raises(CheckpointError, match=complaint):
        restore_students(tmp_path / "students", new_students(*wanted))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.safetensors", flip_a_byte),
        ("weights.safetensors", cut),
        ("weights.safetensors", Path.unlink),
        ("state.pt", flip_a_byte),
        ("state.pt", cut),
        ("state.pt", Path.unlink),
        ("manifest.json", cut),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str, damage: Callable[[Path], Any]) -> None:
    folder = tmp_path / "students"
    save_students(folder, new_students(settings_of("first", "sgd")), {"epoch": 0, "step": 0})
    damage(folder / name)
    with pytest.raises(CheckpointError):
        restore_students(folder, new_students(settings_of("first", "sgd")))


def test_saving_again_replaces_the_checkpoint_whole(tmp_path: Path) -> None:
    students = new_students(settings_of("first", "sgd"))
    for step in range(2):
        save_students(tmp_path / "students", students, {"epoch": 0, "step": step})
    assert restore_students(tmp_path / "students", students)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["students"]
    save_checkpoint(tmp_path / "other", {}, {"kind": "other"})
    assert load_checkpoint(tmp_path / "students").manifest["kind"] == "students"
