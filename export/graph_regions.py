"""Which nodes of a teacher graph are the network, and which stand before and behind it.

    images -> [head: cast, normalise, resize] -> [body: the network] -> logits -> [tail: /temperature, softmax, top outputs]

Unit of data: one graph. Head and tail stay in fp32 whatever the body computes in: they are a few operations a pixel or a class, and an
error made in the very first or the very last layer is paid in full.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto

from distill.wire import IMAGES, LOGITS
from export.large_models import without_weights

_HEAD_OPERATORS = frozenset({"Cast", "Div", "Sub", "Mul", "Add", "Transpose", "Resize", "Identity", "Round", "Clip"})


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, in place; those that have one keep it."""
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)


def head_and_tail(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes before and behind the network. The nodes must be named and in the order in which they run."""
    constants = {tensor.name for tensor in graph.initializer}
    before, behind, names = {IMAGES}, {LOGITS}, set[str]()
    for node in graph.node:
        read = [name for name in node.input if name and name not in constants]
        if not read and node.op_type in ("Constant", "Identity"):
            constants.update(node.output)
        elif read and node.op_type in _HEAD_OPERATORS and before.issuperset(read):
            before.update(node.output)
            names.add(node.name)
        elif behind.intersection(read):
            behind.update(node.output)
            names.add(node.name)
    return names


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all fp32 tensors: inputs, outputs, constants, and those between, whose types are inferred."""
    # Types need no weights, and shape inference takes no model over 2 GB.
    graph = onnx.shape_inference.infer_shapes(without_weights(model, lambda data: {}), data_prop=True).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    named = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return named | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


def names_used(node: onnx.NodeProto) -> set[str]:
    """Inputs of a node, and of the nodes in its subgraphs, which see the outer names."""
    names = set(node.input)
    for subgraph in subgraphs(node):
        for inner in subgraph.node:
            names |= names_used(inner)
    return names


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The branches and loop bodies of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def drop_unused_constants(graph: onnx.GraphProto) -> None:
    """Remove, in place, the constants that no node reads any more."""
    needed = set[str]().union(*(names_used(node) for node in graph.node)) | {value.name for value in graph.output}
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operators that the graph is written in."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
