"""Someone else's weights file -> names and tensors. No pickled object is ever loaded.

Unit of data: one `.safetensors` file, or one `.pth` (`.pt`, `.bin`) that holds tensors in containers. Training scripts wrap the weights:
in a dictionary beside the optimiser, in a DataParallel's or a compiled module's prefix, with a moving average (EMA) next to them.
"""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.checkpoint import load_weights
from distill.errors import CheckpointError, ConfigError

_PLAIN_KEYS = ("state_dict", "model_state_dict", "model")
_AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Put before every name by DataParallel and ModelEma, torch.compile, and Lightning."""
_MAX_NESTING = 4
_COUNTER = ".num_batches_tracked"

_log = logging.getLogger(__name__)


def read_weights(path: Path, use_ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without the prefixes that a wrapper put before all of them.

    Args:
        path: the file.
        use_ema: take the averaged weights that lie beside the plain ones.

    Raises:
        CheckpointError: the file is missing, of another kind, holds objects that only pickle could load, or not the weights asked for.
    """
    tree = _unwrapped(_load(path), path, use_ema)
    if not isinstance(tree, dict) or not tree or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tree.items()):
        raise CheckpointError(f"{path} holds no mapping of names to tensors; save the network's state_dict() alone")
    return _without_prefixes(tree)


def fit_weights(network: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Put weights into a network; every name must fit, but for the counters of batch norm, which evaluation never reads.

    Raises:
        CheckpointError: names that are missing, left over or of another shape, listed.
    """
    own = network.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith(_COUNTER)}  # files older than torch 0.4.1 have none
    load_weights(network, {**counters, **weights}, origin)


def require_classes(weights: dict[str, Tensor], classifiers: tuple[str, ...], num_class_names: int, origin: str) -> None:
    """Compare the classes of a file's classifier with the class list, so that the message can speak of classes and not of shapes.

    Args:
        classifiers: names of the layers whose first dimension is the classes.

    Raises:
        ConfigError: they are not as many.
    """
    for layer in classifiers:
        weight = weights.get(f"{layer}.weight")
        if weight is not None and weight.ndim and len(weight) != num_class_names:
            raise ConfigError(
                f"{origin} has {len(weight)} classes ({layer}.weight), the class list has {num_class_names}: they must be equal"
            )


def _load(path: Path) -> Any:
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path} do not exist") from error
    except pickle.UnpicklingError as error:
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if foreign is None:
            raise CheckpointError(f"weights {path} cannot be read: neither a torch file nor, by its name, safetensors") from error
        raise CheckpointError(
            f"{path} holds more than tensors ({foreign[1]}), and pickled code is never run: save its state_dict() alone, or as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or "it ends too early"
        raise CheckpointError(f"weights {path} cannot be read: {reason}") from error
    except MemoryError:
        raise
    except Exception as error:  # foreign or cut bytes fail as a pickle in any way
        raise CheckpointError(f"weights {path} cannot be read: no torch file, or a damaged one ({type(error).__name__})") from error


def _unwrapped(tree: Any, path: Path, use_ema: bool) -> Any:
    """The innermost dictionary of weights, plain or averaged."""
    averaged = _key_of_dict(tree, _AVERAGED_KEYS)
    plain = _key_of_dict(tree, _PLAIN_KEYS)
    if use_ema and averaged is None:
        raise CheckpointError(f"{path} holds no averaged weights (one of {', '.join(_AVERAGED_KEYS)}); leave --ema (use_ema) out")
    if averaged and not use_ema:
        if plain is None:
            raise CheckpointError(f"{path} holds averaged weights only ({averaged}); take them with --ema (use_ema)")
        _log.warning("%s also holds averaged weights (%s), left out; --ema (use_ema) takes them", path, averaged)
    key = averaged if use_ema else plain
    for _ in range(_MAX_NESTING):
        if key is None:
            break
        tree = tree[key]
        key = _key_of_dict(tree, _PLAIN_KEYS)
    return tree


def _key_of_dict(tree: Any, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if isinstance(tree.get(key), dict)), None) if isinstance(tree, dict) else None


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
