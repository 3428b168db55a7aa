"""What is asked of a runtime: open a file, run crops through it, say who it is; and where to find each.

Unit of data: one file. Shapes: B crops, H W pixels, K classes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol, cast

from distill.errors import ConfigError
from distill.extras import how_to_install
from export.label_space import Crops, Logits

RuntimeName = Literal["onnxruntime", "openvino", "executorch", "litert"]
Predict = Callable[[Crops], Logits]
"""uint8 crops [B,H,W,3] -> logits [B,K]."""


class Runtime(Protocol):
    """A module of this package."""

    def open_file(self, path: Path, num_threads: int) -> Predict:
        """Load a file on the CPU with so many threads.

        Raises:
            BadInput: the file is missing or the runtime refuses it.
        """
        ...

    def engine(self) -> str:
        """Name and version, as a person would write them."""
        ...


@dataclass(frozen=True)
class Spec:
    """Where a runtime is."""

    module: str
    """Of ours."""
    needs: tuple[str, ...]
    """Importable packages that it cannot do without."""
    extra: str
    """Of ours, that installs them."""


RUNTIMES: Mapping[RuntimeName, Spec] = MappingProxyType(
    {
        "onnxruntime": Spec("export.runtimes.onnx_runtime", ("onnxruntime",), "cpu"),
        "openvino": Spec("export.runtimes.openvino_runtime", ("openvino",), "openvino"),
        "executorch": Spec("export.runtimes.executorch_runtime", ("executorch",), "executorch"),
        "litert": Spec("export.runtimes.litert_runtime", ("ai_edge_litert",), "litert"),
    }
)


def load_runtime(name: RuntimeName) -> Runtime:
    """The module of a runtime.

    Raises:
        ConfigError: its package is not installed; says how to install it.
    """
    spec = RUNTIMES[name]
    require_installed(name, spec.needs, spec.extra)
    return cast("Runtime", importlib.import_module(spec.module))


def require_installed(name: str, needs: Sequence[str], extra: str) -> None:
    """Refuse what lacks a package, such as a runtime; `extra` of ours brings it.

    Raises:
        ConfigError: says how to install it.
    """
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"{name} needs {', '.join(missing)}, which is not installed: {how_to_install(extra)}")
