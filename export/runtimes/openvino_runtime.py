"""Students in OpenVINO: the ONNX files turned into its own form (IR), and run on the CPU.

Unit of data: one package, `<name>.<kind>.openvino.xml` with its weights in a `.bin` beside it. What `StudentInfo` says stands in the
package's `rt_info` under `distill_student`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.errors import BadInput, DistillError
from export.files import first_line
from export.label_space import Crops, Logits
from export.runtimes.runtime import Predict

if TYPE_CHECKING:
    from export.edge import StudentInfo
    from export.measured import MadeFile
    from export.packages import Networks, Package

INFO_KEY = "distill_student"


def open_file(path: Path, num_threads: int) -> Predict:
    """See `Runtime`."""
    import openvino as ov

    core = ov.Core()
    try:
        compiled = core.compile_model(
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
                weights_as=file.path,
            )
        )
    return Package(files=tuple(files))
