"""What is trained on what: the two cases, and everything that all arms of a case share, made once and kept in a cache.

    CACHE/CASE/
      images/train-000000.tar ... test-000000.tar      WebDataset shards, for us
      folders/train/CLASS/KEY.png ...                  the same encoded bytes, for the peers
      repository/                                      the teacher, through the project's own import and parity gate
      teacher.pth                                      the same weights, for teachers in torch
      answers.npz                                      what the teacher says of every crop that any arm trains on

Unit of data: one prepared case. Shapes: S steps, B images of a step, K classes.
"""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.distill import networks
from bench.distill.answers import Keys, Logits, key_of, save_answers
from distill.data_settings import DataSettings, ImagesSettings
from distill.loader import CropBatch, CropLoader
from distill.models.classifier import Classifier
from distill.models.settings import NetworkSettings
from distill.models.timm_networks import create_timm
from distill.optimizer_settings import OptimizerSettings
from distill.rejections import RejectionLog
from distill.sources import open_source
from distill.teacher_info import Preprocessing, TeacherInfo
from export.fingerprint import read_teacher_info
from export.settings import PARITY_OF, RepositorySettings, TeacherExportSettings
from export.teacher import export_teacher, publish_teacher
from student_trainer.job import TrainJob
from student_trainer.settings import StudentSettings, TrainSettings
from student_trainer.store import StoreIdentity
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.model_repository import served_model

TEACHER = "teacher"
LOOK_AHEAD = 12
"""Steps that a stream may be ahead of the student. There are images for so many more: the last steps measured have their full cost."""
SHARD_STEPS = 4
"""Steps whose images are one shard."""
NUM_TEST = 64

Rgb = tuple[float, float, float]
Encoded = tuple[str, bytes, int]
"""File ending, encoded image, class id."""


