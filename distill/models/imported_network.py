"""A user's own network by the name of the function that makes it, `MODULE:FUNCTION`. Nothing of it is ever stored but this name.

    MODULE is imported -> FUNCTION(num_classes=K) -> nn.Module: float [B,3,H,W], normalised -> logits [B,K]

The module must be importable wherever the network is built again: in every training worker, and where its checkpoint is read. What is
called gets one keyword argument, `num_classes`, as the constructors of timm and torchvision do, so a checkpoint from elsewhere can make no
function run that does not take it.

Unit of data: one network.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill.errors import ConfigError


def create_imported(name: str, num_classes: int, image_size: int) -> nn.Module:
    """The network that `MODULE:FUNCTION` makes, freshly initialised, in training mode.

    Args:
        name: such as `my_networks:tiny` or `torchvision.models:shufflenet_v2_x0_5`.
        num_classes: K.
        image_size: height and width, in pixels, of the crops that it will see.

    Raises:
        ConfigError: no such module or function, it fails, it returns something else than a Module, or the Module gives no [B,K] of floats
            for crops of this size, in evaluation or in training mode.
    """
    network = _call(_find(name), name, num_classes)
    _check_logits(network.eval(), "evaluation", name, num_classes, image_size)
    _check_logits(_twin(network, name).train(), "training", name, num_classes, image_size)
    return network.train()


def _find(name: str) -> Callable[..., Any]:
    from distill.models.timm_networks import repair_torchvision  # it may be torchvision's, or import it

    repair_torchvision()
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module runs here: whatever it raises is said in one line
        raise ConfigError(
            f"network {name!r}: {module_name} cannot be imported ({type(error).__name__}: {error});"
            " install it or name its folder in PYTHONPATH, on every machine that trains"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"network {name!r}: {module_name} has no function {function_name}")
    return function


def _call(function: Callable[..., Any], name: str, num_classes: int) -> nn.Module:
    try:
        network = function(num_classes=num_classes)
    except Exception as error:
        raise ConfigError(f"network {name!r}: called with num_classes={num_classes} it fails: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network {name!r} returned a {type(network).__name__}; a torch.nn.Module is needed")
    return network


def _twin(network: nn.Module, name: str) -> nn.Module:
    """A copy whose statistics may move."""
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise ConfigError(f"network {name!r} cannot be copied by copy.deepcopy: {type(error).__name__}: {error}") from error


def _check_logits(network: nn.Module, mode: str, name: str, num_classes: int, image_size: int) -> None:
    """One pass over two black crops; `mode` is that of the network, in words."""
    try:
        with torch.no_grad():
            logits_BK = network(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:
        raise ConfigError(
            f"network {name!r} in {mode} mode fails on float crops of shape [2, 3, {image_size}, {image_size}]:"
            f" {type(error).__name__}: {error}"
        ) from error
    if not isinstance(logits_BK, torch.Tensor) or not logits_BK.is_floating_point():
        raise ConfigError(
            f"network {name!r} in {mode} mode returned a {type(logits_BK).__name__} and no tensor of floats for two crops;"
            f" logits of shape [2, {num_classes}] are needed (a network with auxiliary outputs is to be made without them)"
        )
    if tuple(logits_BK.shape) != (2, num_classes):
        raise ConfigError(
            f"network {name!r} in {mode} mode returned shape {list(logits_BK.shape)} for two crops; [2, {num_classes}] is needed"
        )
