"""fp32 teacher graph -> fp16 teacher graph: the network's weights and arithmetic in half precision, what would overflow in fp32.

Unit of data: one graph. Head and tail (`export/graph_regions.py`) stay in fp32, and so do operators that are not known to be safe, and the
nodes that read or write a number beyond fp16's range on real crops. Between two such nodes the tensor stays in fp32 as well: the
converters of onnxruntime and onnxconverter-common cast behind every node, which turns exactly these tensors into infinities.

ONNX Runtime has no fp16 arithmetic on x86: it runs such a graph in fp32 and rounds the weights only, so that it shows neither an overflow
nor the rounding between layers. `as_rounded` therefore is a second graph, fp32 with a cast to fp16 and back behind every operator, which
does on any processor what a GPU does: multiply fp16 numbers, add in fp32, keep fp16. That is what the parity gate has to see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import MinMaxCalibrater

from distill.errors import DistillError
from export.calibration import CropReader
from export.files import first_line
from export.graph import save_model
from export.graph_regions import drop_unused_constants, float_tensors, head_and_tail, name_nodes, names_used, subgraphs
from export.label_space import Crops
from export.large_models import is_large
from export.sessions import ORT_ERRORS

LARGEST = float(np.finfo(np.float16).max)
"""65504."""
HEADROOM = 2.0
"""A number is taken for too large from this part of the range on: other images than the measured ones may go further."""

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp"}
_ACTIVATIONS = {
    "Relu",
    "LeakyRelu",
    "PRelu",
    "Elu",
    "Clip",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Mish",
    "Tanh",
    "Erf",
    "Gelu",
    "Softmax",
}
_NORMALISATIONS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization"}
_POOLING = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax"}
_MOVES = {
    "Concat",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Gather",
    "Expand",
    "Pad",
    "Identity",
    "Where",
}
_HALF_OPERATORS = frozenset(_WEIGHTED | _ARITHMETIC | _ACTIVATIONS | _NORMALISATIONS | _POOLING | _MOVES)
"""Operators that GPUs compute in fp16, all of whose float tensors may be of that type."""


@dataclass(frozen=True)
class HalfPrecision:
    """A teacher in fp16."""

    model: onnx.ModelProto
    """What is served."""
    as_rounded: onnx.ModelProto
    """The same numbers on any processor, for the parity gate: fp32 arithmetic, rounded to fp16 behind every operator."""
    kept_in_fp32: tuple[str, ...]
    """Nodes of the network that would have overflowed."""


def to_half_precision(model: onnx.ModelProto, crops_NHWC: Crops, *, keep: Iterable[str] | None = None) -> HalfPrecision:
    """Write a teacher graph in fp16. Inputs and outputs keep their types.

    Args:
        model: an fp32 teacher graph; it is not changed.
        crops_NHWC: uint8 [N,H,W,3], real crops that the ranges are measured on.
        keep: nodes to keep in fp32, in place of those that are found to overflow.

    Raises:
        DistillError: the graph does not run.
    """
    plain = inlined(model)
    name_nodes(plain.graph)
    overflowing = tuple(keep) if keep is not None else _overflowing(plain, largest_magnitudes(plain, crops_NHWC))
    kept = {*overflowing, *head_and_tail(plain.graph), *_never_half(plain.graph)}
    floats = float_tensors(plain)
    return HalfPrecision(
        model=_Converter(plain, kept, floats, rounds_only=False).convert(),
        as_rounded=_Converter(plain, kept, floats, rounds_only=True).convert(),
        kept_in_fp32=overflowing,
    )


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without functions of its own."""
    if model.functions:
        return onnx.inliner.inline_local_functions(model)
    plain = onnx.ModelProto()  # the inliner cannot take models over 2 GB
    plain.CopyFrom(model)
    return plain


