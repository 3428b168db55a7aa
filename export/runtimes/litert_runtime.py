"""Students in LiteRT, once TensorFlow Lite, with XNNPACK for the CPU: `<name>.fp32.tflite` and `<name>.int8.tflite`.

int8 is quantised anew from the network, on the same calibration crops (weights per channel, activations int8, logits float). What
`StudentInfo` says lies in the file itself, in a zip archive behind the model, where TensorFlow Lite keeps what goes with a model: the
runtime does not look there. Batches run one crop at a time.

Unit of data: one file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.errors import BadInput, DistillError
from distill.machine import available_cores
from distill.wire import IMAGES, LOGITS
from export.files import first_line, write_atomically
from export.label_space import Crops, Logits
from export.runtimes.runtime import Predict

if TYPE_CHECKING:
    from torch import nn

    from export.edge import StudentInfo
    from export.measured import MadeFile
    from export.packages import Networks, Package

_log = logging.getLogger(__name__)

INFO_MEMBER = "distill.student.json"
"""The file in the archive behind the model."""


def open_file(path: Path, num_threads: int) -> Predict:
    """See `Runtime`."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=num_threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{path} does not load in LiteRT: {first_line(error)}") from error
    (images,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()

    def predict(crops_BHWC: Crops) -> Logits:
        logits_BK = np.empty((len(crops_BHWC), logits["shape"][-1]), np.float32)
        for row in range(len(crops_BHWC)):
            interpreter.set_tensor(images["index"], crops_BHWC[row : row + 1])
            interpreter.invoke()
            logits_BK[row] = interpreter.get_tensor(logits["index"])[0]
        return logits_BK

    return predict


def engine() -> str:
    """See `Runtime`."""
    import ai_edge_litert
    import ai_edge_litert.interpreter  # loads the runtime: memory is told without the runtime's own

    return f"LiteRT {ai_edge_litert.__version__} (XNNPACK)"


def convert(networks: Networks, onnx_files: Sequence[MadeFile], calibration_crops: Crops, info: StudentInfo, out_dir: Path) -> Package:
    """See `Converter`."""
    from export.graph import evaluating
    from export.measured import MadeFile
    from export.packages import Package

    files = []
    for kind, training_steps in ((file.kind, file.training_steps) for file in onnx_files if file.kind != "fp16"):
        path = out_dir / f"{info.name}.{kind}.tflite"
        network = networks.int8 if kind == "int8" else networks.floats
        try:
            with evaluating(network), _quiet():
                model = _shortened(_converted(network, info.preprocessing.image_size))
                if kind == "int8":
                    model = _quantised(model, calibration_crops)
        except (RuntimeError, ValueError, AssertionError, KeyError, TypeError) as error:  # of what the converter does not know
            raise DistillError(
                f"LiteRT cannot convert {info.name} ({kind}): {first_line(error)}; leave litert out of edge.formats"
            ) from error
        write_atomically(path, _with_info(model, info))
        files.append(MadeFile(kind, path, runtime="litert", training_steps=training_steps, weight_shares=_weight_shares(path)))
    return Package(files=tuple(files))


def _converted(network: nn.Module, image_size: int) -> bytes:
    """A model in fp32, whose tensors are named as in ONNX."""
    import litert_torch
    import torch
    from litert_converter.mlir.ir import MLIRError

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = network

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {LOGITS: self.student(images)}

    crop = torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8)
    try:
        return bytes(litert_torch.convert(Named().eval(), sample_kwargs={IMAGES: crop}).model_content())
    except MLIRError as error:  # derives from Exception alone
        raise ValueError(first_line(error)) from error


def _shortened(model: bytes) -> bytes:
    """Its tensors named by number: torch's names for them, a path of modules for every layer that went into one, took 45 kB of the 382 kB
    of a resnet10-quarter in int8."""
    from ai_edge_litert.tools import flatbuffer_utils

    read = flatbuffer_utils.read_model_from_bytearray(bytearray(model))
    for graph in read.subgraphs:
        for number, tensor in enumerate(graph.tensors):
            tensor.name = str(number)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(read))


def _quantised(model: bytes, crops: Crops) -> bytes:
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer
    from ai_edge_quantizer.recipe_manager import RecipeManager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    manager = RecipeManager()
    manager.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    manager.add_quantization_config(".*", TFLOperationName.OUTPUT, algorithm_key=AlgorithmName.NO_QUANTIZE)
    # Ranges of all crops. Its default, a moving average over them, cuts the largest off: KL 0.021 in place of 0.0008 on a resnet10-quarter.
    calibrator = Calibrator(model, num_threads=available_cores(), qsv_update_func=min_max_update)
    calibrator.calibrate({"serving_default": [{IMAGES: crops[row : row + 1]} for row in range(len(crops))]}, manager)
    return bytes(Quantizer(model, manager.get_quantization_recipe()).quantize(calibrator.get_model_qsvs()).quantized_model)


def _with_info(model: bytes, info: StudentInfo) -> bytes:
    whole = io.BytesIO(model)
    with zipfile.ZipFile(whole, "a") as archive:
        archive.writestr(zipfile.ZipInfo(INFO_MEMBER), info.model_dump_json())  # of 1980: the same student gives the same bytes
    return whole.getvalue()


def _weight_shares(path: Path) -> tuple[float, float]:
    """Shares of int8 and of half precision among the elements of all constants of a file with more than one axis above 1: its weights.
    (Scales and biases have one; integers of more bits are paddings and the like.)"""
    from ai_edge_litert.schema_py_generated import TensorType
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(path.read_bytes()))
    constants = [tensor for graph in model.subgraphs for tensor in graph.tensors if model.buffers[tensor.buffer].data is not None]
    weights = [
        (tensor.type, math.prod(tensor.shape))
        for tensor in constants
        if tensor.type not in (TensorType.INT32, TensorType.INT64) and sum(n > 1 for n in tensor.shape) > 1
    ]
    total = sum(size for _, size in weights) or 1
    of_int8, of_half = (sum(size for held, size in weights if held == kind) / total for kind in (TensorType.INT8, TensorType.FLOAT16))
    return of_int8, of_half


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send the converter's and the quantiser's chatter to our log; they warn of what other libraries will change one day, too."""
    spoken = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken):
            warnings.simplefilter("ignore")
            yield
    finally:
        for line in spoken.getvalue().splitlines():
            _log.debug("litert: %s", line)
