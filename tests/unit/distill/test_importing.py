"""`distill import KIND`: from a command line to a folder that a run file takes, or to one line and nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from distill.cli import main as module
from distill.cli.import_report import describe, run_file_lines
from distill.cli.main import run_command
from distill.cli.teacher_import import import_into, import_into_new, teacher_digest
from distill.errors import CheckpointError, ConfigError, ParityError
from distill.models.arch_names import parse_arch
from distill.models.classifier import build_classifier
from distill.models.saved_classifier import ClassifierCard, load_classifier, save_classifier
from distill.teacher_info import Preprocessing
from export.fingerprint import read_teacher_info
from export.settings import ImportSettings, StatedPreprocessing, TeacherExportSettings

ARCH = "resnet10-x0.125-cifar"
CLASSES = ("ant", "bee", "cat")
SIZE = 16


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A state dict of `ARCH` with 3 classes."""
    torch.manual_seed(3)
    network = build_classifier(parse_arch(ARCH), len(CLASSES), Preprocessing(image_size=SIZE))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def uint8_onnx(tmp_path: Path) -> Path:
    """uint8 [n,3,16,16] -> mean of each channel -> linear -> logits [n,3]."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["floats"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "linear"], ["logits"]),
    ]
    linear = numpy_helper.from_array(np.array([[1, 0, -1], [0, 2, 0], [-1, 0, 1]], dtype=np.float32) / 100, "linear")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ("n", 3, SIZE, SIZE))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", 3))
    model = helper.make_model(helper.make_graph(nodes, "uint8", [pixels], [logits], [linear]), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "uint8.onnx")
    return tmp_path / "uint8.onnx"


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """A glob of three pictures."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return str(tmp_path / "photos" / "*.png")


def lines_for_a_run_file(said: str) -> Any:
    return yaml.safe_load(said.partition("In a run file:")[2])


def import_again(tree: Any, folder: Path) -> dict[str, Any]:
    """What a run does with the lines that `distill import` printed."""
    data = tree["data"]
    seen = Preprocessing(**{key: value for key, value in data.items() if key != "class_names"})
    settings = ImportSettings(**tree["import"])
    return import_into(
        settings,
        folder,
        class_names=data["class_names"],
        preprocessing=seen,
        teacher=TeacherExportSettings(name="in_run"),
        sample=lambda seen: pytest.fail("a teacher of ours passed the gate before"),
    )