@dataclass(frozen=True)
class Case:
    """One teacher, one student, one set of images."""

    name: str
    teacher: str
    student: str
    """timm's names; bench/distill/networks.py adds two."""
    image_size: int
    num_classes: int
    batch: int
    steps: int
    """Steps of an arm whose teacher is elsewhere or was asked before, those of the warm-up included."""
    slow_steps: int
    """The same, where the teacher computes on the same cores."""
    warmup: int
    rounds: int
    learning_rate: float = 0.02
    crops_per_decode: int = 4
    num_students: int = 4
    """Of the arm with several."""
    shorter_side: int | None = None
    """Photographs are enlarged to this first; None leaves them."""
    device: str = "cpu"
    """Of student, embedded teacher and the peers. On a GPU the student computes in bf16 and the teacher in fp16."""
    mean: Rgb = field(default=networks.MEAN)
    std: Rgb = field(default=networks.STD)

    @property
    def num_steps(self) -> int:
        """S, of one epoch: those that are measured and what a stream may be ahead, in whole shards."""
        return -(-(max(self.steps, self.slow_steps) + LOOK_AHEAD) // SHARD_STEPS) * SHARD_STEPS

    @property
    def preprocessing(self) -> Preprocessing:
        """The same contract for teacher and student."""
        return Preprocessing(image_size=self.image_size, mean=self.mean, std=self.std)


CASES = {
    case.name: case
    for case in (
        Case("cifar", "cifar_resnet56", "cifar_resnet20", 32, 10, batch=128, steps=68, slow_steps=28, warmup=8, rounds=3),
        Case("photos", "resnet50", "mobilenetv3_small_100", 224, 1000, batch=32, steps=32, slow_steps=14, warmup=4, rounds=2),
        Case("large", "resnet50", "mobilenetv3_small_100", 224, 1000, 32, 32, 14, 4, rounds=2, shorter_side=375),
        Case("gpu", "resnet50", "resnet18", 224, 1000, batch=128, steps=80, slow_steps=80, warmup=16, rounds=2, device="cuda"),
    )
}
"""`large` is `photos` enlarged to about the size of ImageNet's files, which costs more decoding. `gpu` needs one."""


def quick(case: Case) -> Case:
    """As small as it can be, to see that all of it runs; its numbers mean nothing."""
    batch = 16 if case.device == "cpu" else 48  # what the gate of fp16 compares
    return Case(**{**vars(case), "batch": batch, "steps": 12, "slow_steps": 10, "warmup": 2, "rounds": 1, "num_students": 2})


@dataclass(frozen=True)
class Prepared:
    """A case with its files."""

    case: Case
    folder: Path
    threads: int

    def to_json(self) -> str:
        """For another process."""
        return json.dumps({"case": vars(self.case), "folder": str(self.folder.absolute()), "threads": self.threads})

    @classmethod
    def from_json(cls, text: str) -> Prepared:
        """The other way."""
        given = json.loads(text)
        rgb = {name: tuple(given["case"][name]) for name in ("mean", "std")}
        return cls(Case(**{**given["case"], **rgb}), Path(given["folder"]), given["threads"])

    @property
    def repository(self) -> Path:
        """Triton's model repository with the teacher."""
        return self.folder / f"repository-{self.threads}"

    @property
    def answers(self) -> Path:
        """See bench/distill/answers.py."""
        return self.folder / "answers.npz"

    @property
    def info(self) -> TeacherInfo:
        """Who the teacher is."""
        return read_teacher_info(served_model(self.repository, TEACHER))

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        return tuple(f"class {number}" for number in range(self.case.num_classes))

    @property
    def data(self) -> DataSettings:
        """The images, for our trainer."""
        train = ImagesSettings(path=str((self.folder / "images" / "train-*.tar").absolute()))
        test = ImagesSettings(path=str((self.folder / "images" / "test-*.tar").absolute()))
        return DataSettings(
            unlabelled=train,
            labelled=train,
            test=test,
            class_names=list(self.class_names),
            image_size=self.case.image_size,
            crop_ratio=1.0,
            mean=self.case.mean,
            std=self.case.std,
            num_threads=self.threads,
        )

    def train(self, num_students: int = 1, crops_per_decode: int = 1) -> TrainSettings:
        """One pass over the images; several crops a decode stand for as many passes, of which only the first is measured."""
        optimizer = OptimizerSettings(learning_rate=self.case.learning_rate)
        network = NetworkSettings(name=f"timm:{self.case.student}")
        students = [StudentSettings(name=f"student{n}", network=network, optimizer=optimizer) for n in range(num_students)]
        more = {"crops_per_decode": crops_per_decode} if crops_per_decode > 1 else {}
        return TrainSettings(
            students=students,
            epochs=crops_per_decode,
            num_views=crops_per_decode,
            global_batch=self.case.batch,
            precision="fp32" if self.case.device == "cpu" else "bf16",
            num_evaluations=1,
            control=False,
            **more,
        )

    def job(self, folder: Path, address: TeacherAddress | None, store: Path | None, train: TrainSettings) -> TrainJob:
        """What our trainer is told."""
        job = TrainJob(
            objective="distill",
            data=self.data,
            train=train,
            epochs=train.epochs,
            seed=0,
            class_names=self.class_names,
            rejected_path=str((folder / "rejected.jsonl").absolute()),
            teacher=address,
        )
        if address is None or store is None:
            return job
        identity = StoreIdentity(
            fingerprint=self.info.fingerprint,
            num_classes=self.case.num_classes,
            recipe=job.recipe,
            seed=job.seed,
            images=job.open_images().digest(),
        )
        return job.replace(store_folder=str(store.absolute()), store_identity=identity)

    @property
    def embedded(self) -> TeacherAddress:
        """The teacher in the asking process."""
        address = {"model": TEACHER, "repository": str(self.repository.absolute()), "device": self.case.device}
        return TeacherAddress.model_validate({**address, "num_threads": self.threads})

    def crops(self, crops_per_decode: int = 1) -> Iterator[CropBatch]:
        """The batches of the first epoch, made as our trainer makes them."""
        job = self.job(self.folder, None, None, self.train(crops_per_decode=crops_per_decode))
        images, views = job.open_images(), job.train.num_views
        with RejectionLog(Path(job.rejected_path), 0.01) as rejections:
            yield from CropLoader(images, job.recipe, job.loading(images), lambda e: (e % views,), rejections).epoch(0)


def prepare(case: Case, cache: Path, images: Path, weights: Path | None, threads: int) -> Prepared:
    """Make what is not there yet.

    Args:
        images: `cifar`: the folder that `bench.science.datasets` wrote; the others: a tar with train/CLASS/*.JPEG.
        weights: `cifar`: the teacher's, safetensors. Others have random weights: speed does not depend on them.
    """
    folder = cache / case.name
    folder.mkdir(parents=True, exist_ok=True)
    prepared = Prepared(case, folder, threads)
    if not (folder / "images" / "test-000000.tar").exists():
        _write_images(prepared, _cifar(images) if case.name == "cifar" else _photos(images, case.shorter_side))
    if not (prepared.repository / TEACHER / "config.pbtxt").exists():
        _export(prepared, weights)
    if not prepared.answers.exists():
        _ask_everything(prepared)
    return prepared


def _cifar(folder: Path) -> Iterator[Encoded]:
    source = open_source(str(folder / "train-*.tar"))
    for shard in range(len(source.shards)):
        for record in source.read_shard(shard):
            if record.label is None:
                raise ValueError(f"{record.image_id} in {folder} has no label; bench.science.datasets writes them")
            yield "png", record.data, record.label


def _photos(archive: Path, shorter_side: int | None) -> Iterator[Encoded]:
    """train/CLASS/*.JPEG, dealt out class by class; from the beginning again where that is not enough."""
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if name.startswith("train/") and name.endswith(".JPEG"))
        classes = sorted({name.split("/")[1] for name in names})
        files = [[name for name in names if name.split("/")[1] == class_name] for class_name in classes]
        for dealt in cycle(zip(*files, strict=False)):
            for label, name in enumerate(dealt):
                member = tar.extractfile(name)
                assert member is not None  # a regular file, by its name
                yield "jpg", _enlarged(member.read(), shorter_side), label


