"""What form a ready ONNX classifier has: which tensor takes the crops, in which type and layout, and which one holds the logits.

Unit of data: one graph. What cannot be used is refused here, in one line; what a classifier does not need is removed in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing
from export.graph_regions import names_used

MIN_OPSET = 7
"""Before it, arithmetic does not broadcast."""

_PROBABILITY_OPERATORS = ("Softmax", "Sigmoid", "Hardmax", "ArgMax", "TopK")
_SHAPE_OPERATORS = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class ImageInput:
    """The input of a ready classifier, as far as the prefix needs to know it."""

    name: str
    element_type: int
    channels_last: bool
    fixed_batch: bool
    """Whether the model was declared for single images only."""

    @property
    def takes_uint8(self) -> bool:
        """Whether the model casts and normalises by itself."""
        return self.element_type == TensorProto.UINT8


def check_opset(model: onnx.ModelProto, source: Path) -> None:
    """Refuse, with a ConfigError, operators that are older than our own nodes."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise ConfigError(f"{source.name} is of opset {opset}, the oldest that can be wrapped is {MIN_OPSET}; export it anew")


def forget_initialiser_inputs(graph: onnx.GraphProto) -> None:
    """Old files list their weights among the inputs, as defaults that a caller might replace. Nobody may replace these."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def find_image_input(graph: onnx.GraphProto, preprocessing: Preprocessing, source: Path) -> ImageInput:
    """The input that takes images of `preprocessing.image_size`.

    Raises:
        ConfigError: several inputs; another shape or type; a batch fixed above 1; a mean or std for a model that takes uint8.
    """
    if len(graph.input) != 1:
        names = ", ".join(value.name for value in graph.input)
        raise ConfigError(f"{source.name} has {len(graph.input)} inputs ({names}); a classifier of images has one")
    value = graph.input[0]
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]  # some exporters write -1 for dynamic
    size = preprocessing.image_size
    if len(dims) == 4 and dims[1] == 3 and all(dim in (None, size) for dim in dims[2:]):
        channels_last = False
    elif len(dims) == 4 and dims[3] == 3 and all(dim in (None, size) for dim in dims[1:3]):
        channels_last = True
    else:
        raise ConfigError(
            f"{source.name}: input {value.name} has shape {dims}; [batch, 3, {size}, {size}] or [batch, {size}, {size}, 3] is needed: "
            "check image_size"
        )
    if dims[0] not in (None, 1):
        raise ConfigError(f"{source.name} is fixed to batches of {dims[0]}; export it with a dynamic batch dimension")
    image = ImageInput(value.name, tensor.elem_type, channels_last, fixed_batch=dims[0] == 1)
    if not image.takes_uint8 and image.element_type not in _FLOATS:
        raise ConfigError(
            f"{source.name}: input {value.name} is {TensorProto.DataType.Name(image.element_type)}; float32, float16 or uint8 is needed"
        )
    if image.takes_uint8 and (preprocessing.mean != (0.0, 0.0, 0.0) or preprocessing.std != (1.0, 1.0, 1.0)):
        raise ConfigError(
            f"{source.name} takes uint8, so it normalises by itself: leave mean and std out, or crops would be normalised twice"
        )
    return image


def find_logits(graph: onnx.GraphProto, wanted: str | None, source: Path) -> str:
    """Name of the tensor [B,K] that holds the logits: `wanted`, which may be an inner one, or the only output.

    Raises:
        ConfigError: no such tensor, several to choose from, or probabilities.
    """
    outputs = [value.name for value in graph.output]
    producers = {name: node for node in graph.node for name in node.output}
    if wanted is None and len(outputs) != 1:
        raise ConfigError(f"{source.name} has {len(outputs)} outputs ({', '.join(outputs)}): say which one holds the logits")
    name = wanted if wanted is not None else outputs[0]
    if name not in producers:
        raise ConfigError(f"{source.name} has no tensor {name!r}; its outputs are {', '.join(outputs)}")
    node: onnx.NodeProto | None = producers[name]
    while node is not None and node.op_type in _SHAPE_OPERATORS:
        node = producers.get(node.input[0])
    if node is not None and node.op_type in _PROBABILITY_OPERATORS:
        raise ConfigError(
            f"{source.name}: {name!r} comes out of a {node.op_type}; give the logits, not the probabilities: "
            f"the tensor before it is {node.input[0]!r}"
        )
    return name


def keep_only(graph: onnx.GraphProto, output: str) -> None:
    """Make `output` the only output, and remove all that it does not need."""
    needed, kept = {output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(names_used(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    del graph.output[:]
    graph.output.append(helper.make_empty_tensor_value_info(output))
