"""A teacher in each precision goes the whole way: graph, gate, report, fingerprint; and says the same in every process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from PIL import Image

from distill.config import validate
from distill.errors import ConfigError, DistillError, ParityError, StageMissing
from export.fingerprint import read_teacher_info
from export.parity import ParityReport, Reference, torch_reference
from export.quantize import Quantizer, int8_weight_share
from export.settings import PARITY_OF, RepositorySettings, TeacherExportSettings
from export.teacher import admit_teacher, publish_teacher
from export.teacher_precision import ROUNDED, set_precision, split_crops
from export.worst_images import picture_name

FP16 = TeacherExportSettings(name="tiny", precision="fp16", num_parity_images=40)
INT8 = FP16.replace(precision="int8")


@pytest.fixture
def admit(teacher_model: Path, network, preprocessing, class_names, crops, image_ids, tmp_path: Path):
    """admit(settings, reference=...): the exported graph through the gate, into tmp_path/teacher."""

    def run(settings: TeacherExportSettings, reference: Reference | None = None):
        path = tmp_path / "unchecked.onnx"
        path.write_bytes(teacher_model.read_bytes())
        folder = tmp_path / "teacher"
        folder.mkdir(exist_ok=True)
        reference = reference or torch_reference(network)
        return admit_teacher(path, folder, reference, preprocessing, class_names, crops, image_ids, settings)

    return run


def report_in(folder: Path, name: str = "parity.json") -> ParityReport:
    return ParityReport.model_validate_json((folder / name).read_text())


def test_fp16(admit, tmp_path: Path) -> None:
    info = admit(FP16)
    report = report_in(tmp_path / "teacher")
    assert (info.precision, report.precision, report.opset, report.num_images) == ("fp16", "fp16", 20, 40)
    assert report.engine.endswith(ROUNDED)
    assert report.limits == PARITY_OF["fp16"]
    session = ort.InferenceSession(tmp_path / "teacher" / "model.onnx")
    assert {value.name: value.type for value in [*session.get_inputs(), *session.get_outputs()]} == {
        "images": "tensor(uint8)",
        **dict.fromkeys(("temperature", "logits", "soft_labels"), "tensor(float)"),
    }
    assert read_teacher_info(tmp_path / "teacher" / "model.onnx") == info


@pytest.mark.parametrize("saturates", [False, True])
def test_where_8_bits_saturate_7_are_taken(saturates: bool, admit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without VNNI is played by weights that are cut off at half their range."""
    write = Quantizer.write

    def write_as_run(self: Quantizer, int8: Path, *, reduce_range: bool = False) -> None:
        write(self, int8, reduce_range=reduce_range)
        model = onnx.load(int8)
        for tensor in model.graph.initializer:
            if saturates and tensor.data_type == onnx.TensorProto.INT8:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).clip(-64, 63), tensor.name))
        onnx.save(model, int8)

    monkeypatch.setattr(Quantizer, "write", write_as_run)
    limits = {"max_logit_error": 1e-9, "max_kl": 9, "min_top1_agreement": 0} if saturates else None
    with pytest.raises(ParityError) if saturates else contextlib.nullcontext():
        admit(INT8.replace(parity=limits))
    report = report_in(tmp_path / "teacher", "parity-failed.json" if saturates else "parity.json")
    assert report.weight_bits == (7 if saturates else 8)


def test_int8(admit, network, crops, tmp_path: Path) -> None:
    info = admit(INT8)
    report, path = report_in(tmp_path / "teacher"), tmp_path / "teacher" / "model.onnx"
    assert (info.precision, report.precision) == ("int8", "int8")
    assert int8_weight_share(path) == 1.0
    feed = {"images": crops, "temperature": np.ones((len(crops), 1), np.float32)}
    logits_BK = ort.InferenceSession(path).run(["logits"], feed)[0]
    assert len(np.unique(logits_BK)) > 256, "the logits themselves were rounded to 8 bits"
    assert np.abs(logits_BK - torch_reference(network)(crops)).max() > 1e-3, "nothing was quantised"


