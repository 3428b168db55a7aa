"""From a finished training to bundles, by the verbs: the stages before are records, the student is real and was never trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from distill.cli import student_cards, verbs
from distill.cli.main import run_command
from distill.cli.reporting import gather
from distill.cli.run import Run
from distill.cli.run_crops import crops_of_test_images
from distill.cli.run_file import read_run_file
from distill.errors import ConfigError, SourceError, StageMissing
from distill.models.classifier import build_classifier
from distill.models.saved_classifier import ClassifierCard, save_classifier
from distill.models.settings import NetworkSettings
from export.card import StudentCard
from export.edge import read_edge_report

NETWORK = {"name": "resnet", "depth": 10, "width_multiplier": 0.125, "stem": "cifar"}
FINGERPRINT = "ab" * 32
EDGE = {
    "latency_rounds": 1, "latency_repeats": 5, "num_parity_images": 8, "num_calibration_images": 8, "peak_memory": False,
    "quantised_training": {"when": "always", "steps": 2},
    "gate": {"max_latency_ratio": 1000, "max_size_ratio": 1000, "max_accuracy_drop": 1},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose training is finished."""
    folder = tmp_path_factory.mktemp("edge")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    data = {name: {"path": str(folder / "images")} for name in ("unlabelled", "labelled", "test")}
    train = {"students": [{"name": "small", "network": NETWORK}], "global_batch": 4, "num_views": 1, "epochs": 2, "control": False}
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump({"run_dir": str(folder / "run"), "data": {**data, "image_size": 8}, "train": train, "edge": EDGE})
    )  # fmt: skip
    run = Run(read_run_file(path, []))
    for stage, result in ((run.finetune, {}), (run.teacher, {"fingerprint": FINGERPRINT}), (run.train, {"stopped": {}})):
        stage.begin()
        stage.finish(result)
    torch.manual_seed(0)
    card = ClassifierCard(
        network=NetworkSettings.model_validate(NETWORK), class_names=run.class_names, preprocessing=run.file.data.preprocessing
    )
    network = build_classifier(card.network, 2, card.preprocessing)
    torch.nn.init.normal_(network.body.linear.weight)  # type: ignore[union-attr,arg-type]
    save_classifier(run.train.folder / "students" / "small", network, card)
    return path


def test_a_student_is_exported_with_its_card_bundled_and_verified(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert run_command(["export-student", "--config", str(config)]) == 0
    run = Run(read_run_file(config, []))
    folder = run.edge.folder / "small"
    report = read_edge_report(folder)
    result = run.edge.require()
    assert result["recommended"] == {"small": {"path": report.recommended, "why": report.why}}
    assert [file["path"] for file in result["files"]] == ["small.fp32.onnx", "small.fp16.onnx", "small.int8.onnx"]
    # The store is empty and nobody may be asked: it says so and goes on without.
    assert report.int8_notes[0].startswith("not fine-tuned for int8: labels that it wants are not in the store")
    card = StudentCard.model_validate_json((folder / "card.json").read_bytes())
    assert card.teacher == {"name": "teacher", "fingerprint": FINGERPRINT, "precision": "fp32", "top1": None}
    assert card.recipe["network"]["depth"] == 10
    assert card.recipe["temperature"] == 1.0
    assert [images.num_images for images in card.data] == [16, 16]
    assert card.numbers is None
    assert card.edge == report

    out = tmp_path / "out"
    assert run_command(["bundle", "make", "--config", str(config), "--out", str(out)]) == 0
    first = (out / "small.tar").read_bytes()
    assert run_command(["bundle", "make", "--config", str(config), "--out", str(out), "--student", "small"]) == 0
    assert (out / "small.tar").read_bytes() == first
    assert run_command(["bundle", "verify", str(out / "small.tar")]) == 0
    assert run_command(["bundle", "make", "--config", str(config), "--student", "large"]) == 2
    assert "no student large was exported; there are: small" in capsys.readouterr().err


def test_what_is_there_is_reused_and_what_is_of_other_settings_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(read_run_file(config, []))
    verbs.export_student(run)
    verbs.export_student(run)
    other = Run(read_run_file(config, ["edge.opset=21"]))
    with pytest.raises(StageMissing, match="made with other settings"):
        other.edge.require()
    with pytest.raises(StageMissing):  # a report wants an evaluation first
        gather(other)
    missing: dict[str, Any] = {"edge.formats": ["onnx", "openvino"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="openvino needs openvino, which is not installed"):
            verbs.export_student(Run(read_run_file(config, [f"edge.formats={json.dumps(missing['edge.formats'])}"])))
    assert run.edge.result() is not None  # nothing was moved aside


def test_test_images_without_labels_bring_none_and_a_mixture_is_refused(config: Path, tmp_path: Path) -> None:
    """Labels of -1 would make every file equally right: none at all."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in (config.parent / "images").rglob("*.png"):
        shutil.copyfile(image, flat / f"{image.parent.name}-{image.name}")
    crops, labels = crops_of_test_images(Run(read_run_file(config, [f"data.test.path={flat}"])))
    assert crops.shape == (16, 8, 8, 3)
    assert labels is None
    _, labels = crops_of_test_images(Run(read_run_file(config, [])))
    assert labels is not None
    assert sorted(labels) == [0] * 8 + [1] * 8
    rows = [{"image": {"bytes": image.read_bytes()}, "label": label} for image, label in zip(flat.iterdir(), [0, 1, -1] * 5, strict=False)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed.parquet")
    with pytest.raises(SourceError, match="5 of 15 test images have no label; the export needs all of them, or none"):
        crops_of_test_images(Run(read_run_file(config, [f"data.test.path={tmp_path / 'mixed.parquet'}"])))


def test_the_card_names_images_and_not_where_they_lay(config: Path) -> None:
    assert [images.path for images in student_cards._image_sets(Run(read_run_file(config, [])))] == ["images", "images"]
    shown = [student_cards._shown(path) for path in ("s3://bucket/photos", "file:///home/me/photos", "/home/me/photos/", "random")]
    assert shown == ["s3://bucket/photos", "photos", "photos", "random"]
    run = Run(read_run_file(config, ["train.images=labelled", "train.alpha=0.5", "data.label_fraction=0.25"]))
    unlabelled, _, labelled = student_cards._image_sets(run)
    assert (unlabelled.used_for, unlabelled.num_images) == ("int8 ranges", 16)
    assert labelled.used_for == "soft labels of the teacher, training, labels of the student"
    assert labelled.num_images == 4


def test_a_format_that_is_given_twice_and_a_name_that_is_a_folder_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match="openvino is given more than once"):
        read_run_file(config, ["edge.formats=[onnx, openvino, openvino]"])
    for name in ("..", ".", "-x", ".hidden"):
        with pytest.raises(ConfigError, match="name"):
            read_run_file(config, [f"train.students=[{{name: '{name}', network: {json.dumps(NETWORK)}}}]"])
