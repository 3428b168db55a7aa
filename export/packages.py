"""Students as packages of other runtimes than ONNX Runtime, each made by its module in `export.runtimes`.

Unit of data: one format, such as `openvino`. What is asked for and not installed is refused before anything is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

from torch import nn

from export.edge import StudentInfo, UnmeasuredFile
from export.label_space import Crops
from export.measured import MadeFile
from export.runtimes.runtime import require_installed
from export.settings import EdgeFormat


@dataclass(frozen=True)
class Networks:
    """A student in torch, for what is not made from its ONNX files."""

    floats: nn.Module
    """As it was trained."""
    int8: nn.Module
    """What its int8 file was made of: the same, or what fine-tuning for int8 made of it."""


@dataclass(frozen=True)
class Package:
    """What was made in one format."""

    files: tuple[MadeFile, ...] = ()
    not_measured: tuple[UnmeasuredFile, ...] = ()


class Converter(Protocol):
    """A module of `export.runtimes` that writes packages."""

    def convert(
        self, networks: Networks, onnx_files: Sequence[MadeFile], calibration_crops: Crops, info: StudentInfo, out_dir: Path
    ) -> Package:
        """Write the student's packages into `out_dir`.

        Args:
            networks: the student.
            onnx_files: its ONNX files, fp32 first.
            calibration_crops: uint8 [N,H,W,3], for what is quantised anew.

        Raises:
            DistillError: the package's converter refuses the student.
        """
        ...


CONVERTERS: Mapping[EdgeFormat, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "openvino": ("export.runtimes.openvino_runtime", ("openvino",)),
        "executorch": ("export.runtimes.executorch_runtime", ("executorch", "torchao")),
        "litert": ("export.runtimes.litert_runtime", ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")),
        "coreml": ("export.runtimes.coreml_package", ("coremltools",)),
    }
)
"""Format -> (module, importable packages that it cannot do without)."""


def require_formats(formats: Sequence[EdgeFormat]) -> None:
    """Refuse what cannot be made.

    Raises:
        ConfigError: a package is not installed.
    """
    for name in formats:
        if name != "onnx":
            require_installed(f"edge.formats: {name}", CONVERTERS[name][1], extra=name)


def make_packages(
    formats: Sequence[EdgeFormat],
    networks: Networks,
    onnx_files: Sequence[MadeFile],
    calibration_crops: Crops,
    info: StudentInfo,
    out_dir: Path,
) -> list[Package]:
    """The packages of all formats but `onnx`; arguments and errors as those of `Converter.convert`."""
    converters = [cast("Converter", importlib.import_module(CONVERTERS[name][0])) for name in formats if name != "onnx"]
    return [converter.convert(networks, onnx_files, calibration_crops, info, out_dir) for converter in converters]
