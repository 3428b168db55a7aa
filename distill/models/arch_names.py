"""A network in one word, as the command line writes it, to `NetworkSettings` and back.

Unit of data: one name. Ours are spelled `resnetDEPTH[-xWIDTH][-sk[RATIO]][-cifar]`. What is left out is width 1, no selective kernels, and
the ImageNet stem:

    resnet50            the plain ResNet-50 of SimCLRv2
    resnet152-x3-sk     the paper's largest: three times as wide, selective kernels of ratio 0.0625
    resnet18-x0.5-cifar half as wide, for small images
    timm:resnet50       timm's network of that name
"""

from __future__ import annotations

import re

from distill.config import validate
from distill.errors import ConfigError
from distill.models.settings import DEPTHS, NetworkSettings

PAPER_SK_RATIO = 0.0625
"""What `-sk` without a number means: the ratio of every published SimCLRv2 network with selective kernels."""
SPELLING = "resnetDEPTH[-xWIDTH][-sk[RATIO]][-cifar], such as resnet50, resnet152-x3-sk or resnet18-x0.5-cifar, or timm:NAME"

_NUMBER = r"\d+(?:\.\d+)?"
_OURS = re.compile(rf"resnet(?P<depth>\d+)(?:-x(?P<width>{_NUMBER}))?(?P<sk>-sk(?P<ratio>{_NUMBER})?)?(?P<cifar>-cifar)?")


def parse_arch(text: str) -> NetworkSettings:
    """The network that `text` names.

    Raises:
        ConfigError: another spelling, or a depth or width that no network of ours has.
    """
    if text.startswith("timm:") and text != "timm:":
        return NetworkSettings(name=text)
    found = _OURS.fullmatch(text)
    if found is None:
        raise ConfigError(f"arch {text!r} is not of the form {SPELLING}")
    depth, width = int(found["depth"]), float(found["width"] or 1)
    ratio = float(found["ratio"] or PAPER_SK_RATIO) if found["sk"] else 0.0
    if depth not in DEPTHS:
        raise ConfigError(
            f"arch {text!r}: {depth} is none of our depths {', '.join(map(str, DEPTHS))}; networks of others are timm:NAME, or come as ONNX"
        )
    if not 0 < width <= 16 or (found["sk"] and not 0 < ratio <= 1):
        raise ConfigError(f"arch {text!r}: the width is above 0 and at most 16, the ratio of selective kernels above 0 and at most 1")
    stem = "cifar" if found["cifar"] else "imagenet"
    named = {"depth": depth, "width_multiplier": width, "sk_ratio": ratio, "stem": stem}
    return validate(NetworkSettings, named, origin=f"arch {text!r}")


def arch_name(network: NetworkSettings) -> str:
    """The shortest name that `parse_arch` reads as `network`."""
    if network.name != "resnet":
        return network.name
    width = f"-x{network.width_multiplier:g}" if network.width_multiplier != 1 else ""
    ratio = "" if network.sk_ratio == PAPER_SK_RATIO else f"{network.sk_ratio:g}"
    kernels = f"-sk{ratio}" if network.sk_ratio > 0 else ""
    return f"resnet{network.depth}{width}{kernels}{'-cifar' if network.stem == 'cifar' else ''}"
