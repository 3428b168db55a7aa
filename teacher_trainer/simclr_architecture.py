"""Which network a published SimCLR checkpoint belongs to, found from the names and shapes of its variables.

Unit of data: one mapping of official names (`simclr_names.py`) to shapes. The sizes of the convolution kernels, in the order of their
creation, spell depth, stem and selective kernels; the widths give the width multiplier and sk_ratio; the head counts its own layers. What
is found is then held against our own network, name by name and shape by shape.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distill.config import validate
from distill.errors import CheckpointError
from distill.models.projection_head import ProjectionHead
from distill.models.resnet import BLOCKS_PER_GROUP, MIN_SK_WIDTH, BottleneckBlock, ResNet, Stem
from distill.models.settings import NetworkSettings
from teacher_trainer.simclr_names import conv_name, head_name, norm_name

Shape = tuple[int, ...]

NORM_PARTS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
"""Parts of a batch norm: the official name -> torch's."""
PAPER_SK_RATIO = 0.0625


@dataclass(frozen=True)
class Layout:
    """Depth, stem and selective kernels: what the kernel sizes tell apart."""

    depth: int
    stem: Stem
    selective: bool


@dataclass(frozen=True)
class Convolution:
    """One convolution of a layout: its side in pixels, and the group whose selective kernel it squeezes, if it does."""

    side: int
    squeezes_group: int | None = None


def convolutions(layout: Layout) -> Iterator[Convolution]:
    """The convolutions of a layout, in the order of their creation."""
    block, num_blocks = BLOCKS_PER_GROUP[layout.depth]
    if layout.stem == "cifar":
        yield Convolution(3)
    else:
        yield from [Convolution(3)] * 3 if layout.selective else [Convolution(7)]
    for group, count in enumerate(num_blocks):
        middle = [Convolution(3), Convolution(1, group), Convolution(1)] if layout.selective else [Convolution(3)]
        residual = [Convolution(1), *middle, Convolution(1)] if block is BottleneckBlock else [Convolution(3)] * 2
        for position in range(count):
            if position == 0:
                yield Convolution(1)  # the projection of the shortcut
            yield from residual


