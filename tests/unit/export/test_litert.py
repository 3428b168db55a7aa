"""What runs LiteRT files, quantises them, and looks into them, on a model that is put together by hand: the converter from torch, which
wants an environment of its own (docs/edge.md), is not needed. `test_packages.py` has the whole way, where it is installed.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torch import nn

from distill.errors import BadInput
from distill.teacher_info import Preprocessing
from export.edge import EdgeFile, StudentInfo
from export.gate import judge_files
from export.label_space import kl_divergence
from export.measured import MadeFile, TestSet, measure_files
from export.packages import Networks, Package
from export.runtimes import litert_runtime
from export.runtimes.runtime import load_runtime
from export.settings import Int8Gate, StudentExportSettings
from export.standalone import run_student

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed (extra checks)")
flatbuffers = pytest.importorskip("flatbuffers")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16
NUM_PIXELS = SIZE * SIZE * 3
NAMES = ("ant", "bee", "cat", "dog", "eel")
INFO = StudentInfo(
    name="flat", class_names=NAMES, preprocessing=Preprocessing(image_size=SIZE, crop_ratio=1.0, mean=(0, 0, 0), std=(1, 1, 1))
)
WEIGHTS_KP = np.random.default_rng(3).normal(0, 3e-4, (len(NAMES), NUM_PIXELS)).astype(np.float32)
WEIGHTS_KP *= np.float32([[1], [2], [4], [8], [16]])  # one scale for all would spoil the first
BIAS_K = np.float32([1, -1, 0, 2, -2])


def logits_in_numpy(crops_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return crops_BHWC.reshape(len(crops_BHWC), NUM_PIXELS).astype(np.float32) @ WEIGHTS_KP.T + BIAS_K


def linear_model() -> bytes:
    """images [1,16,16,3] -> Cast -> flat [1,768] -> FullyConnected -> logits [1,5]."""
    types, ops = schema.TensorType, schema.BuiltinOperator
    held = [np.int32([1, NUM_PIXELS]), WEIGHTS_KP, BIAS_K]
    tensors = [
        ("images", types.UINT8, (1, SIZE, SIZE, 3), 0),
        ("pixels", types.FLOAT32, (1, SIZE, SIZE, 3), 0),
        ("flat", types.FLOAT32, (1, NUM_PIXELS), 0),
        ("logits", types.FLOAT32, (1, len(NAMES)), 0),
        ("shape", types.INT32, (2,), 1),
        ("weights", types.FLOAT32, WEIGHTS_KP.shape, 2),
        ("bias", types.FLOAT32, BIAS_K.shape, 3),
    ]
    made = schema.ModelT(
        version=3,
        description="by hand",
        buffers=[schema.BufferT(), *(schema.BufferT(data=np.frombuffer(array.tobytes(), np.uint8)) for array in held)],
        operatorCodes=[
            schema.OperatorCodeT(builtinCode=op, deprecatedBuiltinCode=op) for op in (ops.CAST, ops.RESHAPE, ops.FULLY_CONNECTED)
        ],
        subgraphs=[
            schema.SubGraphT(
                tensors=[schema.TensorT(name=name, type=held, shape=shape, buffer=buffer) for name, held, shape, buffer in tensors],
                inputs=[0],
                outputs=[3],
                operators=[
                    schema.OperatorT(opcodeIndex=0, inputs=[0], outputs=[1]),
                    schema.OperatorT(opcodeIndex=1, inputs=[1, 4], outputs=[2]),
                    schema.OperatorT(
                        opcodeIndex=2,
                        inputs=[2, 5, 6],
                        outputs=[3],
                        builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions,
                        builtinOptions=schema.FullyConnectedOptionsT(),
                    ),
                ],
            )
        ],
        signatureDefs=[
            schema.SignatureDefT(
                signatureKey="serving_default",
                inputs=[schema.TensorMapT(name="images", tensorIndex=0)],
                outputs=[schema.TensorMapT(name="logits", tensorIndex=3)],
            )
        ],
    )
    builder = flatbuffers.Builder()
    builder.Finish(made.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.fixture
def package(calibration_crops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """What `convert` makes where torch's converter gives the model above."""
    pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed (extra checks)")
    monkeypatch.setattr(litert_runtime, "_converted", lambda network, image_size: linear_model())
    made = [
        MadeFile("fp32", tmp_path / "a.onnx"),
        MadeFile("fp16", tmp_path / "b.onnx"),
        MadeFile("int8", tmp_path / "c.onnx", training_steps=3),
    ]
    return litert_runtime.convert(Networks(nn.Identity(), nn.Identity()), made, calibration_crops, INFO, tmp_path)


