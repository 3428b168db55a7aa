"""What is compared, and with which settings: one `Setting` for each image set, and the arms that are trained on it.

README.md beside this file says how the settings were found, and which were not searched for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.science.stages import Made, Result, Stages
from distill.models.settings import NetworkSettings
from distill.optimizer_settings import OptimizerSettings
from distill.precision import Precision
from student_trainer.settings import StudentSettings, TrainSettings
from teacher_trainer.settings import FinetuneSettings, PretrainSettings

TEACHER = NetworkSettings(depth=18, width_multiplier=0.25, stem="cifar")
STUDENT = NetworkSettings(depth=10, width_multiplier=0.125, stem="cifar")
PRECISION: Precision = "fp32"
"""On every machine; convolutions of a GPU round their factors to TF32 all the same, as torch has it."""
IMAGE_SIZE = 32
"""Fashion-MNIST, 28 pixels wide, is enlarged to it."""


@dataclass(frozen=True)
class Setting:
    """How one image set is trained on."""

    num_images: int
    """Unlabelled images; the labelled ones are among them."""
    pretrain: PretrainSettings
    finetune: dict[float, FinetuneSettings]
    """Label fraction -> fine-tuning of the pretrained teacher."""
    supervised: dict[float, FinetuneSettings]
    """Label fraction -> the teacher's network from random weights."""
    supervised_student: dict[float, FinetuneSettings]
    """Label fraction -> the student's network from random weights."""
    distill_epochs: int
    self_distill_epochs: int
    min_area: float
    """Smallest share of an image that a crop of distillation covers."""


def sgd(rate: float, decay: float) -> OptimizerSettings:
    return OptimizerSettings(name="sgd", learning_rate=rate, weight_decay=decay, warmup_share=0.0)


def _supervised(epochs: int, rate: float, min_area: float, decay: float = 5e-4) -> FinetuneSettings:
    return _classifier(0, epochs, rate, min_area, decay)


def _finetune(epochs: int, rate: float, min_area: float, decay: float) -> FinetuneSettings:
    return _classifier(1, epochs, rate, min_area, decay)


def _classifier(num_head_layers: int, epochs: int, rate: float, min_area: float, decay: float) -> FinetuneSettings:
    return FinetuneSettings(
        num_head_layers=num_head_layers,
        epochs=epochs,
        global_batch=64,
        min_area=min_area,
        optimizer=sgd(rate, decay),
        precision=PRECISION,
    )


def _pretrain(epochs: int, temperature: float, min_area: float) -> PretrainSettings:
    return PretrainSettings(
        network=TEACHER,
        epochs=epochs,
        global_batch=256,
        contrastive_temperature=temperature,
        min_area=min_area,
        jitter_strength=0.5,
        blur_probability=0.0,
        optimizer=OptimizerSettings(name="adamw", learning_rate=0.005, weight_decay=1e-4),
        precision=PRECISION,
    )


LINEAR = FinetuneSettings(
    linear=True,
    epochs=60,
    global_batch=64,
    min_area=0.5,
    optimizer=OptimizerSettings(name="sgd", learning_rate=0.1, weight_decay=0.0),
    precision=PRECISION,
)

SETTINGS = {
    "fashion": Setting(
        num_images=12_000,
        pretrain=_pretrain(epochs=30, temperature=0.2, min_area=0.4),
        finetune={0.01: _finetune(100, 0.02, 0.5, 1e-4), 0.1: _finetune(60, 0.1, 0.5, 5e-3)},
        supervised={0.01: _supervised(300, 0.1, 0.5, 5e-3), 0.1: _supervised(120, 0.1, 0.5)},
        supervised_student={0.01: _supervised(300, 0.3, 0.5), 0.1: _supervised(120, 0.1, 0.5)},
        distill_epochs=30,
        self_distill_epochs=20,
        min_area=0.5,
    ),
    "cifar10": Setting(
        num_images=20_000,
        pretrain=_pretrain(epochs=40, temperature=0.2, min_area=0.3),
        finetune={0.01: _finetune(100, 0.02, 0.3, 1e-4), 0.1: _finetune(60, 0.1, 0.3, 5e-4)},
        supervised={0.01: _supervised(300, 0.1, 0.3), 0.1: _supervised(60, 0.1, 0.3)},
        supervised_student={0.01: _supervised(300, 0.1, 0.3), 0.1: _supervised(60, 0.1, 0.3)},
        distill_epochs=30,
        self_distill_epochs=20,
        min_area=0.3,
    ),
}


_RATES = {0.1: 0.01, 1.0: 0.1}
"""Temperature of distillation -> SGD's rate."""
VIEWS = 10
"""Different crops of each image in distillation; later epochs read the labels of the first ten."""


def self_training(setting: Setting, temperature: float = 0.1) -> TrainSettings:
    """The teacher's own network on its soft labels, at the paper's temperature or at 1."""
    return TrainSettings(
        students=[StudentSettings(name="self-distilled", network=TEACHER, optimizer=sgd(_RATES[temperature], 1e-4))],
        epochs=setting.self_distill_epochs,
        num_views=VIEWS,
        global_batch=128,
        min_area=setting.min_area,
        temperature=temperature,
        num_evaluations=1,
        control=False,
        precision=PRECISION,
    )