def largest_magnitudes(model: onnx.ModelProto, crops_NHWC: Crops) -> dict[str, float]:
    """Tensor -> largest absolute value on these crops; not finite where the tensor was not.

    Raises:
        DistillError: the graph does not run on the crops.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        try:
            calibrator = MinMaxCalibrater(
                path, augmented_model_path=str(Path(folder) / "ranges.onnx"), use_external_data_format=is_large(model)
            )
            calibrator.augment_graph()
            calibrator.create_inference_session()
            calibrator.collect_data(CropReader(crops_NHWC, model))
            ranges = calibrator.compute_data()
        except ORT_ERRORS as error:
            raise DistillError(f"the ranges of the graph cannot be measured: {first_line(error)}") from error
    return {name: float(np.abs(np.asarray(ranges[name].range_value, dtype=np.float64)).max()) for name in ranges.keys()}  # noqa: SIM118


def _overflowing(model: onnx.ModelProto, magnitudes: dict[str, float]) -> tuple[str, ...]:
    """Nodes of the network with a tensor that fp16 cannot hold, with room to spare; weights are known exactly and need none."""
    limits = {name: (magnitude, LARGEST / HEADROOM) for name, magnitude in magnitudes.items()}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            limits[tensor.name] = (float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0)), LARGEST)
    too_large = {name for name, (magnitude, limit) in limits.items() if not magnitude <= limit}  # NaN, too
    outside = head_and_tail(model.graph)
    return tuple(node.name for node in model.graph.node if node.name not in outside and too_large.intersection([*node.input, *node.output]))


def _never_half(graph: onnx.GraphProto) -> set[str]:
    """Operators that are not known to be safe, and those whose results a branch or a loop reads by name."""
    captured = set[str]().union(*(names_used(node) for node in graph.node if any(subgraphs(node))))
    return {node.name for node in graph.node if node.op_type not in _HALF_OPERATORS or captured.intersection(node.output)}


@dataclass
class _Converter:
    """One pass over the nodes in their order. `half` and `full` hold, for a tensor of the other kind, the name of its twin."""

    source: onnx.ModelProto
    kept: Collection[str]
    floats: Collection[str]
    rounds_only: bool
    """Write the fp32 graph that rounds to fp16."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    half: dict[str, str] = field(default_factory=dict)
    full: dict[str, str] = field(default_factory=dict)
    made_in_half: set[str] = field(default_factory=set)

    def convert(self) -> onnx.ModelProto:
        graph = self.source.graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            self._add(node, constants, outputs)
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        del model.graph.node[:]
        del model.graph.value_info[:]  # of the types that they had before
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.weights)
        drop_unused_constants(model.graph)
        return model

    def _add(self, original: onnx.NodeProto, constants: dict[str, Any], outputs: set[str]) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.name in self.kept:
            node.input[:] = [self._in_full(name) if name in self.made_in_half else name for name in node.input]
            self.nodes.append(node)
            return
        node.input[:] = [self._in_half(name, constants) if name in self.floats else name for name in node.input]
        made = [name for name in node.output if name in self.floats]
        if self.rounds_only:
            node.output[:] = [f"{name}/exact" if name in made else name for name in node.output]
        else:
            node.output[:] = [f"{name}/half" if name in made and name in outputs else name for name in node.output]
        self.nodes.append(node)
        for name in made:
            if self.rounds_only:
                self._round(f"{name}/exact", name)
            elif name in outputs:
                self._cast(f"{name}/half", name, TensorProto.FLOAT)
            # A graph output that the network reads again is fp32 by its name; whoever reads it casts it back.
            if self.rounds_only or name not in outputs:
                self.made_in_half.add(name)

    def _in_half(self, name: str, constants: dict[str, Any]) -> str:
        if name in self.made_in_half:
            return name
        if name not in self.half:
            self.half[name] = f"{name}/fp16"
            if name in constants:
                values = numpy_helper.to_array(constants[name]).astype(np.float16)
                stored = values.astype(np.float32) if self.rounds_only else values
                self.weights.append(numpy_helper.from_array(stored, self.half[name]))
            elif self.rounds_only:
                self._round(name, self.half[name])
            else:
                self._cast(name, self.half[name], TensorProto.FLOAT16)
        return self.half[name]

    def _in_full(self, name: str) -> str:
        if self.rounds_only:
            return name  # fp32 already, with fp16's numbers
        if name not in self.full:
            self.full[name] = f"{name}/fp32"
            self._cast(name, self.full[name], TensorProto.FLOAT)
        return self.full[name]

    def _round(self, name: str, target: str) -> None:
        self._cast(name, f"{target}/rounded", TensorProto.FLOAT16)
        self._cast(f"{target}/rounded", target, TensorProto.FLOAT)

    def _cast(self, name: str, target: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [name], [target], name=f"cast/{target}", to=to))