def find_network(shapes: Mapping[str, Shape], pooled_shortcut: bool | None, origin: str) -> NetworkSettings:
    """The backbone that the shapes spell.

    Args:
        shapes: of all weights, by official name.
        pooled_shortcut: whether the file says that shortcuts begin with a pool. Basic blocks have no selective kernels, so that under a
            CIFAR stem nothing else tells sk_ratio 0 from others.

    Raises:
        CheckpointError: these are the shapes of no ResNet that we have.
        ConfigError: they are of a width that leaves some layer no channel.
    """
    layout = _find_layout(shapes, pooled_shortcut, origin)
    widths = [shapes[conv_name(k)] for k in range(sum(1 for _ in convolutions(layout)))]
    block = BLOCKS_PER_GROUP[layout.depth][0]
    found = {
        "depth": layout.depth,
        "width_multiplier": _width_multiplier(widths[-1][3] // block.expansion, origin),
        "sk_ratio": _sk_ratio(layout, widths, origin) if layout.selective else 0.0,
        "stem": layout.stem,
    }
    return validate(NetworkSettings, found, origin)


def _find_layout(shapes: Mapping[str, Shape], pooled_shortcut: bool | None, origin: str) -> Layout:
    found = {k: shape[0] for k in range(len(shapes)) if len(shape := shapes.get(conv_name(k), ())) == 4}
    # Where both fit (basic blocks, CIFAR stem), what the file says of its shortcuts comes first; if it says nothing, no pool.
    selective_first = (True, False) if pooled_shortcut else (False, True)
    stems: tuple[Stem, ...] = ("imagenet", "cifar")
    layouts = [Layout(*one) for one in itertools.product(BLOCKS_PER_GROUP, stems, selective_first)]
    expected = {layout: {k: one.side for k, one in enumerate(convolutions(layout))} for layout in layouts}
    nearest = max(layouts, key=lambda layout: _agreement(found, expected[layout]))
    if found == expected[nearest]:
        return nearest
    kernels = expected[nearest]
    complaint = list_names(
        {
            "missing": [conv_name(k) for k in kernels.keys() - found.keys()],
            "left over": [conv_name(k) for k in found.keys() - kernels.keys()],
            "other kernel size": [conv_name(k) for k in kernels.keys() & found.keys() if kernels[k] != found[k]],
        }
    )
    raise CheckpointError(f"{origin} holds the weights of no ResNet that we have; the nearest has depth {nearest.depth} ({complaint})")


def _agreement(found: Mapping[int, int], expected: Mapping[int, int]) -> int:
    """Kernels that agree, less those that only one side has."""
    return sum(expected.get(k) == side for k, side in found.items()) - len(found.keys() ^ expected.keys())


def _width_multiplier(last_channels: int, origin: str) -> float:
    """The roundest multiplier that gives the last group so many channels (512 times the multiplier, cut off).

    All other groups follow from it: cutting off halves commutes.
    """
    width = next((w for w in _round_numbers(last_channels / 512, (last_channels + 1) / 512) if int(512 * w) == last_channels), None)
    if width is None or width > 16:
        raise CheckpointError(f"{origin}: {last_channels} channels in the last group are those of no width multiplier up to 16")
    return width


def _sk_ratio(layout: Layout, widths: list[Shape], origin: str) -> float:
    """The paper's ratio if it gives the squeezed widths that are found, else the roundest one that does.

    A squeezed width is the cut-off product of channels and ratio, but at least 32. Basic blocks have none: only that the ratio is not 0
    shows, in the stem.
    """
    squeezed = {(widths[k][2], widths[k][3]) for k, one in enumerate(convolutions(layout)) if one.squeezes_group is not None}
    at_least = max((mid / channels for channels, mid in squeezed if mid > MIN_SK_WIDTH), default=0.0)
    below = min(((mid + 1) / channels for channels, mid in squeezed), default=1.0)
    for ratio in (PAPER_SK_RATIO, *_round_numbers(max(at_least, below / 2), below)):
        if 0 < ratio <= 1 and all(mid == max(int(channels * ratio), MIN_SK_WIDTH) for channels, mid in squeezed):
            return ratio
    pairs = ", ".join(f"{mid} of {channels}" for channels, mid in sorted(squeezed))
    raise CheckpointError(f"{origin}: no sk_ratio gives the squeezed widths of its selective kernels ({pairs})")


def _round_numbers(low: float, high: float) -> Iterator[float]:
    """Numbers in [low, high): `low` if it is round itself (1/8, 1/32), then those with fewer decimals first, and `low` at last."""
    if round(low, 5) == low:
        yield low
    for decimals in range(7):
        number = math.ceil(low * 10**decimals) / 10**decimals
        if low <= number < high:
            yield number
    yield low


def count_head_layers(shapes: Mapping[str, Shape]) -> int:
    """Layers of the projection head: one more than the highest number, so that one that is missing in between is noticed."""
    return max((j + 1 for j in range(len(shapes)) if any(head_name(j, part) in shapes for part in ("kernel", *NORM_PARTS))), default=0)


@functools.lru_cache(maxsize=4)
def our_backbone(network: NetworkSettings) -> tuple[ResNet, Mapping[str, str]]:
    """Our backbone without memory for its weights, and official name -> its own name. Both are shared: to be read only."""
    with torch.device("meta"):
        backbone = ResNet(network.depth, network.width_multiplier, network.sk_ratio, network.stem)
    # Our modules are registered in the order in which the official code creates its layers.
    convs = [name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)]
    norms = [name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)]
    names = {conv_name(k): f"{name}.weight" for k, name in enumerate(convs)}
    return backbone, names | {norm_name(k, part): f"{name}.{ours}" for k, name in enumerate(norms) for part, ours in NORM_PARTS.items()}


@functools.lru_cache(maxsize=4)
def our_head(feature_dim: int, num_layers: int, embedding_dim: int) -> tuple[ProjectionHead, Mapping[str, str]]:
    """Our projection head without memory for its weights, and official name -> its own name. The last norm has no official offset.

    Both are shared: to be read only.
    """
    with torch.device("meta"):
        head = ProjectionHead(feature_dim, num_layers, embedding_dim)
    names = {head_name(j, "kernel"): f"layers.{j}.0.weight" for j in range(num_layers)}
    for j, (part, ours) in itertools.product(range(num_layers), NORM_PARTS.items()):
        if part != "beta" or j < num_layers - 1:
            names[head_name(j, part)] = f"layers.{j}.1.{ours}"
    return head, names


def torch_shape(official: Shape) -> Shape:
    """The shape of a variable in torch's order: [height, width, in, out] -> [out, in, height, width], [in, out] -> [out, in]."""
    return (official[3], official[2], official[0], official[1]) if len(official) == 4 else official[::-1]


def list_names(kinds: Mapping[str, list[str]], most: int = 20) -> str:
    """`missing: a, b, c ... (12 in all); left over: d`; kinds without names are left out."""
    parts = []
    for kind, names in kinds.items():
        more = f" ... ({len(names)} in all)" if len(names) > most else ""
        parts += [f"{kind}: {', '.join(sorted(names)[:most])}{more}"] if names else []
    return "; ".join(parts)
