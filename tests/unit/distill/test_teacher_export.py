"""What `teacher.precision`, `teacher.input_size` and `teacher.top_outputs` do on their way through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from distill.cli import verbs
from distill.cli.main import run_command
from distill.cli.teacher_import import import_into
from distill.errors import ConfigError, ParityError
from distill.models.arch_names import parse_arch
from distill.models.classifier import build_classifier
from distill.models.saved_classifier import ClassifierCard, load_classifier, save_classifier
from distill.stages import Stage
from distill.teacher_info import Preprocessing
from export import teacher
from export.fingerprint import read_teacher_info
from export.settings import ImportSettings, TeacherExportSettings

ARCH = "resnet10-x0.125-cifar"
CLASSES = ("ant", "bee", "cat")
OWN, TRAVELS = Preprocessing(image_size=16), Preprocessing(image_size=24)


def make_crops(number: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage with a classifier of 16-pixel crops in it, whose logits are not all zero."""
    torch.manual_seed(0)
    network = build_classifier(parse_arch(ARCH), 3, OWN)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("origin")
    card = ClassifierCard(network=parse_arch(ARCH), class_names=CLASSES, preprocessing=OWN)
    save_classifier(folder / "checkpoint", network.eval(), card)
    save_file(network.state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture
def export(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The verb's work on a run that cuts crops of `size` pixels."""

    def run_it(settings: TeacherExportSettings, size: int) -> Any:
        run = SimpleNamespace(
            folder=tmp_path, repository=tmp_path / "models", file=SimpleNamespace(data=SimpleNamespace(image_size=size))
        )  # fmt: skip
        monkeypatch.setattr(verbs, "sample_crops", lambda run, count: (make_crops(count, size), [f"i{row}" for row in range(count)]))
        return verbs._export(run, Stage(tmp_path, "export-teacher", {}, {}), origin, "checkpoint", settings)  # type: ignore[arg-type]

    return run_it


SETTINGS = TeacherExportSettings(num_parity_images=32, num_calibration_images=8)


def test_a_run_exports_what_its_settings_say(export: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = export(SETTINGS.replace(precision="int8", input_size=24, top_outputs=2, parity={"max_kl": 9, "min_top1_agreement": 0}), 24)
    info = read_teacher_info(tmp_path / "models" / "teacher" / "1" / "model.onnx")
    assert (info.precision, info.top_outputs, info.preprocessing) == ("int8", 2, TRAVELS)
    assert (result["parity"]["num_images"], result["parity"]["opset"]) == (32, 20)
    assert "int8, opset 20, 32 images, max |dlogit|" in capsys.readouterr().out.replace("\n", " ")


def test_a_failed_gate_shows_the_table_and_touches_no_repository(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teacher, "torch_reference", lambda network: lambda crops_BHWC: np.zeros((len(crops_BHWC), 3)))
    with pytest.raises(ParityError) as caught:
        export(SETTINGS, 16)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "models").exists()
    said = capsys.readouterr().out
    assert "top-1 agreement" in said
    assert "worst images" in said
    assert len(list((tmp_path / "export-teacher" / "worst").glob("*.png"))) == 8


def test_a_ready_teacher_without_a_report_reaches_no_repository(export: Callable[..., Any], origin: Path, tmp_path: Path) -> None:
    export(SETTINGS, 16)
    made = tmp_path / "ready"
    made.mkdir()
    (made / "model.onnx").write_bytes((tmp_path / "export-teacher" / "model.onnx").read_bytes())
    run = SimpleNamespace(folder=tmp_path, repository=tmp_path / "others", file=SimpleNamespace(data=SimpleNamespace(image_size=16)))
    with pytest.raises(ParityError, match=r"no parity\.json in .*ready says that teacher [0-9a-f]{12} passed"):
        verbs._export(run, Stage(tmp_path, "again", {}, {}), made, "checkpoint", SETTINGS)  # type: ignore[arg-type]
    assert not (tmp_path / "others").exists()


def test_crops_of_another_size_name_the_setting(export: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"sees crops of 16 pixels, data.image_size is 24: .*teacher.input_size=24"):
        export(SETTINGS, 24)
    with pytest.raises(ConfigError, match=r"teacher.input_size is 20, data.image_size is 24"):
        export(SETTINGS.replace(input_size=20), 24)


@pytest.mark.parametrize("kind", ["checkpoint", "torch"])
def test_an_imported_network_keeps_its_own_size(origin: Path, tmp_path: Path, kind: str) -> None:
    given = (
        {"kind": "torch", "path": str(origin / "weights.safetensors"), "arch": ARCH}
        if kind == "torch"
        else {"kind": kind, "path": str(origin)}
    )
    settings = TeacherExportSettings(input_size=24)
    import_into(
        ImportSettings(**given),
        tmp_path,
        class_names=CLASSES,
        preprocessing=TRAVELS,
        teacher=settings,
        sample=lambda seen: pytest.fail("no"),
    )
    assert load_classifier(tmp_path / "checkpoint").card.preprocessing.image_size == (32 if kind == "torch" else 16)
    with pytest.raises(ConfigError, match=r"teacher.input_size is 24, data.image_size is 16"):
        import_into(
            ImportSettings(**given),
            tmp_path,
            class_names=CLASSES,
            preprocessing=OWN,
            teacher=settings,
            sample=lambda seen: pytest.fail("no"),
        )


def test_a_ready_onnx_by_the_command_and_by_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pooling_classifier(tmp_path / "ready.onnx")
    for number in range(40):
        Image.fromarray(make_crops(40, 40)[number]).save(tmp_path / f"{number}.png")
    images = str(tmp_path / "*.png")
    arguments = ["import", "onnx", str(model), "--classes", ",".join(CLASSES), "--images", images, "--out", str(tmp_path / "out")]
    options = ["--input-size", "24", "--precision", "fp16", "--top-outputs", "2"]
    assert run_command([*arguments, *options]) == 0, capsys.readouterr()
    said = read_teacher_info(tmp_path / "out" / "model.onnx")
    assert (said.preprocessing.image_size, said.precision, said.top_outputs) == (24, "fp16", 2)
    settings = TeacherExportSettings(input_size=24, precision="fp16", top_outputs=2, name=said.name)
    result = import_into(
        ImportSettings(kind="onnx", path=str(model)),
        tmp_path / "run",
        class_names=CLASSES,
        preprocessing=TRAVELS,
        teacher=settings,
        sample=lambda seen: (make_crops(40, seen.image_size), [str(row) for row in range(40)]),
    )
    assert result["fingerprint"] == said.fingerprint, "the same graph, whichever way it comes"


def pooling_classifier(path: Path) -> Path:
    """uint8 [n,3,16,16] -> mean of each channel -> linear -> logits [n,3]."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["floats"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "linear"], ["logits"]),
    ]
    linear = numpy_helper.from_array(np.array([[1, 0, -1], [0, 2, 0], [-1, 0, 1]], dtype=np.float32) / 100, "linear")
    values = [
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ("n", 3, 16, 16)),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", 3)),
    ]
    graph = helper.make_graph(nodes, "uint8", values[:1], values[1:], [linear])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