def _enlarged(jpeg: bytes, shorter_side: int | None) -> bytes:
    if shorter_side is None:
        return jpeg
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = shorter_side / min(image.size)
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_images(prepared: Prepared, images: Iterator[Encoded]) -> None:
    case = prepared.case
    per_shard = SHARD_STEPS * case.batch
    for shard in range(case.num_steps // SHARD_STEPS):
        _write_shard(prepared.folder, "train", shard, [next(images) for _ in range(per_shard)])
    _write_shard(prepared.folder, "test", 0, [next(images) for _ in range(NUM_TEST)])


def _write_shard(folder: Path, part: str, shard: int, images: list[Encoded]) -> None:
    (folder / "images").mkdir(exist_ok=True)
    with tarfile.open(folder / "images" / f"{part}-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (ending, data, label) in enumerate(images):
            key = f"{part}{shard:06d}-{number:05d}"
            for name, content in ((f"{key}.{ending}", data), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for_peers = folder / "folders" / part / f"{label:04d}"
            for_peers.mkdir(parents=True, exist_ok=True)
            (for_peers / f"{key}.{ending}").write_bytes(data)


def _export(prepared: Prepared, weights: Path | None) -> None:
    case, folder = prepared.case, prepared.folder
    torch.manual_seed(0)
    body = create_timm(case.teacher, case.num_classes).network
    if weights is not None:
        body.load_state_dict(load_file(weights))
    else:
        for module in body.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=2.0)  # else all labels would be alike, and uniform
    torch.save(body.state_dict(), folder / "teacher.pth")
    batch = next(prepared.crops())
    repository = RepositorySettings(intra_op_threads=prepared.threads)
    settings, count = TeacherExportSettings(name=TEACHER, num_parity_images=8, repository=repository), 8
    if case.device != "cpu":
        # Ranges are measured on some crops and the others compared. Random weights leave some crops between two classes.
        parity = PARITY_OF["fp16"].replace(min_top1_agreement=0.9)
        settings, count = settings.replace(precision="fp16", num_parity_images=48, parity=parity), 48
    crops, names = batch.crops_VBHWC[0][:count], batch.image_ids[:count]
    network = Classifier(body, case.preprocessing).eval()
    export_teacher(network, case.preprocessing, prepared.class_names, crops, names, folder / "teacher", settings)
    publish_teacher(folder / "teacher", prepared.repository, settings)


def _ask_everything(prepared: Prepared) -> None:
    asked = {number: asyncio.run(_ask(prepared, number)) for number in (1, prepared.case.crops_per_decode)}
    save_answers(prepared.answers, asked)


async def _ask(prepared: Prepared, crops_per_decode: int) -> tuple[Keys, Logits]:
    teacher = open_teacher(prepared.embedded)
    keys, logits = [], []
    for batch in prepared.crops(crops_per_decode):
        crops = batch.crops_VBHWC[0]
        keys.append([np.frombuffer(key_of(crop), np.uint8) for crop in crops])
        logits.append(await teacher.logits(np.ascontiguousarray(crops)))
    await teacher.close()
    return np.array(keys), np.stack(logits)
