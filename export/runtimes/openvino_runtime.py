"""Students in OpenVINO: the ONNX files turned into its own form (IR), and run on the CPU.

Unit of data: one package, `<name>.<kind>.openvino.xml` with its weights in a `.bin` beside it. What `StudentInfo` says stands in the
package's `rt_info` under `distill_student`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.errors import BadInput, DistillError
from export.files import first_line
from export.label_space import Crops, Logits
from export.runtimes.runtime import Predict

if TYPE_CHECKING:
    import openvino as ov

    from export.edge import StudentInfo
    from export.measured import MadeFile
    from export.packages import Networks, Package

INFO_KEY = "distill_student"


@cache
def _core() -> ov.Core:
    """One for the process, never given back. Its CPU plugin gives the thread that loads it a signal stack and frees that at its own end, in
    whatever thread that is: the first signal that the loading thread then gets, Ctrl-C too, ends the process with SIGSEGV (2026.4.1)."""
    import openvino as ov

    return ov.Core()


def open_file(path: Path, num_threads: int) -> Predict:
    """See `Runtime`."""
    try:
        compiled = _core().compile_model(
            str(path),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": num_threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",  # as the file says, not bf16 where the processor has it
            },
        )
    except RuntimeError as error:
        raise BadInput(f"{path} does not load in OpenVINO: {first_line(error)}") from error
    request = compiled.create_infer_request()

    def predict(crops_BHWC: Crops) -> Logits:
        return np.array(request.infer([np.ascontiguousarray(crops_BHWC)])[0])  # a copy: the next run writes into the same memory

    return predict


def engine() -> str:
    """See `Runtime`."""
    import openvino as ov

    _core().get_property("CPU", "FULL_DEVICE_NAME")  # loads what runs on the CPU: memory is told without the runtime's own
    return f"OpenVINO {ov.__version__.partition('-')[0]}"


def convert(networks: Networks, onnx_files: Sequence[MadeFile], calibration_crops: Crops, info: StudentInfo, out_dir: Path) -> Package:
    """See `Converter`: fp32 and int8 from the ONNX files of the same kind. (fp16 is left out: OpenVINO would only store it so.)"""
    import openvino as ov

    from export.measured import MadeFile
    from export.packages import Package

    files = []
    for file in onnx_files:
        if file.kind == "fp16":
            continue
        path = out_dir / f"{info.name}.{file.kind}.openvino.xml"
        try:
            model = ov.convert_model(str(file.path))
            model.set_rt_info(info.model_dump_json(), INFO_KEY)
            ov.save_model(model, str(path), compress_to_fp16=False)
        except RuntimeError as error:
            raise DistillError(
                f"OpenVINO cannot convert {file.path.name}: {first_line(error)}; leave openvino out of edge.formats"
            ) from error
        files.append(
            MadeFile(
                file.kind,
                path,
                runtime="openvino",
                beside=(path.with_suffix(".bin"),),
                kept_in_float=file.kept_in_float,
                training_steps=file.training_steps,
                weight_shares=_weight_shares(path),
            )
        )
    return Package(files=tuple(files))


def _weight_shares(path: Path) -> tuple[float, float]:
    """Shares of int8 and of half precision among the elements of all constants of a package with more than one axis above 1: its weights.
    (Scales and biases have one.)"""
    import openvino as ov

    constants = [op for op in _core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    weights = [
        (op.get_element_type(), math.prod(op.get_output_shape(0))) for op in constants if sum(n > 1 for n in op.get_output_shape(0)) > 1
    ]
    total = sum(size for _, size in weights) or 1
    of_int8, of_half = (sum(size for held, size in weights if held == kind) / total for kind in (ov.Type.i8, ov.Type.f16))
    return of_int8, of_half
