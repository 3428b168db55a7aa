"""fp32 file -> int8 file, of a student or a teacher: static quantisation with ONNX Runtime.

Unit of data: one file. Weights become int8, one scale a channel; activations uint8, their ranges measured on unlabelled crops. The file
holds QuantizeLinear/DequantizeLinear pairs (QDQ), which ONNX Runtime, TensorRT and most edge engines fuse. The crops still come in as uint8
and are normalised in float: that is a few operations a pixel, and quantising them would cost accuracy in the very first layer. A teacher's
logits leave the last layer in float as well: 256 steps over their whole range would be an error of its own in every label.

Measured on our ResNet-18 (width 0.5, 28 px, one thread with VNNI): uint8 activations take 0.35 of the fp32 latency, int8 activations 0.95.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from distill.errors import DistillError
from export.calibration import CropReader
from export.files import first_line
from export.fingerprint import load_model
from export.graph import LOGITS, save_model, strip_descriptions
from export.graph_regions import drop_unused_constants, head_and_tail, name_nodes
from export.label_space import Crops
from export.sessions import ORT_ERRORS

WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that hold nearly all weights of an image classifier: their second input."""

_QUANTIZER_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, TypeError, KeyError, AttributeError, AssertionError)
"""The last four come from operators that the quantiser does not know."""

_log = logging.getLogger(__name__)


def quantize_int8(
    fp32: Path,
    int8: Path,
    calibration_crops: Crops,
    *,
    reduce_range: bool = False,
    float_logits: bool = False,
    symmetric: bool = False,
    way_out: str = "set int8: false to export fp32 alone",
) -> None:
    """Write the int8 form of a file.

    Args:
        fp32: a student or teacher file of ours.
        int8: the file to write; may be the same.
        calibration_crops: uint8 [N,H,W,3], unlabelled; a few hundred are enough.
        reduce_range: 7-bit weights, for x86 processors without VNNI, whose 8-bit multiply-add saturates.
        float_logits: leave the logits, and what stands before and behind the network, in float. For a teacher.
        symmetric: int8 activations around zero and biases in float, the only form that TensorRT takes.
        way_out: what an error advises.

    Raises:
        DistillError: ONNX Runtime cannot quantise the graph.
    """
    activation_type = QuantType.QInt8 if symmetric else QuantType.QUInt8
    options = {"ActivationSymmetric": True, "QuantizeBias": False} if symmetric else {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        # Shapes and fused layers, which the quantiser needs to place its scales.
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        try:
            # onnxruntime's own inference of symbolic shapes does not know a Resize of two axes; ONNX's does.
            resizes = any(node.op_type == "Resize" for node in load_model(fp32).graph.node)
            quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=resizes)
            model = load_model(prepared)
            name_nodes(model.graph)
            onnx.save(model, prepared)
            quantize_static(
                str(prepared),
                str(quantised),
                CropReader(calibration_crops, model),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=activation_type,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=sorted(head_and_tail(model.graph)) if float_logits else [],
                extra_options=options,
            )
        except _QUANTIZER_ERRORS as error:
            raise DistillError(f"{fp32.name} cannot be quantised: {first_line(error)}; {way_out}") from error
        model = load_model(quantised)
    if float_logits:
        _leave_in_float(model.graph, LOGITS)
    strip_descriptions(model)
    save_model(model, int8)


def int8_weight_share(path: Path) -> float:
    """Share, by count, of the weights of convolutions and matrix products that are int8 in the file; 0 if it has none."""
    graph = load_model(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    # Behind a DequantizeLinear stands the tensor that the file really holds.
    held = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    num_weights = num_int8 = 0
    for node in graph.node:
        if node.op_type in WEIGHTED_OPERATORS and (tensor := tensors.get(held.get(node.input[1], node.input[1]))):
            size = _num_elements(tensor)
            num_weights += size
            num_int8 += size if tensor.data_type == onnx.TensorProto.INT8 else 0
    return num_int8 / num_weights if num_weights else 0.0


def _leave_in_float(graph: onnx.GraphProto, output: str) -> None:
    """Take out, in place, the pair of nodes that would round a graph output to 8 bits."""
    makers = {name: node for node in graph.node for name in node.output}
    dequantise = makers[output]
    if dequantise.op_type != "DequantizeLinear":
        return
    quantise = makers[dequantise.input[0]]
    makers[quantise.input[0]].output[:] = [output if name == quantise.input[0] else name for name in makers[quantise.input[0]].output]
    for node in (dequantise, quantise):
        graph.node.remove(node)
    drop_unused_constants(graph)


def _num_elements(tensor: onnx.TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser prints, and logs to the root logger; what it prints goes to our log."""
    spoken = io.StringIO()
    root_filter = _Not("quant_utils", "Please consider to run pre-processing", "is out-of-range for weight")
    logging.getLogger().addFilter(root_filter)
    try:
        with contextlib.redirect_stdout(spoken):
            yield
    finally:
        logging.getLogger().removeFilter(root_filter)
        for line in spoken.getvalue().splitlines():
            _log.debug("onnxruntime.quantization: %s", line)


class _Not(logging.Filter):
    """Drops the quantiser's advice to do what was just done."""

    def __init__(self, *phrases: str) -> None:
        super().__init__()
        self._phrases = phrases

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(phrase in record.getMessage() for phrase in self._phrases)
