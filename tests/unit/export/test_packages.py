"""Packages of other runtimes: each is run in its own runtime, says what the ONNX file says, and goes through the same gate.

Only what is installed is tested; none of them is part of the `dev` extra.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.errors import BadInput, ConfigError
from export.bundle import make_bundle
from export.card import ImageSet, StudentCard, limits_of
from export.edge import EdgeReport, read_edge_report
from export.packages import require_formats
from export.runtimes.runtime import load_runtime
from export.settings import EdgeFormat, Int8Gate, StudentExportSettings
from export.student import export_student

LENIENT = Int8Gate(max_latency_ratio=1e6, max_size_ratio=1e6, max_accuracy_drop=1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def export(network, preprocessing, class_names, calibration_crops, crops, tmp_path: Path) -> Any:
    def run(*formats: EdgeFormat) -> EdgeReport:
        settings = StudentExportSettings(formats=["onnx", *formats], fp16=False, latency_rounds=1, latency_repeats=5, gate=LENIENT)
        return export_student(network, "tiny", 16, class_names, preprocessing, calibration_crops, crops, None, tmp_path, settings)

    return run


def program_says(program: Path, model: Path, tmp_path: Path, crop: np.ndarray) -> dict[str, Any]:
    Image.fromarray(crop).save(tmp_path / "crop.png")
    command = [sys.executable, str(program), str(model), str(tmp_path / "crop.png"), "--json"]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return answer


CTRL_C = """
import os, signal, sys, threading
from pathlib import Path
import numpy as np
import openvino as ov
from export.runtimes import openvino_runtime
node = ov.opset13.relu(ov.opset13.parameter([1, 4], ov.Type.f32))
ov.save_model(ov.Model([node], [node.input_value(0).get_node()]), sys.argv[1])
held = [openvino_runtime.open_file(Path(sys.argv[1]), 1)]
held[0](np.zeros((1, 4), np.float32))
thread = threading.Thread(target=held.clear)  # as when its garbage is collected there
thread.start()
thread.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(30)
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_is_heard_after_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", CTRL_C, tmp_path / "m.xml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("openvino", "openvino"),
        ("executorch", "executorch, torchao"),
        ("litert", "litert_torch, ai_edge_quantizer, ai_edge_litert"),
        ("coreml", "coremltools"),
    ],
)
def test_what_is_not_installed_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, name: Any, needs: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = f"edge.formats: {name} needs {needs}, which is not installed: pip install -e '.[{name}]' in the checkout"
    with pytest.raises(ConfigError, match=re.escape(line)):
        require_formats(["onnx", name])


@pytest.mark.parametrize(
    ("name", "needs", "suffix", "beside"),
    [
        ("openvino", ("openvino",), "openvino.xml", 1),
        # Their libraries warn of their own changes as they are imported.
        pytest.param("executorch", ("executorch", "torchao"), "pte", 1, marks=pytest.mark.filterwarnings("ignore")),
        pytest.param("litert", ("litert_torch",), "tflite", 0, marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_a_package_says_what_the_onnx_file_says(
    export: Any, crops: np.ndarray, tmp_path: Path, name: Any, needs: Sequence[str], suffix: str, beside: int
) -> None:
    for package in needs:
        pytest.importorskip(package)
    report = export(name)
    fp32, int8 = report.files[2:]
    assert (fp32.runtime, fp32.path, int8.path) == (name, f"tiny.fp32.{suffix}", f"tiny.int8.{suffix}")
    assert fp32.kl < 1e-9
    assert fp32.int8_weight_share == 0.0
    assert int8.int8_weight_share > 0.9
    assert int8.agreement > 0.9
    assert len(fp32.beside) == beside
    assert fp32.size_bytes == sum((tmp_path / part).stat().st_size for part in (fp32.path, *fp32.beside))
    assert fp32.peak_memory_bytes is not None
    runtime = load_runtime(name)
    assert runtime.engine() in report.engine
    expected = runtime.open_file(tmp_path / fp32.path, 1)(crops[:1])[0]
    answer = program_says(tmp_path / "run_student.py", tmp_path / fp32.path, tmp_path, crops[0])
    assert np.allclose(answer["logits"], expected, atol=1e-4)
    assert tuple(answer["class_names"]) == report.student.class_names
    (tmp_path / "broken.xml").write_text("nothing")
    with pytest.raises(BadInput, match=r"broken\.xml does not load"):
        runtime.open_file(tmp_path / "broken.xml", 1)


def test_a_core_ml_package_is_said_to_be_unmeasured_and_goes_into_the_bundle(export: Any, tmp_path: Path) -> None:
    ct = pytest.importorskip("coremltools")
    report = export("coreml")
    (unmeasured,) = report.not_measured
    assert unmeasured.path == "tiny.fp16.mlpackage"
    assert "never run" in unmeasured.reason
    spec = ct.utils.load_spec(str(tmp_path / unmeasured.path))
    assert json.loads(spec.description.metadata.userDefined["distill.student"])["name"] == "tiny"
    assert [feature.name for feature in spec.description.input] == ["images"]
    assert [feature.name for feature in spec.description.output] == ["logits"]
    StudentCard(
        name="tiny", num_parameters=1, data=(ImageSet(used_for="x", path="x", num_images=1, content_digest="x"),),
        teacher={"name": "big", "fingerprint": "f" * 64}, recipe={}, numbers=None, edge=report, limits=limits_of(report, None),
    ).write(tmp_path)  # fmt: skip
    assert "not measured: Core ML runs on Apple" in (tmp_path / "card.md").read_text()
    manifest = make_bundle(tmp_path, tmp_path / "out" / "tiny.tar")
    assert set(unmeasured.files) < set(manifest.files)
    assert read_edge_report(tmp_path) == report
