"""The variables of a published SimCLR checkpoint under one set of names, whichever of the official codes wrote it.

Unit of data: one list of names. The names that everything else uses are those of the official TF1 code, where k counts layers in the order
of their creation (numeric: conv2d is 0, conv2d_1 is 1):

    base_model/conv2d[_k]/kernel                                              [height, width, in, out]
    base_model/batch_normalization[_k]/{gamma,beta,moving_mean,moving_variance}
    head_contrastive/nl_J/dense/kernel, head_contrastive/nl_J/batch_normalization/{gamma,beta,...}      [in, out]
    head_supervised/linear_layer/dense/{kernel,bias}

In the order of creation a block's shortcut comes first, then its convolutions; a selective kernel is the 3x3, the squeeze, the mix.
`simclr_object_graph.py` finds the same order in TF2's files. What is no weight (optimiser slots, averages, counters) is sorted out here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

SimclrFormat = Literal["tf1", "tf2", "saved_model"]

OPTIMIZER, AVERAGES, MEMORY, COUNTERS, METRICS = "optimiser slots", "EMA copies", "memory", "counters", "metrics"
"""Kinds of what a checkpoint holds beside the weights."""

_NORM_PARTS = "gamma|beta|moving_mean|moving_variance"
_BACKBONE = re.compile(rf"base_model/(?P<layer>conv2d|batch_normalization)(?:_(?P<k>\d+))?/(?P<part>kernel|{_NORM_PARTS})")
_HEAD = re.compile(rf"head_contrastive/(?:nl|l)_(?P<j>\d+)/(?P<layer>dense|batch_normalization)(?:_\d+)?/(?P<part>kernel|{_NORM_PARTS})")
_SUPERVISED = re.compile(r"head_supervised/linear_layer/dense(?:_\d+)?/(?P<part>kernel|bias)")
_SLOT = re.compile(r"(?P<variable>.+)/(?:Momentum|LARS\w*|Adam|RMSProp|Adagrad|Adadelta|Ftrl)(?:_\d+)?")
_AVERAGE = re.compile(r"ema_model/(?P<prefixed>.+)|(?P<suffixed>.+)/ExponentialMovingAverage")
_ADAM_POWER = re.compile(r"(?:.*/)?beta[12]_power(?:_\d+)?")


@dataclass
class SimclrNames:
    """Which tensor of a bundle is which variable of the official network."""

    format: SimclrFormat
    weights: dict[str, str] = field(default_factory=dict)
    """Official name -> name in the bundle."""
    averages: dict[str, str] = field(default_factory=dict)
    """The same for exponential moving averages of the weights, where the file has them."""
    slots: dict[str, list[str]] = field(default_factory=dict)
    """Official name -> the names of its optimiser slots in the bundle; empty where the optimiser was not saved."""
    ignored: Counter[str] = field(default_factory=Counter)
    """How many tensors of each kind are not needed."""
    unknown: list[str] = field(default_factory=list)
    """Names in the bundle that belong to nothing known."""
    absent: list[str] = field(default_factory=list)
    """Names that the file itself lists, but holds no tensor for."""
    step_name: str | None = None
    """The tensor with the training step."""
    pooled_shortcut: bool | None = None
    """Whether shortcuts begin with a pool (ResNet-D, so sk_ratio > 0); None where the names do not say."""

    def ignore(self, kind: str) -> None:
        """Count a tensor that is not needed."""
        self.ignored[kind] += 1


def conv_name(k: int) -> str:
    """Official name of the kernel of the k-th convolution."""
    return f"base_model/conv2d{f'_{k}' if k else ''}/kernel"


def norm_name(k: int, part: str) -> str:
    """Official name of a part of the k-th batch norm of the backbone."""
    return f"base_model/batch_normalization{f'_{k}' if k else ''}/{part}"


def head_name(j: int, part: str) -> str:
    """Official name of a part of projection layer j: its kernel, or a part of its batch norm."""
    return f"head_contrastive/nl_{j}/{'dense' if part == 'kernel' else 'batch_normalization'}/{part}"


def supervised_name(part: str) -> str:
    """Official name of the kernel or the bias of the linear classifier."""
    return f"head_supervised/linear_layer/dense/{part}"


def official_name(name: str) -> str | None:
    """The official name of a TF1 variable; None for what is no weight of the network."""
    if (found := _BACKBONE.fullmatch(name)) is not None and (found["layer"] == "conv2d") == (found["part"] == "kernel"):
        k = int(found["k"] or 0)
        return conv_name(k) if found["layer"] == "conv2d" else norm_name(k, found["part"])
    if (found := _HEAD.fullmatch(name)) is not None and (found["layer"] == "dense") == (found["part"] == "kernel"):
        return head_name(int(found["j"]), found["part"])
    if (found := _SUPERVISED.fullmatch(name)) is not None:
        return supervised_name(found["part"])
    return None


def read_tf1_names(names: Sequence[str]) -> SimclrNames:
    """Sort the names of a TF1 checkpoint, or of a TF1 hub module."""
    found = SimclrNames("tf1")
    for name in names:
        official = official_name(name)
        average = _AVERAGE.fullmatch(name)
        slot = _SLOT.fullmatch(name)
        if official is not None:
            found.weights[official] = name
        elif average is not None and (averaged := official_name(average["prefixed"] or average["suffixed"])) is not None:
            found.averages[averaged] = name
            found.ignore(AVERAGES)
        elif slot is not None and (trained := official_name(slot["variable"])) is not None:
            found.slots.setdefault(trained, []).append(name)
            found.ignore(OPTIMIZER)
        elif _ADAM_POWER.fullmatch(name):
            found.ignore(OPTIMIZER)
        elif name == "global_step":
            found.step_name = name
            found.ignore(COUNTERS)
        elif name.split("/")[0].startswith("memory"):
            found.ignore(MEMORY)
        else:
            found.unknown.append(name)
    return found
