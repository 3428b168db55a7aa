"""The students and their common checkpoint: going on is the same as never having stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.checkpoint import load_checkpoint, save_checkpoint
from distill.errors import CheckpointError, TeacherAnswerError
from distill.models.classifier import build_classifier
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings
from distill.teacher_info import Preprocessing
from student_trainer.loss import Lesson, distillation_loss
from student_trainer.settings import StudentSettings, TrainSettings
from student_trainer.students import Student, restore_students, save_students

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
        students.append(Student(settings, network, CPU, global_batch=8))
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
def test_a_loss_that_is_not_finite_is_refused_and_changes_no_weight(value: float) -> None:
    (student,) = new_students(settings_of("first", "sgd"))
    before = {name: parameter.clone() for name, parameter in student.network.named_parameters()}
    spoilt = lesson(0)
    assert spoilt.teacher_UK is not None
    spoilt.teacher_UK[0, 0] = value
    with pytest.raises(TeacherAnswerError, match="student first: the loss is nan at step 3; try a smaller learning_rate"):
        student.step(spoilt, TRAIN, 3, NUM_STEPS)
    assert_same(before, dict(student.network.named_parameters()))


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
