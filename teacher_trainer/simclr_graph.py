"""Where the classifier sits, read from the computation that TensorFlow saved beside the weights.

Unit of data: one graph, from the `.meta` file of a TF1 checkpoint (MetaGraphDef) or from `saved_model.pb` (SavedModel). The classifier's
matrix product is followed upwards to the image: as many matrix products as lie above it, so many layers of the head does it stand on.
(tensorflow/core/protobuf/meta_graph.proto, saved_model.proto; tensorflow/core/framework/graph.proto, function.proto.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.errors import CheckpointError
from teacher_trainer.protobuf_wire import messages, text

_CLASSIFIER = re.compile(r"(?:.*/)?head_supervised(?:_\d+)?/linear_layer/(?:.*/)?MatMul(?:_\d+)?")
_HANDS_ON = {"Identity", "Cast"}


@dataclass(frozen=True)
class GraphEvidence:
    """What a saved computation says of the network."""

    classifier_after: int | None
    """Layers of the projection head below the classifier; None where the graph does not show it, or shows it in two places."""
    gradient_stopped: bool
    """The classifier learns beside pretraining: its gradient stops before it reaches the network."""
    pools_average: bool
    """An average pool is used, as ResNet-D's shortcuts do (sk_ratio > 0)."""


@dataclass(frozen=True)
class _Node:
    """One operation."""

    op: str
    inputs: tuple[str, ...]


def read_graph(path: Path) -> GraphEvidence:
    """Read a `.meta` file or a `saved_model.pb`.

    Raises:
        CheckpointError: the file cannot be read or is damaged.
    """
    try:
        data = memoryview(path.read_bytes())
        metas = [data] if path.suffix == ".meta" else list(messages(data, 2))
        graphs = [_nodes(graph) for meta in metas for graph_def in messages(meta, 2) for graph in _graphs(graph_def)]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or download it again, or remove it: the weights lie elsewhere") from error
    traced = {found for nodes in graphs for found in _traces(nodes)}
    return GraphEvidence(
        classifier_after=next(iter(traced))[0] if len({after for after, _ in traced}) == 1 else None,
        gradient_stopped=bool(traced) and all(stopped for _, stopped in traced),
        pools_average=any(node.op == "AvgPool" for nodes in graphs for node in nodes.values()),
    )


def _graphs(graph_def: memoryview) -> Iterator[tuple[memoryview, int]]:
    """The main graph and every function of its library, each with the number of the field that holds its nodes."""
    yield graph_def, 1
    for library in messages(graph_def, 2):
        for function in messages(library, 1):
            yield function, 3


def _nodes(graph: tuple[memoryview, int]) -> dict[str, _Node]:
    message, number = graph
    return {text(node, 1): _Node(text(node, 2), _data_inputs(node)) for node in messages(message, number)}


def _data_inputs(node: memoryview) -> tuple[str, ...]:
    """Names of the nodes whose results come in; `^name` only orders, and `name:out:0` is one of several results."""
    names = (str(name, "utf-8") for name in messages(node, 3))
    return tuple(name.split(":")[0] for name in names if not name.startswith("^"))


def _traces(nodes: dict[str, _Node]) -> Iterator[tuple[int, bool]]:
    """For each classifier of a graph that leads back to convolutions: head layers below it, and whether its gradient is stopped."""
    for name, node in nodes.items():
        if node.op != "MatMul" or "grad" in name or not node.inputs or not _CLASSIFIER.fullmatch(name):
            continue
        above = _all_above(nodes, node.inputs[0])
        ops = [nodes[one].op for one in above]
        if "Conv2D" in ops:  # else it is a function of the classifier alone
            yield ops.count("MatMul"), _first_op(nodes, node.inputs[0]) == "StopGradient"


def _all_above(nodes: dict[str, _Node], name: str) -> set[str]:
    above: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one in nodes and one not in above:
            above.add(one)
            waiting.extend(nodes[one].inputs)
    return above


def _first_op(nodes: dict[str, _Node], name: str) -> str | None:
    """The first operation upwards that does something."""
    while name in nodes and nodes[name].op in _HANDS_ON and nodes[name].inputs:
        name = nodes[name].inputs[0]
    return nodes[name].op if name in nodes else None
