"""Networks from timm (extra `timm`): students by name, and teachers that someone else trained. Nothing is ever downloaded.

Unit of data: one network, float [B,3,H,W] normalised -> logits [B,K], with what its authors say about its input.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from distill.crops import Interpolation
from distill.errors import ConfigError
from distill.extras import how_to_install
from distill.models.weight_files import fit_weights, read_weights, require_classes
from distill.teacher_info import Preprocessing

_REPAIRS: list[torch.library.Library] = []
"""Declarations of `repair_torchvision`; they hold as long as these objects live."""


@dataclass(frozen=True)
class TimmNetwork:
    """One network of timm and the input that its authors trained it for."""

    network: nn.Module
    """float [B,3,H,W], normalised -> logits [B,K]; in evaluation mode."""
    mean: tuple[float, float, float]
    """Of R, G, B on the scale 0 to 1."""
    std: tuple[float, float, float]
    """Of R, G, B on the scale 0 to 1."""
    image_size: int
    """Height and width, in pixels."""
    crop_ratio: float
    """timm's crop_pct: the shorter side is resized to image_size / crop_ratio, then the centre is cut."""
    interpolation: Interpolation
    """How images were resized; bilinear stands for timm's rare others too."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The contract between an image and this network."""
        return Preprocessing(
            image_size=self.image_size, mean=self.mean, std=self.std, crop_ratio=self.crop_ratio, interpolation=self.interpolation
        )


def create_timm(name: str, num_classes: int, weights: Path | None = None, use_ema: bool = False) -> TimmNetwork:
    """One of timm's networks, freshly initialised or with the weights of a local file.

    Args:
        name: timm's name, with or without the tag of a pretrained configuration (`resnet18`, `resnet18.a1_in1k`).
        num_classes: K.
        weights: a file that `read_weights` reads.
        use_ema: take the averaged weights of that file.

    Raises:
        ConfigError: timm is not installed, has no network of this name, none of square RGB input, or the file has other than K classes.
        CheckpointError: the weights cannot be read or belong to another network.
    """
    timm = import_timm_library()
    if ":" in name or "/" in name:
        raise ConfigError(f"timm network {name!r}: a plain name such as resnet50 is needed; nothing is downloaded")
    try:
        network = timm.create_model(name, pretrained=False, num_classes=num_classes)
    except (RuntimeError, ValueError) as error:
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"nearest are {', '.join(near)}" if near else "timm.list_models() names them all"
        raise ConfigError(f"timm has no network {name!r}; {hint}") from error
    if weights is not None:
        tensors = read_weights(weights, use_ema)
        require_classes(tensors, _classifiers(network), num_classes, str(weights))
        fit_weights(network, tensors, str(weights))
    network.eval()
    return _described(network, name)


def import_timm_library() -> ModuleType:
    """The timm package, with torchvision repaired first.

    Raises:
        ConfigError: timm is not installed.
    """
    repair_torchvision()
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"networks named timm:... need timm: {how_to_install('timm')}") from error
    return timm


def repair_torchvision() -> None:
    """Make `import torchvision` work beside the CPU build of torch. Call it before anything imports torchvision; twice does no harm.

    The torchvision wheel of the package index is built for CUDA. Beside a CPU torch its compiled part does not load, so the operators
    `nms` and `qnms` are never registered, and its Python part stops at once: "operator torchvision::nms does not exist". timm imports
    torchvision, so timm stops too. Classifiers use neither operator. Declaring their signatures, with nothing behind them, is enough.
    Where the compiled part does load, or torchvision is not installed, nothing is declared.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _REPAIRS or _loads_compiled_part(spec.submodule_search_locations or []):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _REPAIRS.append(library)


def _loads_compiled_part(folders: list[str]) -> bool:
    """Load torchvision's own operators, as its import would do next."""
    for folder in folders:
        for library in _compiled_parts(Path(folder)):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library))
                return True
    return False


def _compiled_parts(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.glob("_C*") if path.suffix in (".so", ".pyd"))


def _described(network: nn.Module, name: str) -> TimmNetwork:
    known = cast("dict[str, Any]", network.pretrained_cfg)
    channels, height, width = known["input_size"]
    if channels != 3 or height != width:
        raise ConfigError(f"timm network {name!r} takes input of shape {known['input_size']}; square RGB is needed")
    red, green, blue = known["mean"]
    red_std, green_std, blue_std = known["std"]
    return TimmNetwork(
        network=network,
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        image_size=height,
        crop_ratio=known["crop_pct"],
        interpolation="bicubic" if known["interpolation"] == "bicubic" else "bilinear",
    )


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give the logits: most networks have one, distilled ones two."""
    named = cast("dict[str, Any]", network.pretrained_cfg).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)
