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
from collections.abc import Collection, Iterator, Mapping
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

_SAME_NUMBERS = ("DequantizeLinear", "QuantizeLinear", "Identity", "Transpose", "Reshape", "Cast")
"""Operators behind which stand the same weights, in the type that the file really holds."""

_QUANTIZER_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, TypeError, KeyError, AttributeError, AssertionError)
"""The last four come from operators that the quantiser does not know."""

_log = logging.getLogger(__name__)


class Quantizer:
    """One fp32 file, ready to be written as int8 again and again: prepared once, its ranges measured once.

    Args:
        fp32: a student or teacher file of ours.
        calibration_crops: uint8 [N,H,W,3], unlabelled; a few hundred are enough.
        folder: where what is prepared lies meanwhile; the caller removes it.
        float_logits: leave the logits, and what stands before and behind the network, in float. For a teacher.
        symmetric: int8 activations around zero and biases in float, the only form that TensorRT takes.
        way_out: what an error advises.

    Raises:
        DistillError: ONNX Runtime cannot prepare the graph.
    """

    def __init__(
        self,
        fp32: Path,
        calibration_crops: Crops,
        folder: Path,
        *,
        float_logits: bool = False,
        symmetric: bool = False,
        way_out: str = "set int8: false to export fp32 alone",
    ) -> None:
        self._name, self._way_out, self._crops = fp32.name, way_out, calibration_crops
        self._float_logits, self._symmetric = float_logits, symmetric
        self._prepared, self._ranges, self._quantised = (folder / name for name in ("prepared.onnx", "ranges.json", "quantised.onnx"))
        with self._translating():
            # onnxruntime's own inference of symbolic shapes does not know a Resize of two axes; ONNX's does.
            resizes = any(node.op_type == "Resize" for node in load_model(fp32).graph.node)
            # Shapes and fused layers, which the quantiser needs to place its scales.
            quant_pre_process(str(fp32), str(self._prepared), skip_symbolic_shape=resizes)
        self._model = load_model(self._prepared)
        name_nodes(self._model.graph)
        onnx.save(self._model, self._prepared)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that hold weights, in the order in which they run."""
        constants = {tensor.name for tensor in self._model.graph.initializer}
        return tuple(
            node.name for node in self._model.graph.node if node.op_type in WEIGHTED_OPERATORS and constants.intersection(node.input[1:2])
        )

    def write(self, int8: Path, *, keep_in_float: Collection[str] = (), reduce_range: bool = False) -> None:
        """Write the int8 form.

        Args:
            int8: the file to write; may be the fp32 file itself.
            keep_in_float: names of `layers`.
            reduce_range: 7-bit weights, for x86 processors without VNNI, whose 8-bit multiply-add saturates.

        Raises:
            DistillError: ONNX Runtime cannot quantise the graph.
        """
        outside = head_and_tail(self._model.graph) if self._float_logits else set()
        with self._translating():
            quantize_static(
                str(self._prepared),
                str(self._quantised),
                CropReader(self._crops, self._model),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QInt8 if self._symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=sorted({*outside, *keep_in_float}),
                extra_options={"ActivationSymmetric": True, "QuantizeBias": False} if self._symmetric else {},
                calibration_cache_path=self._ranges,
            )
        model = load_model(self._quantised)
        if self._float_logits:
            _leave_in_float(model.graph, LOGITS)
        _guard(model.graph, keep_in_float)
        strip_descriptions(model)
        save_model(model, int8)

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        with _quiet():
            try:
                yield
            except _QUANTIZER_ERRORS as error:
                raise DistillError(f"{self._name} cannot be quantised: {first_line(error)}; {self._way_out}") from error


def int8_weight_share(path: Path) -> float:
    """Share, by count, of the weights of convolutions and matrix products that are int8 in the file; 0 if it has none."""
    return weight_share(path, onnx.TensorProto.INT8)


def weight_share(path: Path, data_type: int) -> float:
    """Share, by count, of the weights of convolutions and matrix products that the file holds as this `onnx.TensorProto` type. What
    counts is the constant behind all rounding, casting and reordering; a weight computed in another way from constants is of no type."""
    graph = load_model(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {
        node.output[0]: value.t for node in graph.node if node.op_type == "Constant" for value in node.attribute if value.name == "value"
    }
    makers = {name: node for node in graph.node for name in node.output}
    computed = {value.name for value in graph.input} - tensors.keys()  # what depends on the crops: a product of two of them has no weights
    num_weights = num_of_type = 0
    for node in graph.node:
        if node.op_type in WEIGHTED_OPERATORS and node.input[1] not in computed:
            name = node.input[1]
            while name in makers and makers[name].op_type in _SAME_NUMBERS:
                name = makers[name].input[0]
            num_weights += sum(_num_elements(tensor) for tensor in _constants_behind(name, tensors, makers))
            num_of_type += _num_elements(tensors[name]) if name in tensors and tensors[name].data_type == data_type else 0
        if computed.intersection(node.input):
            computed.update(node.output)
    return num_of_type / num_weights if num_weights else 0.0


def _constants_behind(name: str, tensors: Mapping[str, onnx.TensorProto], makers: Mapping[str, onnx.NodeProto]) -> list[onnx.TensorProto]:
    """The constants that a weight is computed from: itself, mostly."""
    if name in tensors or name not in makers:
        return [tensors[name]] if name in tensors else []
    return [constant for source in makers[name].input for constant in _constants_behind(source, tensors, makers)]


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


def _guard(graph: onnx.GraphProto, layers: Collection[str]) -> None:
    """Let layers that stay in float be left so, in place: a sum of one summand before each.

    ONNX Runtime's optimiser WeightBiasQuantization takes a float layer between two quantised ones for one that was forgotten, and rounds
    its weights when the file is loaded, with a single scale: worse than if it had been quantised here. It looks for a DequantizeLinear
    right before the layer. (An Identity would be taken out before it looks.)
    """
    nodes = {node.name: node for node in graph.node}
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for name in layers:
        layer = nodes[name]
        if layer.input[0] in dequantised:
            guard = onnx.helper.make_node("Sum", [layer.input[0]], [f"{layer.input[0]}/for {name}"], name=f"float input of {name}")
            graph.node.insert(list(graph.node).index(layer), guard)
            layer.input[0] = guard.output[0]


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