def test_the_form_that_tensorrt_takes(teacher_model: Path, crops, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(teacher_model.read_bytes())
    repository = RepositorySettings(instance_kind="gpu", acceleration="tensorrt")
    set_precision(path, crops, INT8.replace(repository=repository))
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero_points = numpy_helper.to_array(constants[node.input[2]])
        assert zero_points.dtype == np.int8
        assert not zero_points.any()


def test_each_precision_has_its_limits_and_stated_ones_win() -> None:
    assert TeacherExportSettings().limits == PARITY_OF["fp32"]
    assert INT8.limits == PARITY_OF["int8"]
    fp16, int8 = PARITY_OF["fp16"], PARITY_OF["int8"]
    said = f"fp16 {fp16.max_logit_error:g} in a logit and 5e-4 in KL; int8 {int8.max_logit_error:g} and {int8.max_kl:g}"
    said += f", with an agreement of {int8.min_top1_agreement:g}"
    assert said in " ".join(str(TeacherExportSettings.model_fields["precision"].description).split())
    assert fp16.max_kl == 5e-4
    stated = validate(TeacherExportSettings, {"precision": "int8", "parity": {"max_kl": 0.25}}, "run.yaml")
    assert stated.limits == PARITY_OF["int8"].replace(max_kl=0.25)
    again = validate(TeacherExportSettings, stated.model_dump(mode="json"), "a copy")
    assert again == stated
    with pytest.raises(ConfigError, match="max_kll"):
        validate(TeacherExportSettings, {"parity": {"max_kll": 1}}, "run.yaml")


@pytest.mark.parametrize("settings", [FP16, INT8], ids=["fp16", "int8"])
def test_limits_that_it_cannot_keep_stop_it(admit, settings: TeacherExportSettings, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"teacher tiny does not say .*: logit error \S+ > 1e-06"):
        admit(settings.replace(parity=PARITY_OF["fp16"].replace(max_logit_error=1e-6)))
    assert report_in(tmp_path / "teacher", "parity-failed.json").precision == settings.precision


def test_a_failed_gate_leaves_the_repository_alone_and_shows_the_worst_images(admit, crops, image_ids, network, tmp_path: Path) -> None:
    folder, models = tmp_path / "teacher", tmp_path / "models"
    admit(FP16)
    publish_teacher(folder, models, FP16)
    (folder / "model.onnx").unlink()
    (folder / "parity.json").unlink()
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}

    def hates_three(crops_BHWC):
        logits_BK = torch_reference(network)(crops_BHWC).copy()
        for row, crop in enumerate(crops_BHWC):
            for number in (5, 17, 23):
                if (crop == crops[number]).all():
                    logits_BK[row] = np.nan if number == 17 else logits_BK[row] + number * np.arange(5)
        return logits_BK

    with pytest.raises(ParityError, match="NaN or infinite logits on 1 of 40 images") as caught:
        admit(FP16.replace(precision="fp32"), hates_three)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in folder.iterdir()) == ["parity-failed.json", "worst"]
    pictures = sorted(path.name for path in (folder / "worst").iterdir())
    assert pictures[:3] == ["1-image-017.png", "2-image-023.png", "3-image-005.png"]
    assert len(pictures) == 8
    np.testing.assert_array_equal(np.array(Image.open(folder / "worst" / "2-image-023.png")), crops[23])
    worst = json.loads((folder / "parity-failed.json").read_text())["worst"]
    assert [(image["image_id"], image["row"]) for image in worst[:3]] == [("image-017", 17), ("image-023", 23), ("image-005", 5)]
    with pytest.raises(StageMissing):
        publish_teacher(folder, models, FP16)
    assert {path: path.read_bytes() for path in models.rglob("*") if path.is_file()} == before


def test_names_of_pictures_stay_in_their_folder() -> None:
    assert picture_name(1, "../../etc/passwd") == "1-.._.._etc_passwd.png"
    assert picture_name(2, "a b\0c:ü") == "2-a_b_c_.png"
    assert len(picture_name(3, "x" * 500)) < 100


def test_ranges_are_measured_on_other_crops_than_are_compared(crops) -> None:
    compared, measured_on = split_crops(crops, 40)
    np.testing.assert_array_equal(compared, crops[:40])
    np.testing.assert_array_equal(measured_on, crops[40:])
    compared, measured_on = split_crops(crops[:44], 40)
    np.testing.assert_array_equal(np.concatenate([compared, measured_on]), crops[:44], "none twice")
    assert (len(compared), len(measured_on)) == (36, 8)
    assert [len(part) for part in split_crops(crops[:60], 256)] == [48, 12]
    for few, num_compared in ((crops[:3], 256), (crops[:39], 256), (crops, 31)):
        with pytest.raises(ConfigError, match=rf"need 32 images to compare and 8 further ones .* of the {len(few)} here"):
            split_crops(few, num_compared)
    assert (TeacherExportSettings().num_crops, INT8.num_crops) == (256, 40 + 256)


def test_a_graph_that_cannot_be_quantised_names_the_way_out(teacher_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(teacher_model.read_bytes())
    with pytest.raises(DistillError, match=r"set teacher.precision to fp32 or fp16"):
        set_precision(path, np.zeros((8, 12, 12, 3), np.uint8), INT8)


def test_another_process_writes_the_same_bytes(teacher_model: Path, crops, tmp_path: Path) -> None:
    np.save(tmp_path / "crops.npy", crops)
    script = (
        "import sys; from pathlib import Path; import numpy as np; from export.teacher_precision import set_precision\n"
        "from export.settings import TeacherExportSettings\n"
        "for precision in ('fp16', 'int8'):\n"
        "    path = Path(sys.argv[2]) / f'{precision}.onnx'; path.write_bytes(Path(sys.argv[1]).read_bytes())\n"
        "    set_precision(path, np.load(sys.argv[3]), TeacherExportSettings(precision=precision))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[3])}
    (tmp_path / "there").mkdir()
    command = [sys.executable, "-c", script, teacher_model, tmp_path / "there", tmp_path / "crops.npy"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    for settings in (FP16, INT8):
        here = tmp_path / "here.onnx"
        here.write_bytes(teacher_model.read_bytes())
        set_precision(here, crops, settings)
        assert here.read_bytes() == (tmp_path / "there" / f"{settings.precision}.onnx").read_bytes(), settings.precision
