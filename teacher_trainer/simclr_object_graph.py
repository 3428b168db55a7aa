"""The variables of a TF2 checkpoint of SimCLR, found by walking the objects of the official model.

Unit of data: one object graph (TrackableObjectGraph, tensorflow/core/protobuf/trackable_object_graph.proto), which TF2 stores in every
checkpoint under one key: objects, the names by which they hold each other, their variables with the key of the tensor and the variable's
full name. Keys cannot be trusted: a checkpoint's are paths (`model/resnet_model/block_groups/0/...`), a SavedModel's are positions
(`model/resnet_model/variables/159`). The graph is the same in both. Where it does not show the model's parts, the full names do.

A moving average (EMA) of the weights is a second model beside the first (`ema_model/...`), or an optimiser's slots called `average`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from distill.errors import CheckpointError
from teacher_trainer.protobuf_wire import fields, messages, text
from teacher_trainer.simclr_names import (
    AVERAGES,
    COUNTERS,
    METRICS,
    OPTIMIZER,
    SimclrFormat,
    SimclrNames,
    conv_name,
    head_name,
    norm_name,
    official_name,
    supervised_name,
)
from teacher_trainer.tensor_bundle import TensorBundle

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NORM_PARTS = ("gamma", "beta", "moving_mean", "moving_variance")
_AVERAGE = re.compile(r"ema|average", re.IGNORECASE)
"""In the name by which a moving average of the model is held."""
_AVERAGE_SLOT = "average"
_SELECTIVE_KERNEL = ("conv2d_fixed_padding", "batch_norm_relu", "conv2d_0", "batch_norm_relu_1", "conv2d_1")
"""Parts of the official SK_Conv2D, in the order of their creation."""


@dataclass
class _Object:
    """One object of the graph."""

    children: dict[str, int] = field(default_factory=dict)
    key: str = ""
    full_name: str = ""


def read_tf2_names(bundle: TensorBundle, form: SimclrFormat) -> SimclrNames:
    """Sort the names of a TF2 checkpoint or SavedModel.

    Raises:
        CheckpointError: the object graph in the file is damaged.
    """
    objects = _read_objects(bundle) if OBJECT_GRAPH in bundle else _objects_of_keys(bundle.names())
    plain, averaged = _apart(objects)
    keys = _structural_keys(plain) or _keys_by_full_name(plain)
    if not keys:  # an average alone: it is the network
        plain, averaged = objects, []
        keys = _structural_keys(plain) or _keys_by_full_name(plain)
    found = SimclrNames(form, pooled_shortcut=_pooled_shortcut(plain))
    found.weights = {official: key for official, key in keys.items() if key in bundle}
    found.absent = sorted(key for key in keys.values() if key not in bundle)
    copies = _structural_keys(averaged) or _keys_by_full_name(averaged)
    found.averages = {official: key for official, key in copies.items() if official in keys and key in bundle}
    _read_slots(bundle.names(), objects, keys, found)
    _sort_rest(bundle.names(), found, {one.key for one in averaged})
    return found


def _apart(objects: list[_Object]) -> tuple[list[_Object], list[_Object]]:
    """The objects of the network and those of its average, each with blanks in the place of the others: average is what is reached only
    by a name that says so."""
    plain, averaged = _reached(objects, [0], _AVERAGE), set[int]()
    for one in (objects[place] for place in plain):
        averaged |= _reached(objects, [child for name, child in one.children.items() if _AVERAGE.search(name)]) - plain
    blank = _Object()
    return (
        [blank if place in averaged else one for place, one in enumerate(objects)],
        [one if place in averaged else blank for place, one in enumerate(objects)],
    )


def _reached(objects: list[_Object], starts: Sequence[int], but_by: re.Pattern[str] | None = None) -> set[int]:
    """Places of the objects that can be reached from some, but not by names of a kind."""
    reached, waiting = set[int](), list(starts)
    while waiting:
        place = waiting.pop()
        if place < len(objects) and place not in reached:
            reached.add(place)
            waiting += [child for name, child in objects[place].children.items() if but_by is None or not but_by.search(name)]
    return reached


def _read_objects(bundle: TensorBundle) -> list[_Object]:
    try:
        objects = [_parse_object(message) for message in messages(memoryview(bundle.read_text(OBJECT_GRAPH)), 1)]
    except ValueError as error:
        raise CheckpointError(f"the object graph in {bundle.prefix} is damaged ({error}); copy or download it again") from error
    if any(not 0 <= child < len(objects) for one in objects for child in one.children.values()):
        raise CheckpointError(f"the object graph in {bundle.prefix} is damaged (it names an object that is not there)")
    return objects


def _parse_object(message: memoryview) -> _Object:
    parsed = _Object()
    for child in messages(message, 1):
        parsed.children[text(child, 2)] = _number(child, 1)
    for attribute in messages(message, 2):
        if text(attribute, 1) == "VARIABLE_VALUE":
            parsed.full_name, parsed.key = text(attribute, 2), text(attribute, 3)
    return parsed


def _number(message: memoryview, number: int) -> int:
    value = dict(fields(message)).get(number, 0)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return value


def _objects_of_keys(names: Sequence[str]) -> list[_Object]:
    """The tree that the keys spell, for a file without its object graph."""
    objects = [_Object()]
    for name in names:
        if not name.endswith(_VALUE) or "/.OPTIMIZER_SLOT/" in name:
            continue
        place = 0
        for part in name.removesuffix(_VALUE).split("/"):
            if part not in objects[place].children:
                objects[place].children[part] = len(objects)
                objects.append(_Object())
            place = objects[place].children[part]
        objects[place].key = name
    return objects


def _structural_keys(objects: list[_Object]) -> dict[str, str]:
    """Official name -> key, by the attributes of the official classes; empty where the graph does not show them."""
    backbone = _holder_of(objects, "initial_conv_relu_max_pool", "block_groups")
    if backbone is None:
        return {}
    keys: dict[str, str] = {}
    num_convs = num_norms = 0
    for place in _backbone_layers(objects, backbone):
        children = objects[place].children
        if "kernel" in children:
            keys[conv_name(num_convs)] = objects[children["kernel"]].key
            num_convs += 1
        else:
            keys |= {norm_name(num_norms, part): objects[children[part]].key for part in _NORM_PARTS if part in children}
            num_norms += 1
    head = _holder_of(objects, "linear_layers")
    for j, layer in enumerate(_items(objects, head, "linear_layers")):
        if (kernel := _follow(objects, layer, "dense", "kernel")) is not None:
            keys[head_name(j, "kernel")] = objects[kernel].key
        for part in _NORM_PARTS:
            if (variable := _follow(objects, layer, "bn_relu", "bn", part)) is not None:
                keys[head_name(j, part)] = objects[variable].key
    classifier = _holder_of(objects, "linear_layer")
    for part in ("kernel", "bias"):
        if classifier is not None and (variable := _follow(objects, classifier, "linear_layer", "dense", part)) is not None:
            keys[supervised_name(part)] = objects[variable].key
    return keys if all(keys.values()) else {}


def _backbone_layers(objects: list[_Object], backbone: int) -> Iterator[int]:
    """The convolutions and batch norms of the backbone, in the order of their creation."""
    yield from _layers(objects, _items(objects, backbone, "initial_conv_relu_max_pool"))
    for block in _blocks(objects, backbone):
        for holder in ("projection_layers", "shortcut_layers", "conv_relu_dropblock_layers", "conv2d_bn_layers"):
            yield from _layers(objects, _items(objects, block, holder))


def _blocks(objects: list[_Object], backbone: int) -> Iterator[int]:
    for group in _items(objects, backbone, "block_groups"):
        yield from _items(objects, group, "layers")


def _layers(objects: list[_Object], places: Sequence[int]) -> Iterator[int]:
    for place in places:
        children = objects[place].children
        if "conv2d_0" in children:
            yield from _layers(objects, [children[part] for part in _SELECTIVE_KERNEL if part in children])
        elif "kernel" in children:
            yield place
        else:
            yield from (children[part] for part in ("conv2d", "bn") if part in children)


def _pooled_shortcut(objects: list[_Object]) -> bool | None:
    """Whether a pool comes before the convolution of the first shortcut; None where the graph does not show it."""
    backbone = _holder_of(objects, "initial_conv_relu_max_pool", "block_groups")
    first_block = next(iter(_blocks(objects, backbone)), None) if backbone is not None else None
    for holder in ("projection_layers", "shortcut_layers"):
        layers = _follow(objects, first_block, holder) if first_block is not None else None
        if layers is not None:
            names = [name for name, place in objects[layers].children.items() if "conv2d" in objects[place].children]
            return names != ["0"] if names else None
    return None


def _holder_of(objects: list[_Object], *names: str) -> int | None:
    """The first object that holds others by all these names."""
    return next((place for place, one in enumerate(objects) if all(name in one.children for name in names)), None)


def _items(objects: list[_Object], holder: int | None, name: str) -> list[int]:
    """The members of a list that an object holds, in order."""
    if holder is None or name not in objects[holder].children:
        return []
    members = objects[objects[holder].children[name]].children
    return [members[number] for number in sorted((n for n in members if n.isdecimal()), key=int)]


def _follow(objects: list[_Object], place: int, *names: str) -> int | None:
    for name in names:
        if name not in objects[place].children:
            return None
        place = objects[place].children[name]
    return place


def _keys_by_full_name(objects: list[_Object]) -> dict[str, str]:
    """Official name -> key, by the full names of the variables: their layers are numbered in the order of creation, as in TF1."""
    named: dict[str, str] = {}
    for one in objects:
        of_optimizer = one.key.startswith("optimizer/") or "/.OPTIMIZER_SLOT/" in one.key
        official = None if of_optimizer else official_of_full_name(one.full_name)
        if official is not None:
            named[official] = one.key
    return {_from_zero(official, named): key for official, key in named.items()}


def official_of_full_name(full_name: str) -> str | None:
    """The official name of a TF2 variable such as `resnet/block_group1/bottleneck_block/conv2d_fixed_padding_3/conv2d_3/kernel`."""
    name = full_name.removesuffix(":0")
    last_two = re.search(r"(?:^|/)((?:sync_)?batch_normalization(?:_\d+)?|conv2d(?:_\d+)?|dense(?:_\d+)?)/(\w+)$", name)
    if last_two is None:
        return None
    tail = f"{last_two[1].removeprefix('sync_')}/{last_two[2]}"
    if (layer := re.search(r"(?:^|/)projection_head(?:_\d+)?/(n?l_\d+)/", name)) is not None:
        return official_name(f"head_contrastive/{layer[1]}/{tail}")
    if re.search(r"(?:^|/)head_supervised(?:_\d+)?/linear_layer/", name):
        return official_name(f"head_supervised/linear_layer/{tail}")
    return official_name(f"base_model/{tail}") if re.search(r"(?:^|/)resnet(?:_\d+)?/", name) else None


def _from_zero(official: str, named: dict[str, str]) -> str:
    """The number of a layer counted from 0: it begins higher where the process had built another model before."""
    for layer in ("conv2d", "batch_normalization"):
        prefix = re.compile(rf"base_model/{layer}(?:_(\d+))?/(\w+)")
        if (found := prefix.fullmatch(official)) is not None:
            first = min(int(other[1] or 0) for name in named if (other := prefix.fullmatch(name)) is not None)
            k = int(found[1] or 0) - first
            return conv_name(k) if layer == "conv2d" else norm_name(k, found[2])
    return official


def _read_slots(names: Sequence[str], objects: list[_Object], keys: dict[str, str], found: SimclrNames) -> None:
    """Which variables have optimiser slots, and which of these are averages. Newer optimisers hold theirs in a list, where only the full
    name says of what they are."""
    officials = {key: official for official, key in keys.items()}
    for name in names:
        of, is_slot, slot = name.removesuffix(_VALUE).partition("/.OPTIMIZER_SLOT/")
        if is_slot and of + _VALUE in officials:
            _add_slot(found, officials[of + _VALUE], name, slot.split("/"))
    for one in objects:
        official = official_of_full_name(one.full_name) if one.key.startswith("optimizer/") else None
        if official is not None and official in keys and one.key in names:
            _add_slot(found, official, one.key, one.full_name.split("/"))


def _add_slot(found: SimclrNames, official: str, name: str, named: Sequence[str]) -> None:
    if _AVERAGE_SLOT in named:
        found.averages.setdefault(official, name)
    else:
        found.slots.setdefault(official, []).append(name)


def _sort_rest(names: Sequence[str], found: SimclrNames, of_average: set[str]) -> None:
    """Sort out every tensor that is no weight; `of_average` are those that a moving average of the model holds."""
    weights, averages = set(found.weights.values()), set(found.averages.values())
    for name in names:
        path = name.removesuffix(_VALUE)
        if name in weights or name == OBJECT_GRAPH:
            continue
        if name in averages:
            found.ignore(AVERAGES)
        elif "/.OPTIMIZER_SLOT/" in path:
            found.ignore(OPTIMIZER)
        elif path in ("global_step", "optimizer/iter", "optimizer/_iterations", "save_counter", "step"):
            found.ignore(COUNTERS)
            if path == "global_step" or (path != "save_counter" and found.step_name is None):
                found.step_name = name
        elif path.startswith("optimizer/"):
            found.ignore(OPTIMIZER)
        elif "/keras_api/metrics/" in path:
            found.ignore(METRICS)
        elif name in of_average:
            found.ignore(AVERAGES)
        else:
            found.unknown.append(name)
