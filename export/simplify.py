"""A graph that someone else wrote -> the same computation with less in it: constants folded, dead nodes and identities removed.

Unit of data: one graph. What torch exports for us has been through the same optimiser; a ready ONNX model has not.
"""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnxscript.optimizer

from distill.errors import ConfigError
from export.files import first_line
from export.graph import strip_descriptions
from export.graph_regions import opset_of
from export.large_models import is_large


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """A simplified copy. Names of inputs, outputs and weights stay; the order of nodes is a function of the graph alone."""
    smaller = onnxscript.optimizer.optimize(model)
    strip_descriptions(smaller)
    return smaller


def at_least_opset(model: onnx.ModelProto, opset: int, asked: str) -> onnx.ModelProto:
    """The model, rewritten in `opset` by ONNX's own converter if it is of an older one.

    Raises:
        ConfigError: it cannot be rewritten; `asked` says what needs it.
    """
    if opset_of(model) >= opset:
        return model
    if is_large(model):
        raise ConfigError(f"{asked} needs opset {opset}, and a model of over 2 GB cannot be rewritten: export it anew in that opset")
    try:
        return onnx.version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError) as error:  # the converter has no errors of its own
        raise ConfigError(
            f"{asked} needs opset {opset}, and a model of opset {opset_of(model)} cannot be rewritten ({first_line(error)}): export it anew"
        ) from error
