"""teacher graph -> teacher graph that also says its largest logits: with many classes a client then need not carry all of them home.

    logits fp32 [B,K] -> TopK -> top_logits fp32 [B,R] and top_ids int32 [B,R], largest first

Unit of data: one graph. Shapes: B crops, K classes, R retained classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from distill.errors import ConfigError
from distill.wire import IMAGES, LOGITS, TEMPERATURE, TOP_IDS, TOP_LOGITS
from export.label_space import Crops
from export.sessions import open_session

_COUNT = "top_count"
_BATCH = 64


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


def top_output_failures(path: Path, crops_NHWC: Crops, num_top: int) -> tuple[str, ...]:
    """What is wrong with a graph's top outputs, in words, for the parity gate; its logits the gate compares by itself.

    Args:
        path: a teacher graph with top outputs.
        crops_NHWC: uint8 [N,H,W,3], real crops.
        num_top: R.

    Raises:
        BadInput: the graph does not load.
    """
    session = open_session(path)
    wrong = 0
    for start in range(0, len(crops_NHWC), _BATCH):
        crops_BHWC = crops_NHWC[start : start + _BATCH]
        feed = {IMAGES: crops_BHWC, TEMPERATURE: np.ones((len(crops_BHWC), 1), np.float32)}
        logits_BK, ids_BR, top_BR = session.run([LOGITS, TOP_IDS, TOP_LOGITS], feed)
        shape = len(crops_BHWC), num_top
        if ids_BR.shape != shape or top_BR.shape != shape:
            return (f"top outputs of shapes {ids_BR.shape} and {top_BR.shape} in place of {shape}",)
        there_B = ((ids_BR >= 0) & (ids_BR < logits_BK.shape[1])).all(axis=1)
        named_BR = np.take_along_axis(logits_BK, np.clip(ids_BR, 0, logits_BK.shape[1] - 1), axis=1)
        largest_BR = -np.sort(-logits_BK, axis=1)[:, :num_top]
        # Equal logits may come in either order, so the classes are checked by the logits that they stand for.
        right_B = there_B & (top_BR == largest_BR).all(axis=1) & (named_BR == top_BR).all(axis=1)
        right_B &= np.array([len(set(row)) == num_top for row in ids_BR.tolist()], dtype=bool)
        wrong += int((~right_B).sum())
    return (f"top outputs are not the {num_top} largest logits on {wrong} of {len(crops_NHWC)} images",) if wrong else ()
