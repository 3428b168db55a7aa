"""A ready ONNX classifier, made by anyone, becomes a teacher graph: crops and temperature in, logits and soft labels out.

Unit of data: one model. What is added, around the untouched middle:

    images uint8 [B,H,W,3] -> Cast -> [Resize] -> /255 -> -mean -> /std -> Transpose (for NCHW) -> [the model] -> logits [B,K]
    logits -> /temperature float32 [B,1] -> Softmax -> soft_labels [B,K]

A model that takes uint8 normalises by itself and gets no arithmetic in front. Values on the scale 0 to 255 are said as mean 0, std 1/255.
The resize is there where crops of another size travel (`input_size`). The middle is simplified (`export/simplify.py`).

Shapes: B crops of a batch, H W pixels, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.compose
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing
from export.crop_size import ANTIALIAS_OPSET, resize_node
from export.fingerprint import load_model
from export.foreign_model import ImageInput, check_opset, find_image_input, find_logits, forget_initialiser_inputs, keep_only
from export.graph import IMAGES, LOGITS, SOFT_LABELS, TEMPERATURE, save_model, strip_descriptions
from export.graph_regions import opset_of
from export.label_space import Crops, Logits
from export.large_models import is_large
from export.sessions import ORT_ERRORS, open_session_of, short
from export.simplify import at_least_opset, simplify

BATCH = "batch"
PREFIX = "source/"
"""Put before every name of the wrapped model, so that none collides with ours."""


class Wrapped(NamedTuple):
    """How the wrapped model is asked directly: its image input and the tensor that holds its logits."""

    image: ImageInput
    logits: str


def wrap_classifier(
    source: Path, target: Path, preprocessing: Preprocessing, logits: str | None = None, input_size: int | None = None
) -> Wrapped:
    """Write `source` as a teacher graph.

    Args:
        source: an ONNX classifier with one image input, float (normalised) or uint8, NCHW or NHWC.
        target: the file to write.
        preprocessing: the size, mean and std that the model was trained with. For a uint8 model mean and std stay at 0 and 1.
        logits: name of the tensor [B,K] that holds the logits; by default the model's only output. An inner tensor is allowed.
        input_size: height and width of the crops that travel, where it is not the model's own size.

    Raises:
        ConfigError: the model has another form, gives probabilities, or works for one batch size only.
    """
    model = load_model(source)
    if is_large(model):
        raise ConfigError(
            f"{source.name} has more than 2 GB of weights, which cannot be wrapped; bring the network as a state dict or by timm"
        )
    check_opset(model, source)
    size = input_size or preprocessing.image_size
    if size > preprocessing.image_size:
        model = at_least_opset(
            model, ANTIALIAS_OPSET, f"teacher.input_size: {size}, which is more than the model's {preprocessing.image_size},"
        )
    strip_descriptions(model)
    forget_initialiser_inputs(model.graph)
    logits_name = find_logits(model.graph, logits, source)
    keep_only(model.graph, logits_name)
    image = find_image_input(model.graph, preprocessing, source)
    _free_the_batch(model.graph)
    middle = onnx.compose.add_prefix(model, PREFIX)
    wrapped = simplify(_around(middle, image, PREFIX + logits_name, preprocessing, size))
    _check_batches(wrapped, size, source)
    save_model(wrapped, target)
    return Wrapped(image, logits_name)


def _free_the_batch(graph: onnx.GraphProto) -> None:
    """Declare the batch dynamic. Where the graph itself is bound to one size, `_check_batches` finds out."""
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = BATCH
    # Shapes that were inferred for the old batch would contradict it.
    del graph.value_info[:]


def _around(middle: onnx.ModelProto, image: ImageInput, logits: str, preprocessing: Preprocessing, size: int) -> onnx.ModelProto:
    """The model with our nodes before and behind it; crops of `size` pixels travel."""
    before, constants = _prefix(image, PREFIX + image.name, preprocessing, size, opset_of(middle))
    behind = [
        helper.make_node("Cast", [logits], [LOGITS], to=TensorProto.FLOAT, name="to_logits"),
        helper.make_node("Div", [LOGITS, TEMPERATURE], ["tempered"], name="temper"),
        helper.make_node("Softmax", ["tempered"], [SOFT_LABELS], axis=1, name="soften"),
    ]
    classes = _num_classes(middle, logits)
    graph = helper.make_graph(
        nodes=[*before, *middle.graph.node, *behind],
        name="classifier",
        inputs=[
            helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, [BATCH, size, size, 3]),
            helper.make_tensor_value_info(TEMPERATURE, TensorProto.FLOAT, [BATCH, 1]),
        ],
        outputs=[helper.make_tensor_value_info(output, TensorProto.FLOAT, [BATCH, classes]) for output in (LOGITS, SOFT_LABELS)],
        initializer=[*constants, *middle.graph.initializer],
        sparse_initializer=list(middle.graph.sparse_initializer),
    )
    wrapped = helper.make_model(graph, opset_imports=middle.opset_import, functions=middle.functions, ir_version=max(middle.ir_version, 8))
    strip_descriptions(wrapped)
    return wrapped


def _prefix(
    image: ImageInput, name: str, preprocessing: Preprocessing, size: int, opset: int
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes from `images` to the model's input called `name`, and their constants."""
    chain = _Chain(IMAGES)
    resizes, planes = size != preprocessing.image_size, False
    if resizes or not image.takes_uint8:
        chain.add("Cast", to=TensorProto.FLOAT)
    if resizes:
        chain.add("Transpose", perm=[0, 3, 1, 2])
        node, constant = resize_node(chain.current, "resized", size, preprocessing.image_size, opset)
        chain.append(node, constant)
        planes = True
    if image.takes_uint8 and resizes:
        chain.add("Round")
        chain.add("Cast", to=TensorProto.UINT8)
    elif not image.takes_uint8:
        shape = (3, 1, 1) if planes else (3,)
        for operator, constant_name, values in (
            ("Div", "scale", [255.0]),
            ("Sub", "mean", preprocessing.mean),
            ("Div", "std", preprocessing.std),
        ):
            array = np.array(values, dtype=np.float32).reshape(shape if len(values) == 3 else (1,))
            chain.add(operator, numpy_helper.from_array(array, constant_name))
    if image.element_type == TensorProto.FLOAT16:
        chain.add("Cast", to=TensorProto.FLOAT16)
    if planes and image.channels_last:
        chain.add("Transpose", perm=[0, 2, 3, 1])
    elif not planes and not image.channels_last:
        chain.add("Transpose", perm=[0, 3, 1, 2])
    chain.add("Identity")
    chain.nodes[-1].output[:] = [name]
    return chain.nodes, chain.constants


