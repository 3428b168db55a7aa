"""Teachers from elsewhere: each way ends in a folder that says of a crop what the original network says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.config import validate
from distill.errors import BadInput, CheckpointError, ConfigError, ParityError, SourceError
from distill.models.arch_names import parse_arch
from distill.models.classifier import Classifier, build_classifier
from distill.models.saved_classifier import ClassifierCard, load_classifier, save_classifier
from distill.teacher_info import Preprocessing
from export.fingerprint import read_teacher_info
from export.imports import adopt_teacher, import_onnx, is_teacher_of_ours, num_weights, onnx_preprocessing
from export.parity_images import parity_crops
from export.settings import ImportSettings, StatedPreprocessing, TeacherExportSettings, usual_crop_ratio
from export.torch_imports import import_checkpoint, import_torch

SIZE = 16
CLASSES = ("ant", "bee", "cat")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
STATED = StatedPreprocessing(mean=MEAN, std=STD)
ARCH = "resnet10-x0.125-cifar"


class Body(nn.Module):
    """float [B,3,16,16] -> logits [B,3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, len(CLASSES))
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.layers(images_BCHW)


class Uint8Body(Body):
    """uint8 [B,3,16,16] -> logits [B,3]: normalises by itself."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return self.layers((images_BCHW.float() / 255 - mean) / std)


def written(kind: type[Body], path: Path, example: Tensor) -> tuple[Body, Path]:
    """A network as a stranger would export it."""
    torch.manual_seed(1)
    network = kind().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=["pixels"],
            external_data=False,
            verbose=False,
        )
    return network, path


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Body, Path]:
    return written(Body, tmp_path_factory.mktemp("float") / "float.onnx", torch.zeros(2, 3, SIZE, SIZE))


@pytest.fixture(scope="module")
def uint8_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Body, Path]:
    return written(Uint8Body, tmp_path_factory.mktemp("uint8") / "uint8.onnx", torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8))


@pytest.fixture
def photos(tmp_path: Path, crops: npt.NDArray[np.uint8]) -> Path:
    """Five pictures, in two folders."""
    folder = tmp_path / "photos"
    for number in range(5):
        path = folder / f"{'ab'[number % 2]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crops[number]).resize((20, 24)).save(path)
    return folder


def teacher_logits(model: Path, crops: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    temperature = np.ones((len(crops), 1), dtype=np.float32)
    return ort.InferenceSession(model).run(["logits"], {"images": crops, "temperature": temperature})[0]


def import_here(model: Path, folder: Path, stated: StatedPreprocessing, crops: npt.NDArray[np.uint8], ids: list[str]) -> Preprocessing:
    preprocessing = onnx_preprocessing(model, stated)
    import_onnx(model, folder, preprocessing, CLASSES, crops, ids, TeacherExportSettings(name="first"))
    return preprocessing


class TestOnnx:
    def test_floats(self, float_model: tuple[Body, Path], crops: npt.NDArray[np.uint8], image_ids: list[str], tmp_path: Path) -> None:
        network, path = float_model
        seen = import_here(path, tmp_path / "teacher", STATED, crops, image_ids)
        assert seen == Preprocessing(image_size=SIZE, mean=MEAN, std=STD, crop_ratio=1.0)
        normalised = ((crops / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32).transpose(0, 3, 1, 2)
        expected = network(torch.from_numpy(normalised)).detach().numpy()
        np.testing.assert_allclose(teacher_logits(tmp_path / "teacher" / "model.onnx", crops), expected, rtol=0, atol=1e-4)
        assert num_weights(path) >= sum(p.numel() for p in network.parameters())

    def test_uint8(self, uint8_model: tuple[Body, Path], crops: npt.NDArray[np.uint8], image_ids: list[str], tmp_path: Path) -> None:
        network, path = uint8_model
        seen = import_here(path, tmp_path / "teacher", StatedPreprocessing(), crops, image_ids)
        assert seen == Preprocessing(image_size=SIZE, crop_ratio=1.0)
        expected = network(torch.from_numpy(crops.transpose(0, 3, 1, 2).copy())).detach().numpy()
        np.testing.assert_allclose(teacher_logits(tmp_path / "teacher" / "model.onnx", crops), expected, rtol=0, atol=1e-4)

    def test_the_precision_is_that_of_the_weights(self, crops: npt.NDArray[np.uint8], image_ids: list[str], tmp_path: Path) -> None:
        """A network in fp16 says its logits with fp16's digits, which no fp32 limit allows."""
        source = tmp_path / "half.onnx"
        torch.manual_seed(3)
        network = Body().half().eval()
        with torch.no_grad():
            network.layers[-1].weight *= 30
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporter, about itself
            torch.onnx.export(
                network,
                (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float16),),
                source,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n")},),
                external_data=False,
                verbose=False,
            )
        seen = onnx_preprocessing(source, STATED)
        info = import_onnx(source, tmp_path / "t", seen, CLASSES, crops[:3], image_ids[:3], TeacherExportSettings(name="half"))
        assert info.precision == "fp16"
        report = json.loads((tmp_path / "t" / "parity.json").read_text())
        assert (report["precision"], report["num_images"]) == ("fp16", 3)
        assert report["max_logit_error"] > TeacherExportSettings(precision="fp32").limits.max_logit_error
        for asked in ("fp32", "int8"):
            with pytest.raises(ConfigError, match=rf"half\.onnx has weights in fp16, so precision {asked} cannot be had from it"):
                import_onnx(source, tmp_path / "u", seen, CLASSES, crops, image_ids, TeacherExportSettings(precision=asked))

    def test_floats_without_mean_and_std_are_not_guessed(self, float_model: tuple[Body, Path]) -> None:
        for stated in (StatedPreprocessing(), StatedPreprocessing(mean=MEAN), StatedPreprocessing(std=STD)):
            with pytest.raises(ConfigError, match=r"float\.onnx takes floats, so it needs the mean and std"):
                onnx_preprocessing(float_model[1], stated)

    def test_a_size_that_the_file_does_not_tell_is_asked_for(self, float_model: tuple[Body, Path], tmp_path: Path) -> None:
        model = onnx.load(float_model[1])
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_param = "side"
        onnx.save(model, tmp_path / "any.onnx")
        with pytest.raises(ConfigError, match="say the size it was trained on with --image-size"):
            onnx_preprocessing(tmp_path / "any.onnx", STATED)
        assert onnx_preprocessing(tmp_path / "any.onnx", STATED.replace(image_size=96)).image_size == 96

    @pytest.mark.parametrize("class_names", [("ant", "bee"), ("ant", "bee", "cat", "dog")])
    def test_class_lists_of_another_length(
        self,
        float_model: tuple[Body, Path],
        crops: npt.NDArray[np.uint8],
        image_ids: list[str],
        tmp_path: Path,
        class_names: tuple[str, ...],
    ) -> None:
        seen = onnx_preprocessing(float_model[1], STATED)
        with pytest.raises(ConfigError, match=f"float.onnx gives 3 logits a crop, but {len(class_names)} class names are given"):
            import_onnx(float_model[1], tmp_path, seen, class_names, crops, image_ids, TeacherExportSettings())
        assert list(tmp_path.iterdir()) == []

    def test_no_classifier_of_images(self, tmp_path: Path) -> None:
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 3, SIZE, SIZE)) for name in ("left", "right")]
        outputs = [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ("n", 3, SIZE, SIZE))]
        graph = helper.make_graph([helper.make_node("Add", ["left", "right"], ["sum"])], "two", inputs, outputs)
        onnx.save(helper.make_model(graph), tmp_path / "two.onnx")
        with pytest.raises(ConfigError, match=r"two\.onnx has 2 inputs"):
            onnx_preprocessing(tmp_path / "two.onnx", STATED)
        (tmp_path / "text.onnx").write_text("no protobuf")
        with pytest.raises(BadInput, match="cannot be read as an ONNX model"):
            onnx_preprocessing(tmp_path / "text.onnx", STATED)


