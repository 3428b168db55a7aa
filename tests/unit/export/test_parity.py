"""The gate passes what is equal and stops what is not: altered weights, a wrong mean, NaN, nothing to compare."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from distill.errors import BadInput, ParityError
from export.graph import save_model
from export.label_space import kl_divergence, softmax
from export.parity import ParityReport, check_parity, require_parity, torch_reference
from export.settings import ParityLimits

LIMITS = ParityLimits()


def test_an_equal_graph_passes(teacher_model: Path, network, crops, image_ids) -> None:
    report = check_parity(torch_reference(network), teacher_model, crops, image_ids, LIMITS, temperatures=(1.0, 4.0, 0.5), batch_size=13)
    assert report.passed, report.failures
    assert report.num_images == 64
    assert report.top1_agreement == 1.0
    assert report.max_logit_error is not None
    assert report.max_logit_error < 1e-4
    assert set(report.max_kl) == {"1", "4", "0.5"}
    assert ParityReport.model_validate_json(report.model_dump_json()) == report


def test_altered_weights_fail_and_name_the_worst_images(teacher_model: Path, network, crops, image_ids, tmp_path: Path) -> None:
    _alter(teacher_model, tmp_path / "altered.onnx", lambda weights: weights * 1.05)
    report = check_parity(torch_reference(network), tmp_path / "altered.onnx", crops, image_ids, LIMITS)
    with torch.inference_mode():
        reference = network(torch.from_numpy(crops)).numpy()
    assert not report.passed
    errors = [offender.kl for offender in report.worst]
    assert errors == sorted(errors, reverse=True)
    assert len(report.worst) == 8
    with pytest.raises(ParityError, match=r"teacher x does not say what the network says: logit error \S+ > 0\.001") as caught:
        require_parity(report, tmp_path, "teacher x")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "parity.json").exists()
    written = json.loads((tmp_path / "parity-failed.json").read_text())
    assert written["worst"][0]["image_id"] == report.worst[0].image_id
    assert report.worst[0].reference_class == reference[image_ids.index(report.worst[0].image_id)].argmax()


def test_a_wrong_mean_fails(teacher_model: Path, network, crops, image_ids) -> None:
    network.mean += 0.02
    report = check_parity(torch_reference(network), teacher_model, crops, image_ids, LIMITS)
    assert not report.passed


def test_nan_fails_and_is_counted(teacher_model: Path, network, crops, image_ids, tmp_path: Path) -> None:
    def says_nan_once(crops_BHWC):
        logits_BK = torch_reference(network)(crops_BHWC).copy()
        if (crops_BHWC[0] == crops[0]).all():
            logits_BK[3, 1] = np.nan
        return logits_BK

    generous = ParityLimits(max_logit_error=1e9, max_kl=1e9, min_top1_agreement=0, max_soft_label_error=1)
    report = check_parity(says_nan_once, teacher_model, crops, image_ids, generous, batch_size=16)
    assert report.num_not_finite == 1
    assert report.failures == ("NaN or infinite logits on 1 of 64 images",)
    assert report.worst[0].image_id == image_ids[3]
    assert report.worst[0].logit_error is None
    _alter(teacher_model, tmp_path / "nan.onnx", lambda weights: weights * np.float32(np.nan))
    all_nan = check_parity(torch_reference(network), tmp_path / "nan.onnx", crops, image_ids, generous)
    assert all_nan.num_not_finite == 64
    assert not all_nan.passed
    assert all_nan.max_logit_error is None


def test_soft_labels_at_another_temperature_fail(teacher_model: Path, network, crops, image_ids, tmp_path: Path) -> None:
    model = onnx.load(teacher_model)
    divide = next(node for node in model.graph.node if list(node.input) == ["logits", "temperature"])
    divide.op_type = "Mul"
    save_model(model, tmp_path / "warm.onnx")
    report = check_parity(torch_reference(network), tmp_path / "warm.onnx", crops, image_ids, LIMITS)
    assert report.failures
    assert all("softmax(logits / T)" in failure for failure in report.failures)


def test_nothing_compared_fails_and_bad_input_is_refused(teacher_model: Path, network, crops, image_ids) -> None:
    reference = torch_reference(network)
    assert not check_parity(reference, teacher_model, crops[:0], [], LIMITS).passed
    with pytest.raises(BadInput, match="64 crops but 3 image ids"):
        check_parity(reference, teacher_model, crops, image_ids[:3], LIMITS)
    with pytest.raises(BadInput, match="does not take crops of shape"):
        check_parity(reference, teacher_model, crops[:, :12], image_ids, LIMITS)
    with pytest.raises(BadInput, match="not of the same classes"):
        check_parity(lambda crops_BHWC: reference(crops_BHWC)[:, :4], teacher_model, crops, image_ids, LIMITS)


def test_kl_equals_the_slow_sum() -> None:
    generator = np.random.default_rng(0)
    reference, other = generator.normal(0, 5, (2, 6, 9))
    for temperature in (0.5, 1.0, 4.0):
        p, q = softmax(reference / temperature), softmax(other / temperature)
        slow = [sum(p[row, k] * np.log(p[row, k] / q[row, k]) for k in range(9)) for row in range(6)]
        np.testing.assert_allclose(kl_divergence(reference, other, temperature), slow, rtol=1e-9)
    assert (kl_divergence(reference, reference) == 0).all()


def _alter(source: Path, target: Path, change) -> None:
    model = onnx.load(source)
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, target)
