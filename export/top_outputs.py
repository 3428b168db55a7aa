"""teacher graph -> teacher graph that also says its largest logits: with many classes a client then need not carry all of them home.

    logits fp32 [B,K] -> TopK -> top_logits fp32 [B,R] and top_ids int32 [B,R], largest first

Unit of data: one graph. Shapes: B crops, K classes, R retained classes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from distill.errors import ConfigError
from distill.wire import LOGITS, TOP_IDS, TOP_LOGITS

_COUNT = "top_count"


def add_top_outputs(model: onnx.ModelProto, num_top: int) -> None:
    """Add both outputs, in place.

    Raises:
        ConfigError: the teacher has fewer classes.
    """
    graph = model.graph
    logits = next(value for value in graph.output if value.name == LOGITS)
    batch, classes = logits.type.tensor_type.shape.dim
    if classes.HasField("dim_value") and num_top > classes.dim_value:
        raise ConfigError(f"teacher.top_outputs: {num_top} is more than the teacher's {classes.dim_value} classes")
    graph.initializer.append(numpy_helper.from_array(np.array([num_top], np.int64), _COUNT))
    graph.node.append(helper.make_node("TopK", [LOGITS, _COUNT], [TOP_LOGITS, "top_ids_int64"], name="top", axis=1, largest=1, sorted=1))
    # Half the bytes, and the type that TensorRT gives.
    graph.node.append(helper.make_node("Cast", ["top_ids_int64"], [TOP_IDS], name="top_ids_to_int32", to=TensorProto.INT32))
    for name, kind in ((TOP_IDS, TensorProto.INT32), (TOP_LOGITS, TensorProto.FLOAT)):
        graph.output.append(helper.make_tensor_value_info(name, kind, [batch.dim_param or "batch", num_top]))