def test_the_float_file_says_what_numpy_says(package: Package, crops) -> None:
    fp32, int8 = package.files
    assert [file.path.name for file in package.files] == ["flat.fp32.tflite", "flat.int8.tflite"]
    assert (fp32.training_steps, int8.training_steps) == (0, 3)
    logits_BK = fp32.open(num_threads=1)(crops)
    assert logits_BK.dtype == np.float32
    assert np.allclose(logits_BK, logits_in_numpy(crops), atol=1e-3)
    assert fp32.shares() == (0.0, 0.0)


def test_int8_has_a_scale_a_channel_and_gives_floats(package: Package, crops) -> None:
    from ai_edge_litert.interpreter import Interpreter

    int8 = package.files[1]
    logits_BK, expected_BK = int8.open(num_threads=1)(crops), logits_in_numpy(crops)
    assert logits_BK.dtype == np.float32
    assert kl_divergence(expected_BK, logits_BK).mean() < 0.05
    assert int8.shares() == (1.0, 0.0)
    assert int8.size_bytes < 0.5 * package.files[0].size_bytes
    (weights,) = (held for held in Interpreter(str(int8.path)).get_tensor_details() if tuple(held["shape"]) == WEIGHTS_KP.shape)
    assert weights["dtype"] is np.int8
    assert np.allclose(weights["quantization_parameters"]["scales"], abs(WEIGHTS_KP).max(axis=1) / 127, rtol=0.02)


def judged(files: tuple[MadeFile, ...], crops) -> list[EdgeFile]:
    settings = StudentExportSettings(latency_rounds=1, latency_repeats=5)
    measured = measure_files("flat", files, TestSet(crops, None, logits_in_numpy(crops)), settings)
    return judge_files(measured, Int8Gate(max_latency_ratio=1e6, max_accuracy_drop=1, max_size_ratio=1e6), 0.0, native=False)


def test_the_gate_measures_both_in_litert(package: Package, crops) -> None:
    fp32, int8 = judged(package.files, crops)
    assert fp32.kl < 1e-9
    assert (fp32.runtime, fp32.beside) == ("litert", {})
    assert fp32.peak_memory_bytes is not None
    assert int8.shipped
    assert load_runtime("litert").engine().startswith("LiteRT ")


def test_floats_under_the_name_int8_are_found(package: Package, monkeypatch: pytest.MonkeyPatch, calibration_crops, crops) -> None:
    fp32 = package.files[0]
    monkeypatch.setattr(litert_runtime, "_quantised", lambda model, crops: model)
    feigned = litert_runtime.convert(
        Networks(nn.Identity(), nn.Identity()), [MadeFile("int8", fp32.path)], calibration_crops, INFO, fp32.path.parent
    ).files
    verdict = judged((fp32, *feigned), crops)[1]
    assert not verdict.shipped
    assert "only 0% of its weights are int8" in verdict.reason


def test_the_program_needs_the_file_alone(package: Package, crops, tmp_path: Path) -> None:
    fp32 = package.files[0].path
    Image.fromarray(crops[0]).save(tmp_path / "crop.png")
    command = [sys.executable, str(run_student.__file__), str(fp32), str(tmp_path / "crop.png"), "--json"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert np.allclose(answer["logits"], logits_in_numpy(crops[:1])[0], atol=1e-3)
    assert tuple(answer["class_names"]) == NAMES
    with zipfile.ZipFile(fp32) as archive:
        assert StudentInfo.model_validate_json(archive.read(litert_runtime.INFO_MEMBER)) == INFO


def test_the_same_student_gives_the_same_bytes() -> None:
    with zipfile.ZipFile(io.BytesIO(litert_runtime._with_info(b"model", INFO))) as archive:
        (member,) = archive.infolist()
    assert member.date_time == (1980, 1, 1, 0, 0, 0)  # no time of writing


@pytest.mark.parametrize("length", [0, 1000])
def test_a_damaged_file_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "cut.tflite").write_bytes(linear_model()[:length])
    with pytest.raises(BadInput, match=r"cut\.tflite does not load in LiteRT"):
        litert_runtime.open_file(tmp_path / "cut.tflite", 1)
    with pytest.raises(BadInput, match=r"none\.tflite does not load in LiteRT"):
        litert_runtime.open_file(tmp_path / "none.tflite", 1)
