"""network -> ONNX graph, for the teacher (crops and temperature in, logits and soft labels out) and for the student (crops in, logits out).

    images uint8 [B,H,W,3], temperature float32 [B,1] (one a crop, so that requests with different ones share a batch)
        -> logits float32 [B,K], soft_labels float32 [B,K] = softmax(logits / temperature)

Unit of data: one network, one file. Every network takes uint8 crops and normalises them itself, so the graph does too. torch's exporter
simplifies the graph (constants folded, batch norm folded into convolutions); `save_model` checks it.
The bytes of the file are a function of the network alone: two processes write the same file, which is what the fingerprint stands on.

Shapes: B crops of a batch (dynamic, 1 to 4096), H W pixels, C = 3 channels, K classes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from distill.errors import ConfigError, DistillError
from distill.wire import IMAGES, LOGITS, SOFT_LABELS, TEMPERATURE
from export import large_models
from export.files import first_line, write_atomically

__all__ = ["IMAGES", "LOGITS", "SOFT_LABELS", "TEMPERATURE"]

MAX_BATCH = 4096

_log = logging.getLogger(__name__)


class TeacherGraph(nn.Module):
    """A classifier with the softmax at a temperature behind it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, crops_BHWC: Tensor, temperature_B1: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 crops [B,H,W,3] and float32 temperatures [B,1] -> float32 logits [B,K] and soft labels [B,K]."""
        # Every network casts by itself, but some permute first, and TensorRT takes uint8 into a cast and into nothing else.
        logits_BK = self.network(crops_BHWC.to(torch.float32))
        return logits_BK, torch.softmax(logits_BK / temperature_B1, dim=1)


def export_teacher_graph(network: nn.Module, image_size: int, path: Path, *, opset: int = 20) -> None:
    """Write `network` (uint8 [B,H,W,3] -> logits [B,K]) as the teacher graph.

    The network is exported in evaluation mode; its own mode is restored afterwards.

    Raises:
        DistillError: the network has something that ONNX cannot say.
    """
    example = (_example_crops(image_size), torch.ones(2, 1))
    _export(TeacherGraph(network), example, path, [IMAGES, TEMPERATURE], [LOGITS, SOFT_LABELS], opset)


def export_student_graph(network: nn.Module, image_size: int, path: Path, *, opset: int = 20) -> None:
    """Write `network` (uint8 [B,H,W,3] -> logits [B,K]) as the student graph: crops in, logits out.

    Raises:
        ConfigError: the weights do not fit into one ONNX file.
        DistillError: the network has something that ONNX cannot say.
    """
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in [*network.parameters(), *network.buffers()])
    if size_bytes > large_models.MAX_FILE_BYTES:
        most = f"one ONNX file holds {large_models.MAX_FILE_BYTES}"
        raise ConfigError(f"the student has {size_bytes} bytes of weights; {most}: choose a smaller network")
    _export(network, (_example_crops(image_size),), path, [IMAGES], [LOGITS], opset)


def _example_crops(image_size: int) -> Tensor:
    # Two, not one: torch.export takes a dimension of size 1 for a constant, even where min=1 is declared dynamic.
    # The memory of [B,C,H,W], not of [B,H,W,C]: behind the network's own permute it is contiguous. From a tensor in channels-last order
    # torch writes adaptive pooling as `as_strided`, which in ONNX is a Gather over indices that are computed anew for every batch.
    return torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8).permute(0, 2, 3, 1)


def _export(network: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str], opset: int) -> None:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with evaluating(network), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                network,
                tuple(tensor.to(device_of(network)) for tensor in example),
                dynamo=True,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=tuple({0: batch} for _ in example),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise DistillError(f"the network cannot be written as ONNX opset {opset}: {first_line(error)}") from error
    if program is None:
        raise DistillError("torch.onnx.export gave no program")
    model = program.model_proto
    strip_descriptions(model)
    save_model(model, path)


def strip_descriptions(model: onnx.ModelProto) -> None:
    """Remove, in place, all that says how the graph came about (stack traces, file names, versions) and not what it computes."""
    model.doc_string = ""
    model.producer_name = "distill"
    model.producer_version = ""
    del model.metadata_props[:]
    _strip_graph(model.graph)
    model.graph.name = "classifier"
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        # The exporter keeps attributes in the order of a set, which differs from process to process.
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
        for attribute in node.attribute:
            attribute.doc_string = ""
            for subgraph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _strip_graph(subgraph)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Check `model` and write it under a temporary name that is then renamed: a crash leaves the old file or the new one.

    Weights that do not fit into one file get a second one beside it (`large_models.py`).

    Raises:
        ConfigError: what is not weights does not fit into one file.
        DistillError: the ONNX checker refuses the graph.
    """
    large = large_models.is_large(model)
    if not large and model.ByteSize() > large_models.MAX_FILE_BYTES:  # in nodes and functions
        raise ConfigError(f"{path.name} has more than 2 GB outside its tensors of weights; one ONNX file cannot hold that")
    content = (large_models.save_weights(model, path) if large else model).SerializeToString(deterministic=True)
    try:
        if large:  # only from a file, which finds its weights beside it
            _check_beside(path, content)
        else:
            onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise DistillError(f"{path.name} would be no valid ONNX model: {first_line(error)}") from error
    write_atomically(path, content)


def _check_beside(path: Path, content: bytes) -> None:
    """ONNX's check of what is about to become `path`."""
    unchecked = path.with_name(".unchecked.pending")
    try:
        unchecked.write_bytes(content)
        onnx.checker.check_model(str(unchecked), full_check=True)
    finally:
        unchecked.unlink(missing_ok=True)


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are; the CPU if it has none."""
    return next((tensor.device for tensor in [*network.parameters(), *network.buffers()]), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for the while: a network in training mode exports silently, with the batch's own statistics in its BatchNorm."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send the exporter's chatter to our log; only warnings that are known and harmless are silenced."""
    exporter = logging.getLogger("torch.onnx._internal.exporter")
    level, spoken = exporter.level, io.StringIO()
    exporter.setLevel(logging.ERROR)  # "torchvision is not installed. Skipping torchvision::nms"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(spoken):
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"# The axis name: batch will not be used", category=UserWarning)
            yield
    finally:
        exporter.setLevel(level)
        for line in spoken.getvalue().splitlines():
            _log.debug("torch.onnx: %s", line)
