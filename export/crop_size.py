"""Crops of another size than the network was trained on: the graph resizes them first, so that the network sees its own size.

Unit of data: one batch of crops. Bilinear, pixel centres aligned; when the crops get smaller, each new pixel averages over the old ones
(antialias), as the crop itself was cut (`distill/crops.py`). When they get larger the two filters are the same, and the plain one is
written because more engines know it.

Shapes: B crops, H W pixels that travel, S S pixels that the network sees, C = 3 channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing
from distill.wire import IMAGES
from export.graph_regions import opset_of
from export.label_space import Crops
from export.simplify import simplify

ANTIALIAS_OPSET = 18
"""The first opset whose Resize can average."""


class Resizing(nn.Module):
    """A network behind a resize: what the graph of such a teacher is compared with. `network` gets float pixels of 0 to 255 in place of
    uint8; it casts to float anyway."""

    def __init__(self, network: nn.Module, network_size: int) -> None:
        super().__init__()
        self.network = network
        self.network_size = network_size

    def forward(self, crops_BHWC: Tensor) -> Tensor:
        """uint8 [B,H,W,3] -> what the network says of them at its own size."""
        resized_BCSS = resized(crops_BHWC.to(torch.float32).permute(0, 3, 1, 2), self.network_size)
        return self.network(resized_BCSS.permute(0, 2, 3, 1))


def resized(pixels_BCHW: Tensor, size: int) -> Tensor:
    """float [B,3,H,W] -> float [B,3,S,S]."""
    return nn.functional.interpolate(pixels_BCHW, size=(size, size), mode="bilinear", antialias=pixels_BCHW.shape[-1] > size)


def resized_pixels(crops_BHWC: Crops, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The same in numpy: uint8 [B,H,W,3] -> float32 [B,S,S,3]."""
    pixels = torch.from_numpy(np.ascontiguousarray(crops_BHWC)).permute(0, 3, 1, 2).float()
    return np.asarray(resized(pixels, size).permute(0, 2, 3, 1).contiguous().numpy())


def travelling(own: Preprocessing, input_size: int | None) -> Preprocessing:
    """The preprocessing that a teacher states: with the size of the crops that travel."""
    return own if input_size is None else own.replace(image_size=input_size)


def with_resize(network: nn.Module, own_size: int, input_size: int | None) -> nn.Module:
    """The network as it is where its own size travels, else behind a resize."""
    return network if input_size in (None, own_size) else Resizing(network, own_size)


def resize_first(model: onnx.ModelProto, from_size: int, to_size: int) -> onnx.ModelProto:
    """A teacher graph of `export/graph.py` for crops of `from_size` pixels, resized to the `to_size` that it was exported for."""
    graph = model.graph
    (images,) = (value for value in graph.input if value.name == IMAGES)
    for dim in images.type.tensor_type.shape.dim[1:3]:
        dim.dim_value = from_size
    ((number, cast),) = ((number, node) for number, node in enumerate(graph.node) if IMAGES in node.input)
    assert cast.op_type == "Cast", cast.op_type
    pixels, cast.output[0] = cast.output[0], "given_pixels"
    node, constant = resize_node("given_planes", "resized_planes", from_size, to_size, opset_of(model))
    inserted = [
        helper.make_node("Transpose", ["given_pixels"], ["given_planes"], name="planes_first", perm=[0, 3, 1, 2]),
        node,
        helper.make_node("Transpose", ["resized_planes"], [pixels], name="planes_last", perm=[0, 2, 3, 1]),
    ]
    rest = list(graph.node[number + 1 :])
    del graph.node[number + 1 :]
    graph.node.extend([*inserted, *rest])
    graph.initializer.append(constant)
    return simplify(model)  # the network's own transpose cancels the last one


def resize_node(name: str, target: str, from_size: int, to_size: int, opset: int) -> tuple[onnx.NodeProto, TensorProto]:
    """The node [B,3,H,W] -> [B,3,S,S] and its constant, as `resized` computes it.

    Raises:
        ConfigError: smaller crops are asked of a graph whose opset cannot average.
    """
    shrinks = from_size > to_size
    if opset < (ANTIALIAS_OPSET if shrinks else 11):
        raise ConfigError(
            f"teacher.input_size: {from_size} pixels cannot be resized to {to_size} in opset {opset}; export the model anew with opset"
            f" {ANTIALIAS_OPSET} or later, or let crops of its own size travel"
        )
    attributes: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if shrinks:
        attributes |= {"antialias": 1, "exclude_outside": 1}  # at the border the average is over what is inside, as Pillow and torch do it
    # Sizes of the two axes alone would say it more plainly, but ONNX Runtime's layout optimiser spoils them (1.32, in an int8 graph).
    # The new size is floor(old size * scale), so the scale must not round down.
    scale = np.float32(to_size / from_size)
    while np.floor(np.float32(from_size) * scale) < to_size:
        scale = np.nextafter(scale, np.float32(np.inf))
    scales = numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), "resize_scales")
    return helper.make_node("Resize", [name, "", scales.name], [target], name="resize", **attributes), scales