class _Chain:
    """Nodes, each of which reads what the one before gives."""

    def __init__(self, start: str) -> None:
        self.current = start
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, operator: str, constant: TensorProto | None = None, **attributes: Any) -> None:
        number = len(self.nodes)
        read = [self.current, *([constant.name] if constant else [])]
        node = helper.make_node(operator, read, [f"normalise_{number}"], name=f"{operator.lower()}_{number}", **attributes)
        self.append(node, constant)

    def append(self, node: onnx.NodeProto, constant: TensorProto | None) -> None:
        self.nodes.append(node)
        self.constants += [constant] if constant else []
        self.current = node.output[0]


def _num_classes(middle: onnx.ModelProto, logits: str) -> int | str:
    """K as shape inference finds it, else a name for it."""
    inferred = onnx.shape_inference.infer_shapes(middle)
    for value in [*inferred.graph.output, *inferred.graph.value_info]:
        dims = value.type.tensor_type.shape.dim
        if value.name == logits and len(dims) == 2 and dims[1].HasField("dim_value"):
            return dims[1].dim_value
    return "classes"


def _check_batches(wrapped: onnx.ModelProto, image_size: int, source: Path) -> None:
    """Run batches of 1 and 3: the labels of a crop must not depend on what travels with it."""
    session = open_session_of(wrapped.SerializeToString(), source.name)
    crops_BHWC = np.random.default_rng(0).integers(0, 256, (3, image_size, image_size, 3), dtype=np.uint8)
    temperature_B1 = np.ones((3, 1), dtype=np.float32)
    alone = [_logits(session, crops_BHWC[[row]], temperature_B1[[row]], source) for row in range(3)]
    alone_BK, together_BK = np.concatenate(alone), _logits(session, crops_BHWC, temperature_B1, source)
    scale = max(1.0, float(np.abs(alone_BK).max()))
    if together_BK.shape != alone_BK.shape or not np.allclose(together_BK, alone_BK, rtol=0, atol=1e-2 * scale):
        raise ConfigError(
            f"{source.name} gives a crop other logits in a batch of 3 than alone: export it in evaluation mode, with a dynamic batch"
        )


def _logits(session: InferenceSession, crops_BHWC: Crops, temperature_B1: Logits, source: Path) -> Logits:
    try:
        logits_BK = session.run([LOGITS], {IMAGES: crops_BHWC, TEMPERATURE: temperature_B1})[0]
    except ORT_ERRORS as error:
        raise ConfigError(
            f"{source.name} does not run on a batch of {len(crops_BHWC)}; export it with a dynamic batch dimension: {short(error)}"
        ) from error
    if logits_BK.ndim != 2 or logits_BK.shape[1] < 2:
        raise ConfigError(f"{source.name}: the logits have shape {logits_BK.shape}; [batch, classes] with at least 2 classes is needed")
    return logits_BK
