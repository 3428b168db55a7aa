"""Networks from timm (extra `timm`): students by name, and teachers that someone else trained. Nothing is ever downloaded.

Unit of data: one network, float [B,3,H,W] normalised -> logits [B,K], with what its authors say about its input.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.checkpoint import load_weights
from distill.errors import CheckpointError, ConfigError
from distill.teacher_info import Preprocessing

_REPAIRS: list[torch.library.Library] = []
"""Declarations of `repair_torchvision`; they hold as long as these objects live."""

_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training scripts put the weights in a .pth file, averaged ones first."""


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
    interpolation: str
    """How images were resized: bilinear, bicubic, ..."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The contract between an image and this network."""
        return Preprocessing(image_size=self.image_size, mean=self.mean, std=self.std, crop_ratio=self.crop_ratio)


def create_timm(name: str, num_classes: int, weights: Path | None = None) -> TimmNetwork:
    """One of timm's networks, freshly initialised or with the weights of a local file.

    Args:
        name: timm's name, with or without the tag of a pretrained configuration (`resnet18`, `resnet18.a1_in1k`).
        num_classes: K.
        weights: a `.safetensors` file, or a `.pth` that holds nothing but tensors in containers: no pickle is executed.

    Raises:
        ConfigError: timm is not installed, has no network of this name, or none of square RGB input.
        CheckpointError: the weights cannot be read or belong to another network.
    """
    timm = import_timm_library()
    try:
        network = timm.create_model(name, pretrained=False, num_classes=num_classes)
    except (RuntimeError, ValueError) as error:
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"nearest are {', '.join(near)}" if near else "timm.list_models() names them all"
        raise ConfigError(f"timm has no network {name!r}; {hint}") from error
    if weights is not None:
        load_weights(network, read_weights(weights), str(weights))
    network.eval()
    return _described(network, name)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by name.

    Raises:
        CheckpointError: the file is missing, of another kind, or holds objects that only pickle could load.
    """
    try:
        tree: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path} do not exist") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors, and pickled code is never run: convert it to safetensors") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"weights {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if isinstance(tree, dict):
        tree = next((tree[key] for key in _STATE_KEYS if isinstance(tree.get(key), dict)), tree)
    if not isinstance(tree, dict) or not tree or not all(isinstance(value, Tensor) for value in tree.values()):
        raise CheckpointError(f"{path} holds no mapping of names to tensors")
    return {name.removeprefix("module."): value for name, value in tree.items()}


def import_timm_library() -> ModuleType:
    """The timm package, with torchvision repaired first.

    Raises:
        ConfigError: timm is not installed.
    """
    repair_torchvision()
    try:
        import timm
    except ImportError as error:
        raise ConfigError("networks named timm:... need timm: pip install 'distill-service[timm]'") from error
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
        interpolation=known["interpolation"],
    )