class TestKinds:
    def test_torch(self, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "teachers" / "tiny"
        arguments = ["import", "torch", str(weights), "--arch", ARCH, "--out", str(out), "--classes", "ant,bee,cat"]
        assert run_command([*arguments, "--image-size", "16", "--mean", ".4,.5,.6", "--std", "0.2,.3,.25", "--crop-ratio", ".875"]) == 0
        saved = load_classifier(out / "checkpoint")
        seen = Preprocessing(image_size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), crop_ratio=0.875)
        assert (saved.card.class_names, saved.card.preprocessing) == (CLASSES, seen)
        said = capsys.readouterr().out
        num_parameters = sum(parameter.numel() for parameter in saved.network.parameters())
        for part in (ARCH, f"{num_parameters / 1e6:.2f} M", "3: ant, bee, cat", "16 pixels", str(out / "checkpoint")):
            assert part in said
        tree = lines_for_a_run_file(said)
        assert tree["import"] == {"kind": "checkpoint", "path": str(out)}
        again = import_again(tree, tmp_path / "run")
        assert again["num_parameters"] == num_parameters
        assert load_classifier(tmp_path / "run" / "checkpoint").card == saved.card

    def test_onnx(self, uint8_onnx: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "teacher"
        assert run_command(["import", "onnx", str(uint8_onnx), "--out", str(out), "--classes", "ant,bee,cat", "--images", photos]) == 0
        assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "parity.json", "worst"]
        assert json.loads((out / "parity.json").read_text())["num_images"] == 3
        info = read_teacher_info(out / "model.onnx")
        assert (info.class_names, info.preprocessing) == (CLASSES, Preprocessing(image_size=SIZE, crop_ratio=1.0))
        tree = lines_for_a_run_file(capsys.readouterr().out)
        assert tree["import"] == {"kind": "onnx", "path": str(out)}
        assert import_again(tree, tmp_path / "run")["fingerprint"] == info.fingerprint
        assert read_teacher_info(tmp_path / "run" / "model.onnx").name == "in_run"

    def test_timm_without_weights_says_that_they_are_random(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "teacher"
        arguments = ["import", "timm", "mobilenetv3_small_050", "--out", str(out), "--classes", "crane,bee,crane", "--image-size", "32"]
        assert run_command(arguments) == 0
        said = capsys.readouterr().out
        assert "random weights: no file was given, and nothing is downloaded" in said
        assert "1 names stand for more than one class: crane" in said
        assert load_classifier(out / "checkpoint").card.network.name == "timm:mobilenetv3_small_050"

    @pytest.mark.parametrize(
        ("options", "stem", "wanted"),
        [
            ([], "imagenet", {"image_size": 224, "crop_ratio": 0.875, "interpolation": "bicubic"}),
            ([], "cifar", {"image_size": 32, "crop_ratio": 1.0}),
            (["--image-size", "48", "--crop-ratio", "0.5"], "cifar", {"image_size": 48, "crop_ratio": 0.5}),
            (["--classifier-after", "0", "--ema"], "imagenet", {"classifier_after": 0, "use_ema": True, "take": "auto"}),
            (["--take", "classifier"], "imagenet", {"take": "classifier"}),
            (["--interpolation", "bilinear"], "imagenet", {"interpolation": "bilinear"}),
        ],
    )
    def test_simclr_options_reach_the_reader(
        self, options: list[str], stem: str, wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reader itself has its own tests; here it is a stand-in that writes what it was asked for."""
        asked: list[dict[str, Any]] = []

        def stand_in(path: Path, folder: Path, **given: Any) -> SimpleNamespace:
            asked.append({"path": path, **given})
            network = parse_arch(ARCH)
            names = tuple(given["class_names"])
            card = ClassifierCard(network=network, class_names=names, preprocessing=Preprocessing(image_size=given["image_size"]))
            save_classifier(folder / "checkpoint", build_classifier(network, len(names), card.preprocessing), card)
            return SimpleNamespace(
                stem=stem, network=network, num_classes=len(names), taken="classifier", describe=lambda: "a line\nanother"
            )

        monkeypatch.setattr("teacher_trainer.simclr_import.import_simclr", stand_in)
        out = tmp_path / "teacher"
        assert run_command(["import", "simclr", "model.ckpt-751", "--out", str(out), "--classes", "ant,bee,cat", *options]) == 0
        assert asked[-1]["path"] == Path("model.ckpt-751")
        assert asked[-1]["class_names"] == CLASSES
        assert wanted.items() <= asked[-1].items()
        assert load_classifier(out / "checkpoint").card.preprocessing.image_size == asked[-1]["image_size"]

    def test_a_pretrained_network_is_no_teacher_yet(self, tmp_path: Path) -> None:
        seen = {"image_size": 32, "crop_ratio": 1.0, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bicubic"}
        result = {"kind": "simclr", "made": "pretrained", "architecture": "resnet50", "num_parameters": 10**6}
        result |= {"class_names": [], "preprocessing": seen, "notes": ["fine-tune it"]}
        said = "\n".join(describe(result, tmp_path))
        assert "classes        none" in said
        assert str(tmp_path / "pretrained") in said
        tree = yaml.safe_load(run_file_lines(result, tmp_path))
        assert tree["import"] == {"kind": "checkpoint", "path": str(tmp_path / "pretrained")}
        assert tree["data"] == {"image_size": 32, "crop_ratio": 1.0, "interpolation": "bicubic"}


class TestNothingHalfWritten:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--classes", "ant,bee"], "has 3 classes (body.linear.weight), the class list has 2: they must be equal"),
            (["--classes", "nowhere.txt"], "classes 'nowhere.txt' is neither a file that exists nor a list"),
            (["--classes", "ant,bee,cat", "--mean", "1,2"], "'1,2' is not three numbers with commas between them"),
            (["--classes", "ant,bee,cat", "--mean", "123,117,104"], "divide numbers of the scale 0 to 255 by 255"),
            (["--classes", "ant,bee,cat", "--image-size", "4"], "image_size 4 is smaller than the network's total stride 8"),
            (["--classes", "ant,bee,cat", "--image-size", "0"], "greater than or equal to 1"),
            (["--classes", "ant,bee,cat", "--arch", "resnet51"], "51 is none of our depths"),
            (["--classes", "ant,bee,cat", "--arch", "resnet18"], "belongs to another network (missing: body.backbone"),
            (["--classes", "ant,bee,cat", "--ema"], "holds no averaged weights"),
            ([], "Missing option '--classes'"),
        ],
    )
    def test_torch(self, weights: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        before = sorted(tmp_path.rglob("*"))
        arguments = ["import", "torch", str(weights), "--arch", ARCH, "--out", str(tmp_path / "deep" / "teacher"), *options]
        assert run_command(arguments) == 2
        self.assert_one_line(capsys, said)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--classes", "ant,bee"], "gives 3 logits a crop, but 2 class names are given"),
            (["--mean", ".5,.5,.5", "--std", ".5,.5,.5"], "it normalises by itself"),
            (["--image-size", "32"], "check image_size"),
            (["--logits", "scores"], "has no tensor 'scores'"),
            (["--images", "nowhere/*.jpg"], "no file matches nowhere/*.jpg"),
        ],
    )
    def test_onnx(
        self, uint8_onnx: Path, photos: str, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = sorted(tmp_path.rglob("*"))
        usual = ["--classes", "ant,bee,cat", "--images", photos]
        assert run_command(["import", "onnx", str(uint8_onnx), "--out", str(tmp_path / "teacher"), *usual, *options]) == 2
        self.assert_one_line(capsys, said)
        assert sorted(tmp_path.rglob("*")) == before

    def test_files_that_are_not_there(self, tmp_path: Path, photos: str, capsys: pytest.CaptureFixture[str]) -> None:
        for kind, more, said in (
            ("torch", ["--arch", ARCH], "weights nowhere do not exist"),
            ("onnx", ["--images", photos], "nowhere does not exist"),
            ("simclr", [], "nowhere"),
        ):
            assert run_command(["import", kind, "nowhere", "--out", str(tmp_path / "x"), "--classes", "a,b", *more]) == 2
            self.assert_one_line(capsys, said)
        assert not (tmp_path / "x").exists()

    def test_a_folder_with_something_in_it_is_left_alone(self, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["import", "torch", str(weights), "--arch", ARCH, "--classes", "ant,bee,cat", "--out", str(tmp_path)]
        before = weights.read_bytes()
        assert run_command(arguments) == 2
        self.assert_one_line(capsys, "is not empty; choose another, or remove it first")
        assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
        assert weights.read_bytes() == before
        with pytest.raises(ConfigError, match="is not empty"):
            import_into_new(weights, lambda pending: pytest.fail("no work before the check"))
        with pytest.raises(ConfigError, match="cannot be made in"):
            import_into_new(weights / "below", lambda pending: pytest.fail("no work before the check"))

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert import_into_new(tmp_path / "out", lambda pending: {"wrote": (pending / "x").write_text("x")}) == {"wrote": 1}
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]

    def test_the_report_of_a_failed_gate_is_kept_beside(self, tmp_path: Path) -> None:
        def fail(pending: Path) -> dict[str, Any]:
            (pending / "parity-failed.json").write_text("{}")
            (pending / "worst").mkdir()
            (pending / "worst" / "1-x.png").touch()
            raise ParityError(f"the worst are in {pending / 'parity-failed.json'}")

        with pytest.raises(ParityError) as caught:
            import_into_new(tmp_path / "out", fail)
        said = f"the worst are in {tmp_path / 'out.parity.json'}; their pictures are in {tmp_path / 'out.worst'}"
        assert str(caught.value) == said
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["1-x.png", "out.parity.json", "out.worst"]

        def refuse(pending: Path) -> dict[str, Any]:
            raise ParityError("no report")

        with pytest.raises(ParityError, match=r"^no report$"):
            import_into_new(tmp_path / "another", refuse)

    @staticmethod
    def assert_one_line(capsys: pytest.CaptureFixture[str], said: str) -> None:
        spoken = capsys.readouterr()
        assert spoken.out == ""
        (line,) = spoken.err.strip().splitlines()
        assert said in line


class TestGroup:
    """Without a kind it is the verb that reads the run file, as ever."""

    @pytest.mark.parametrize(
        ("arguments", "ran"),
        [
            ([], (Path("recipes/quickstart.yaml"), False, ())),
            (["--config", "x.yaml", "--fresh", "import.kind=onnx"], (Path("x.yaml"), True, ("import.kind=onnx",))),
            (["import.path=onnx", "seed=1", "--config=x.yaml"], (Path("x.yaml"), False, ("import.path=onnx", "seed=1"))),
            (["--debug", "seed=1"], (Path("recipes/quickstart.yaml"), False, ("seed=1",))),
        ],
    )
    def test_run_file_form(self, arguments: list[str], ran: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[Any, ...]] = []
        monkeypatch.setattr(module, "_run_verb", lambda *given: seen.append(given))
        assert run_command(["import", *arguments]) == 0
        assert seen == [("import", *ran)]

    @pytest.mark.parametrize(("kind", "said"), [("simlcr", "did you mean 'simclr'?"), ("keras", "known are simclr, timm, torch, onnx")])
    def test_other_kinds(self, kind: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["import", kind, "x"]) == 2
        assert said in capsys.readouterr().err

    def test_help_names_the_kinds_and_each_has_its_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["import", "--help"]) == 0
        shown = capsys.readouterr().out
        for kind in ("simclr", "timm", "torch", "onnx"):
            assert f"\n  {kind} " in shown
            assert run_command(["import", kind, "--help"]) == 0
            assert "--classes" in capsys.readouterr().out
        assert "run-file" not in shown

    def test_help_of_a_kind_imports_nothing_heavy(self) -> None:
        code = """
import json, sys
from distill.cli.main import run_command
code = run_command(["import", "onnx", "--help"])
print(json.dumps([code, [name for name in ("torch", "pydantic", "numpy", "onnx", "rich") if name in sys.modules]]))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


class TestDigest:
    def test_it_is_that_of_the_weights(self, weights: Path, tmp_path: Path) -> None:
        settings = ImportSettings(kind="torch", path=str(weights), arch=ARCH)
        before = teacher_digest(settings)
        assert teacher_digest(settings) == before
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        assert teacher_digest(settings) != before
        with pytest.raises(ConfigError, match=r"import.path .*nowhere does not exist"):
            teacher_digest(ImportSettings(kind="onnx", path=str(tmp_path / "nowhere")))

    def test_folders_by_their_manifest(self, tmp_path: Path) -> None:
        settings = ImportSettings(kind="checkpoint", path=str(tmp_path))
        with pytest.raises(ConfigError, match="without a checkpoint"):
            teacher_digest(settings)
        digests = set()
        for place in ("pretrained", "checkpoint"):  # a classifier goes before a backbone: that is what is taken
            (tmp_path / place).mkdir()
            for text in (f'{{"{place}": 1}}', f'{{"{place}": 2}}'):
                (tmp_path / place / "manifest.json").write_text(text)
                digests.add(teacher_digest(settings))
        assert len(digests) == 4
        before = teacher_digest(settings.replace(take="pretrained"))
        (tmp_path / "pretrained" / "manifest.json").write_text("{}")
        assert teacher_digest(settings) in digests
        assert teacher_digest(settings.replace(take="pretrained")) != before

    def test_simclr_by_all_its_files(self, tmp_path: Path) -> None:
        settings = ImportSettings(kind="simclr", path=str(tmp_path / "model.ckpt-7"))
        with pytest.raises(CheckpointError):
            teacher_digest(settings)
        digests = set()
        for name, text in (("model.ckpt-7.index", "a"), ("model.ckpt-7.data-00000-of-00001", "b"), ("model.ckpt-70.index", "c")):
            (tmp_path / name).write_text(text)
            digests.add(teacher_digest(settings))
        assert len(digests) == 2


def test_class_names_must_be_known(weights: Path, tmp_path: Path) -> None:
    settings = ImportSettings(kind="torch", path=str(weights), arch=ARCH)
    with pytest.raises(ConfigError, match="class names are needed"):
        import_into(
            settings,
            tmp_path / "x",
            class_names=None,
            preprocessing=StatedPreprocessing(),
            teacher=TeacherExportSettings(),
            sample=lambda seen: pytest.fail("not for torch"),
        )
