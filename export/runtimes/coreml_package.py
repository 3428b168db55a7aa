"""Students as Core ML packages, `<name>.fp16.mlpackage`: written on Linux, run on Apple's systems only, so not measured here.

Half precision is what Core ML computes in by default. The input is a float tensor of pixels 0 to 255, [1,H,W,3]: Core ML has no uint8
tensors. What `StudentInfo` says stands in the package's metadata under `distill.student`. Unit of data: one package.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distill.errors import DistillError
from export.files import first_line, sha256_of
from export.label_space import Crops

if TYPE_CHECKING:
    from export.edge import StudentInfo
    from export.measured import MadeFile
    from export.packages import Networks, Package


def convert(networks: Networks, onnx_files: Sequence[MadeFile], calibration_crops: Crops, info: StudentInfo, out_dir: Path) -> Package:
    """See `Converter`."""
    from distill.wire import IMAGES, LOGITS
    from export.edge import STUDENT_METADATA_KEY, UnmeasuredFile
    from export.graph import evaluating
    from export.packages import Package

    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it says at length which parts of it need macOS
    import coremltools as ct

    path = out_dir / f"{info.name}.fp16.mlpackage"
    size = info.preprocessing.image_size
    shutil.rmtree(path, ignore_errors=True)
    with evaluating(networks.floats), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(networks.floats, torch.zeros(1, size, size, 3))
            traced.eval()
            model = ct.convert(
                traced,
                inputs=[ct.TensorType(name=IMAGES, shape=(1, size, size, 3), dtype=np.float32)],
                outputs=[ct.TensorType(name=LOGITS)],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS16,
            )
        except (RuntimeError, ValueError, NotImplementedError, KeyError, TypeError) as error:  # whatever an unknown operator trips over
            raise DistillError(f"coremltools cannot convert {info.name}: {first_line(error)}; leave coreml out of edge.formats") from error
        model.user_defined_metadata[STUDENT_METADATA_KEY] = info.model_dump_json()
        model.save(str(path))
    files = sorted(part for part in path.rglob("*") if part.is_file())
    unmeasured = UnmeasuredFile(
        path=path.name,
        files={part.relative_to(out_dir).as_posix(): sha256_of(part) for part in files},
        size_bytes=sum(part.stat().st_size for part in files),
        reason="Core ML runs on Apple's systems only; it was converted here and never run, so its answers were never compared",
    )
    return Package(not_measured=(unmeasured,))