class TestAdoptedTeacher:
    @pytest.fixture
    def teacher(self, uint8_model: tuple[Body, Path], crops: npt.NDArray[np.uint8], image_ids: list[str], tmp_path: Path) -> Path:
        import_here(uint8_model[1], tmp_path / "imported", StatedPreprocessing(), crops, image_ids)
        return tmp_path / "imported"

    @pytest.mark.parametrize("inside", ["", "model.onnx"])
    def test_it_is_the_same_teacher_under_the_name_of_the_run(self, teacher: Path, tmp_path: Path, inside: str) -> None:
        before = read_teacher_info(teacher / "model.onnx")
        settings = TeacherExportSettings(name="second", default_temperature=3)
        adopted = adopt_teacher(teacher / inside, tmp_path / "run", CLASSES, SIZE, settings)
        assert read_teacher_info(tmp_path / "run" / "model.onnx") == adopted
        assert adopted == before.replace(name="second", default_temperature=3)
        assert (tmp_path / "run" / "parity.json").read_bytes() == (teacher / "parity.json").read_bytes()

    @pytest.mark.parametrize("report", [None, "no json", "[]", {"failures": ["x"]}, {"fingerprint": "f" * 64}, {"fingerprint": ""}])
    def test_it_must_have_passed_the_gate(self, teacher: Path, tmp_path: Path, report: str | dict[str, object] | None) -> None:
        path = teacher / "parity.json"
        passed = json.loads(path.read_text())
        path.unlink()
        if report is not None:
            path.write_text(report if isinstance(report, str) else json.dumps({**passed, **report}))
        with pytest.raises(ParityError, match=r"beside .*model\.onnx no parity\.json says that teacher [0-9a-f]{12} passed"):
            adopt_teacher(teacher, tmp_path / "run", CLASSES, SIZE, TeacherExportSettings())
        assert not (tmp_path / "run").exists()

    def test_ours_and_others_are_told_apart(self, teacher: Path, float_model: tuple[Body, Path]) -> None:
        assert is_teacher_of_ours(teacher)
        assert is_teacher_of_ours(teacher / "model.onnx")
        assert not is_teacher_of_ours(float_model[1])

    @pytest.mark.parametrize(
        ("class_names", "size", "said"),
        [
            (("ant", "bee"), SIZE, "has 3 classes, the run has 2"),
            (("ant", "cat", "bee"), SIZE, "calls class 1 'bee', the run calls it 'cat'"),
            (CLASSES, 32, "sees crops of 16 pixels, data.image_size is 32"),
        ],
    )
    def test_it_must_fit_the_run(self, teacher: Path, tmp_path: Path, class_names: tuple[str, ...], size: int, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            adopt_teacher(teacher, tmp_path / "run", class_names, size, TeacherExportSettings())
        assert not (tmp_path / "run").exists()


class TestParityImages:
    SEEN = Preprocessing(image_size=SIZE, crop_ratio=0.875)

    def test_globs_and_folders(self, photos: Path) -> None:
        from distill.crops import center_crop, decode_image

        crops, names = parity_crops(str(photos / "*" / "*.png"), self.SEEN, 3)
        assert names == ["0.png", "2.png", "4.png"]
        data = (photos / "a" / "2.png").read_bytes()
        np.testing.assert_array_equal(crops[1], center_crop(decode_image(data), SIZE, 0.875))
        everything, ids = parity_crops(str(photos), self.SEEN, 100)
        assert (everything.shape, everything.dtype) == ((5, SIZE, SIZE, 3), np.uint8)
        assert ids == ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png"]

    def test_what_cannot_be_used_is_named(self, photos: Path) -> None:
        (photos / "a" / "1.png").write_bytes(b"no picture")
        with pytest.raises(SourceError, match=r"1.png cannot be used \(not an image\)"):
            parity_crops(str(photos), self.SEEN, 100)
        with pytest.raises(SourceError, match="no file matches"):
            parity_crops(str(photos / "*.jpg"), self.SEEN, 100)


class TestStateDictOfOurs:
    @pytest.fixture(params=[0, 1], ids=["plain", "from the middle of the head"])
    def network(self, request: pytest.FixtureRequest) -> Classifier:
        torch.manual_seed(2)
        network = build_classifier(parse_arch(ARCH), 3, Preprocessing(image_size=SIZE), num_head_layers=request.param)
        for tensor in network.parameters():  # the classifier starts at zero and blocks as the identity, which would hide a lost weight
            nn.init.normal_(tensor, std=0.3)
        return network.eval()

    @pytest.mark.parametrize("take", [lambda network: network, lambda network: network.body], ids=["whole", "body"])
    def test_it_says_what_it_said(
        self, network: Classifier, crops: npt.NDArray[np.uint8], tmp_path: Path, take: Callable[[Classifier], nn.Module]
    ) -> None:
        save_file(take(network).state_dict(), tmp_path / "w.safetensors")
        card = import_torch(tmp_path / "w.safetensors", ARCH, CLASSES, tmp_path / "checkpoint", StatedPreprocessing(image_size=SIZE))
        assert card.preprocessing == Preprocessing(image_size=SIZE)
        pixels = torch.from_numpy(crops[:4])
        with torch.inference_mode():
            torch.testing.assert_close(load_classifier(tmp_path / "checkpoint").network(pixels), network(pixels))

    @pytest.mark.parametrize(
        ("arch", "class_names", "error", "said"),
        [
            (ARCH, ("ant", "bee"), ConfigError, r"has 3 classes \(body.linear.weight\), the class list has 2: they must be equal"),
            (ARCH, ("ant",), ConfigError, "1 class names"),
            ("resnet18-x0.125-cifar", CLASSES, CheckpointError, r"another network \(missing: body.backbone.groups.0.1"),
            ("resnet10-x0.25-cifar", CLASSES, CheckpointError, "other shape: body.backbone"),
            ("resnet10-x0.125", CLASSES, CheckpointError, "other shape: body.backbone.stem.0.weight"),
            ("resnet9", CLASSES, ConfigError, "9 is none of our depths"),
        ],
    )
    def test_another_network_or_class_list(
        self, network: Classifier, tmp_path: Path, arch: str, class_names: tuple[str, ...], error: type[Exception], said: str
    ) -> None:
        save_file(network.state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(error, match=said):
            import_torch(tmp_path / "w.safetensors", arch, class_names, tmp_path / "checkpoint")
        assert not (tmp_path / "checkpoint").exists()

    def test_names_of_torchvision_are_told_the_way(self, tmp_path: Path) -> None:
        save_file({"layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match="use --arch timm:resnet50"):
            import_torch(tmp_path / "w.safetensors", "resnet50", CLASSES, tmp_path / "checkpoint")

    def test_usual_preprocessing(self, network: Classifier, tmp_path: Path) -> None:
        save_file(network.state_dict(), tmp_path / "w.safetensors")
        card = import_torch(tmp_path / "w.safetensors", ARCH, CLASSES, tmp_path / "checkpoint")
        assert card.preprocessing == Preprocessing(image_size=32, crop_ratio=1.0)
        assert (usual_crop_ratio(32), usual_crop_ratio(33), usual_crop_ratio(224)) == (1.0, 0.875, 0.875)


class TestCheckpointOfOurs:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        """A folder as `distill import` makes it."""
        network = build_classifier(parse_arch(ARCH), 3, Preprocessing(image_size=SIZE))
        card = ClassifierCard(network=parse_arch(ARCH), class_names=CLASSES, preprocessing=Preprocessing(image_size=SIZE))
        save_classifier(tmp_path / "made" / "checkpoint", network, card)
        return tmp_path / "made"

    @pytest.mark.parametrize("inside", ["", "checkpoint"])
    def test_it_is_copied(self, made: Path, tmp_path: Path, inside: str) -> None:
        card = import_checkpoint(made / inside, tmp_path / "copy", CLASSES, SIZE)
        before, after = (load_classifier(folder) for folder in (made / "checkpoint", tmp_path / "copy"))
        assert before.card == after.card == card
        for name, tensor in before.network.state_dict().items():
            assert torch.equal(after.network.state_dict()[name], tensor)

    @pytest.mark.parametrize(
        ("class_names", "size", "said"),
        [
            (("ant", "bee"), SIZE, "has 3 classes, the run has 2"),
            (("cat", "bee", "ant"), SIZE, "calls class 0 'ant', the run calls it 'cat'"),
            (CLASSES, 224, "sees crops of 16 pixels, data.image_size is 224"),
        ],
    )
    def test_it_must_fit_the_run(self, made: Path, tmp_path: Path, class_names: tuple[str, ...], size: int, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            import_checkpoint(made, tmp_path / "copy", class_names, size)
        assert not (tmp_path / "copy").exists()

    def test_folders_of_another_kind(self, made: Path, tmp_path: Path) -> None:
        (tmp_path / "onnx").mkdir()
        (tmp_path / "onnx" / "model.onnx").touch()
        with pytest.raises(CheckpointError, match="take it with kind: onnx"):
            import_checkpoint(tmp_path / "onnx", tmp_path / "copy", CLASSES, SIZE)
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
            import_checkpoint(tmp_path / "nowhere", tmp_path / "copy", CLASSES, SIZE)


class TestSettings:
    @pytest.mark.parametrize(
        ("tree", "said"),
        [
            ({"kind": "torch", "path": "w.pth"}, "arch is needed with kind: torch"),
            ({"kind": "timm", "path": "w.pth"}, "timm_name is needed with kind: timm"),
            ({"kind": "onnx"}, "path is needed with kind: onnx"),
            ({"kind": "simclr", "path": ""}, "path: String should have at least 1 character"),
            (
                {"kind": "onnx", "path": "m.onnx", "use_ema": True},
                "use_ema is for kind simclr or timm or torch, not for onnx; leave it out",
            ),
            ({"kind": "timm", "timm_name": "resnet18", "classifier_after": 0}, "classifier_after is for kind simclr"),
            ({"kind": "checkpoint", "path": "x", "logits": "scores"}, "logits is for kind onnx"),
            ({"kind": "torch", "path": "w.pth", "arch": "resnet51"}, "51 is none of our depths"),
            ({"kind": "tensorflow", "path": "x"}, "'simclr', 'timm', 'torch', 'onnx' or 'checkpoint'"),
        ],
    )
    def test_refused(self, tree: dict[str, object], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            validate(ImportSettings, tree, "run.yaml")

    def test_one_spelling_names_one_network(self) -> None:
        """Two spellings of a network must not make a finished stage anew."""
        settings = ImportSettings(kind="torch", path="w.pth", arch="resnet50-x1.0-sk0.0625")
        assert settings.arch == "resnet50-sk"

    @pytest.mark.parametrize(
        ("stated", "said"),
        [
            ({"mean": (123.7, 116.3, 103.5)}, "mean: .* not on the scale 0 to 1; divide numbers of the scale 0 to 255 by 255"),
            ({"std": (1, 0, 1)}, "std: .* not above 0"),
            ({"image_size": 0}, "image_size: .*greater than or equal to 1"),
            ({"crop_ratio": 1.5}, "crop_ratio: .*less than or equal to 1"),
        ],
    )
    def test_preprocessing_that_cannot_be(self, stated: dict[str, object], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            validate(StatedPreprocessing, stated, "import")