def small_training(setting: Setting, images: str = "unlabelled", alpha: float = 1.0, temperature: float = 1.0) -> TrainSettings:
    """The small network on a teacher's soft labels."""
    return TrainSettings.model_validate(
        {
            "students": [StudentSettings(name="small", network=STUDENT, optimizer=sgd(_RATES[temperature], 1e-4))],
            "images": images,
            "alpha": alpha,
            "epochs": setting.distill_epochs,
            "num_views": VIEWS,
            "global_batch": 128,
            "min_area": setting.min_area,
            "temperature": temperature,
            "num_evaluations": 1,
            "control": False,
            "precision": PRECISION,
        }
    )


class Arms:
    """The arms of one image set, seed and label fraction. An arm makes what it needs, once for all arms that need it."""

    def __init__(self, setting: Setting, stages: Stages, fraction: float) -> None:
        self.setting, self.stages, self.fraction = setting, stages, fraction

    def teacher_supervised(self) -> Result:
        """The teacher's network, from random weights, on the labels alone."""
        return self._scores(self.stages.classify(TEACHER, self.setting.supervised[self.fraction], self.fraction, None))

    def teacher_linear(self) -> Result:
        """Pretrained, frozen, under a linear classifier."""
        return self._scores(self.stages.classify(TEACHER, LINEAR, self.fraction, self._pretrained()))

    def teacher_finetuned(self) -> Result:
        """Pretrained, then fine-tuned from the first layer of the projection head."""
        return self._scores(self._finetuned())

    def teacher_self_distilled(self) -> Result:
        """The same network again, from random weights, on the fine-tuned teacher's soft labels of all images, at temperature 0.1."""
        return self._self_distilled().result["scores"]["self-distilled"]

    def teacher_self_distilled_at_1(self) -> Result:
        """The same at temperature 1, to see what the paper's temperature does here."""
        made = self.stages.distill(self.stages.serve(self._finetuned()), self_training(self.setting, 1.0), self.fraction)
        return made.result["scores"]["self-distilled"]

    def student_supervised(self) -> Result:
        """The small network, from random weights, on the labels alone."""
        return self._scores(self.stages.classify(STUDENT, self.setting.supervised_student[self.fraction], self.fraction, None))

    def student_labelled_only(self) -> Result:
        """The small network on the self-distilled teacher's soft labels of the labelled images alone, for as many steps as the next."""
        return self._student("labelled", alpha=1.0)

    def student_distilled(self) -> Result:
        """The small network on the self-distilled teacher's soft labels of all images."""
        return self._student("unlabelled", alpha=1.0)

    def student_mixed(self) -> Result:
        """As before, half of the loss being the cross-entropy on the labels."""
        return self._student("unlabelled", alpha=0.5)

    def student_at_teachers_temperature(self) -> Result:
        """The small network on the self-distilled teacher's soft labels at the temperature at which that one has learnt."""
        return self._student("unlabelled", alpha=1.0, temperature=0.1)

    def student_of_finetuned(self) -> Result:
        """The small network on the soft labels of the teacher that was fine-tuned only."""
        return self._taught(self.stages.serve(self._finetuned()))

    def student_of_self_distilled_at_1(self) -> Result:
        """The small network on the soft labels of the teacher that was self-distilled at temperature 1, which stayed calibrated."""
        made = self.stages.distill(self.stages.serve(self._finetuned()), self_training(self.setting, 1.0), self.fraction)
        return self._taught(self.stages.serve(made, student="self-distilled"))

    def _taught(self, served: Made) -> Result:
        return self.stages.distill(served, small_training(self.setting), self.fraction).result["scores"]["small"]

    def _pretrained(self) -> Made:
        return self.stages.pretrain(self.setting.pretrain)

    def _finetuned(self) -> Made:
        return self.stages.classify(TEACHER, self.setting.finetune[self.fraction], self.fraction, self._pretrained())

    def _self_distilled(self) -> Made:
        return self.stages.distill(self.stages.serve(self._finetuned()), self_training(self.setting), self.fraction)

    def _student(self, images: str, alpha: float, temperature: float = 1.0) -> Result:
        served = self.stages.serve(self._self_distilled(), student="self-distilled")
        train = small_training(self.setting, images, alpha, temperature)
        if images == "labelled":  # as many steps as with all images
            steps = train.epochs * (self.setting.num_images // train.global_batch)
            labelled = round(self.setting.num_images * self.fraction)
            train = train.replace(epochs=round(steps / max(1, labelled // min(train.global_batch, labelled))))
        return self.stages.distill(served, train, self.fraction).result["scores"]["small"]

    @staticmethod
    def _scores(made: Made) -> Result:
        return made.result["scores"]


ARMS: dict[str, Callable[[Arms], Result]] = {
    "teacher, supervised only": Arms.teacher_supervised,
    "teacher, pretrained, linear": Arms.teacher_linear,
    "teacher, pretrained + fine-tuned": Arms.teacher_finetuned,
    "teacher, + self-distilled": Arms.teacher_self_distilled,
    "teacher, + self-distilled at temperature 1": Arms.teacher_self_distilled_at_1,
    "student, supervised only": Arms.student_supervised,
    "student, distilled on labelled images only": Arms.student_labelled_only,
    "student, distilled on all images": Arms.student_distilled,
    "student, distilled + labels (alpha 0.5)": Arms.student_mixed,
    "student, distilled on all images at temperature 0.1": Arms.student_at_teachers_temperature,
    "student, distilled from the fine-tuned teacher": Arms.student_of_finetuned,
    "student, distilled from the teacher self-distilled at temperature 1": Arms.student_of_self_distilled_at_1,
}
"""Row of the table -> how it is made."""
