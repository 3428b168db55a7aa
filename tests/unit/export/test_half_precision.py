"""fp16: what fits is in half precision, what overflows is found and stays, and the gate sees what a GPU would compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from export.graph import save_model
from export.half_precision import largest_magnitudes, to_half_precision
from export.parity import Reference, check_parity
from export.runners import OnnxRunner
from export.settings import PARITY_OF

LIMITS = PARITY_OF["fp16"]


def reference_of(model: onnx.ModelProto) -> Reference:
    runner = OnnxRunner.of_model(model, "fp32", "ONNX Runtime")
    return lambda crops_BHWC: runner(crops_BHWC, np.ones((len(crops_BHWC), 1), np.float32))[0]


def in_numpy(model: onnx.ModelProto, crops: np.ndarray) -> np.ndarray:
    """Logits by ONNX's own reference implementation, which really computes in fp16."""
    feed = {"images": crops, "temperature": np.ones((len(crops), 1), np.float32)}
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(model).run(["logits"], feed)[0]


def test_types_inside_and_outside(hand_made, crops, tmp_path: Path) -> None:
    half = to_half_precision(hand_made(), crops)
    save_model(half.model, tmp_path / "half.onnx")  # ONNX's checker infers every type
    types = {tensor.name: tensor.data_type for tensor in half.model.graph.initializer}
    assert {name: kind for name, kind in types.items() if "/" in name} == {
        "kernels/fp16": TensorProto.FLOAT16,
        "linear/fp16": TensorProto.FLOAT16,
        "bias/fp16": TensorProto.FLOAT16,
    }
    assert {name for name in types if "/" not in name} == {"scale"}, "fp32 twins of the weights must not stay in the file"
    outside = {value.name: value.type.tensor_type.elem_type for value in [*half.model.graph.input, *half.model.graph.output]}
    floats = dict.fromkeys(("temperature", "logits", "soft_labels"), TensorProto.FLOAT)
    assert outside == {"images": TensorProto.UINT8, **floats}
    assert half.kept_in_fp32 == ()


@pytest.mark.parametrize("loud", [False, True])
def test_it_says_what_fp32_says_in_both_forms(hand_made, loud_teacher, loud: bool, crops, image_ids) -> None:
    model = loud_teacher if loud else hand_made()
    half = to_half_precision(model, crops)
    for form in (half.model, half.as_rounded):
        report = check_parity(reference_of(model), OnnxRunner.of_model(form, "half", "x"), crops, image_ids, LIMITS)
        assert report.passed, report.failures
        assert report.max_logit_error is not None
        assert report.max_logit_error > 0, "nothing was rounded"


def test_layers_that_overflow_are_found_by_name_and_plain_fp16_fails(loud_teacher, crops, image_ids) -> None:
    model = loud_teacher
    plain = to_half_precision(model, crops, keep=())
    careful = to_half_precision(model, crops)
    assert careful.kept_in_fp32 == ("loud_2", "quiet_1")
    assert not np.isfinite(in_numpy(plain.model, crops[:4])).all()
    assert np.isfinite(in_numpy(careful.model, crops[:4])).all()
    report = check_parity(reference_of(model), OnnxRunner.of_model(plain.as_rounded, "plain", "x"), crops, image_ids, LIMITS)
    assert report.num_not_finite == len(crops)
    hidden = check_parity(reference_of(model), OnnxRunner.of_model(plain.model, "plain", "x"), crops, image_ids, LIMITS)
    assert hidden.num_not_finite == 0, "ONNX Runtime computes fp16 as fp16 here: the rounded form is not needed any more"


def test_the_rounded_form_is_what_fp16_gives(hand_made, loud_teacher, crops) -> None:
    for model in (hand_made(), loud_teacher):
        half = to_half_precision(model, crops[:8])
        rounded, _ = OnnxRunner.of_model(half.as_rounded, "rounded", "x")(crops[:8], np.ones((8, 1), np.float32))
        exact = in_numpy(model, crops[:8])
        error = np.abs(rounded - in_numpy(half.model, crops[:8])).max()
        # numpy also adds in fp16, which a GPU does not: the same within a few of its steps at this size of the logits.
        assert error <= 8 * np.spacing(np.float16(np.abs(exact).max()))


def test_no_cast_to_fp16_stands_between_two_kept_layers(loud_teacher, crops) -> None:
    careful = to_half_precision(loud_teacher, crops).model
    makers = {name: node for node in careful.graph.node for name in node.output}
    quiet = next(node for node in careful.graph.node if node.name == "quiet_1")
    assert makers[quiet.input[0]].name == "loud_2"


def test_weights_beyond_fp16_keep_their_layer(hand_made, crops) -> None:
    model = hand_made(
        [
            helper.make_node("Mul", ["features", "tiny"], ["less"], name="shrink"),
            helper.make_node("Mul", ["less", "huge"], ["seen"], name="grow"),
        ],
        {"tiny": 1e-3, "huge": 1e5},
    )
    assert to_half_precision(model, crops).kept_in_fp32 == ("grow",)


def test_magnitudes_are_those_of_the_crops(hand_made, crops) -> None:
    magnitudes = largest_magnitudes(hand_made(), crops[:9])
    assert magnitudes["scaled"] == pytest.approx(crops[:9].max() / 255, rel=1e-6)
    assert magnitudes["temperature"] == 1


def test_what_a_branch_reads_by_name_stays_in_fp32(hand_made, crops, image_ids) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["features"], ["chosen"], name="inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)],
    )
    flag = helper.make_node("Constant", [], ["flag"], name="flag", value=helper.make_tensor("", TensorProto.BOOL, [], [True]))
    model = hand_made([flag, helper.make_node("If", ["flag"], ["seen"], name="choose", then_branch=branch, else_branch=branch)])
    half = to_half_precision(model, crops)
    onnx.checker.check_model(half.model, full_check=True)
    assert check_parity(reference_of(model), OnnxRunner.of_model(half.model, "half", "x"), crops, image_ids, LIMITS).passed
