"""Writes what TensorFlow writes, for the tests of the import: tensor bundles, object graphs, saved graphs, and our networks in them.

The order of layers and the paths of objects are spelled out here from the official classes, apart from the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from distill.models.projection_head import ProjectionHead
from distill.models.resnet import BLOCKS_PER_GROUP, BottleneckBlock, ResNet
from teacher_trainer.crc32c import masked_crc32c

Tensors = dict[str, Any]
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
MAGIC = 0xDB4775248B80FB57


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def proto(number: int, value: int | bytes | str) -> bytes:
    """One field of a message: a number or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def block(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block of a sorted table, with a full key at every 16th entry."""
    out, restarts, last = bytearray(), [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % 16 == 0:
            restarts.append(len(out))
        else:
            shared = next((i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return bytes(out) + b"".join(n.to_bytes(4, "little") for n in [*(restarts or [0]), len(restarts or [0])])


def table(entries: dict[str, bytes], snappy: bool) -> bytes:
    """A sorted table with blocks of 20 entries."""
    file = bytearray()

    def add(content: bytes) -> bytes:
        stored = (pa.Codec("snappy").compress(content, asbytes=True) if snappy else content) + bytes([snappy])
        handle = varint(len(file)) + varint(len(stored) - 1)
        file.extend(stored + masked_crc32c(stored).to_bytes(4, "little"))
        return handle

    keys = sorted(key.encode() for key in entries)
    parts = [keys[i : i + 20] for i in range(0, len(keys), 20)]
    index = [(part[-1] + b"\0", add(block((key, entries[key.decode()]) for key in part))) for part in parts]
    handles = add(block([])) + add(block(index))
    return bytes(file) + handles.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def write_bundle(prefix: Path, tensors: Tensors, *, num_shards: int = 1, snappy: bool = False, big_endian: bool = False) -> None:
    """Write a bundle. Values are arrays, or bytes for a scalar string; uint16 arrays are taken for bfloat16."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    shards = [bytearray() for _ in range(num_shards)]
    entries = {"": proto(1, num_shards) + proto(2, int(big_endian)) + proto(3, proto(1, 1))}
    for number, (name, value) in enumerate(sorted(tensors.items())):
        if isinstance(value, bytes):
            length = len(value).to_bytes(4, "little")
            checked = masked_crc32c(length).to_bytes(4, "little") + value
            data, summed, dtype, shape = varint(len(value)) + checked, length + checked, 7, ()
        else:
            data = summed = value.astype(value.dtype.newbyteorder(">" if big_endian else "<")).tobytes()
            dtype, shape = DTYPES.get(str(value.dtype), 14), value.shape
        shard = number % num_shards
        dimensions = b"".join(proto(2, proto(1, size)) for size in shape)
        crc = varint(6 << 3 | 5) + masked_crc32c(summed).to_bytes(4, "little")
        where = proto(3, shard) + proto(4, len(shards[shard])) + proto(5, len(data))
        entries[name] = proto(1, dtype) + proto(2, dimensions) + where + crc
        shards[shard] += data
    prefix.with_name(prefix.name + ".index").write_bytes(table(entries, snappy))
    for shard, content in enumerate(shards):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}").write_bytes(content)


@dataclass(frozen=True)
class Layer:
    """One convolution or batch norm: our module, the object path of TF2's layer, the scope of its full name."""

    module: str
    path: str
    scope: str


def backbone_layers(depth: int, stem: str, sk: bool) -> Iterator[Layer]:
    """The layers of the official ResNet in the order of creation."""
    first = "initial_conv_relu_max_pool"
    resnet_d = [(0, 0), (1, 1), (3, 2), (4, 3), (6, 4), (7, 6)]
    for ours, theirs in resnet_d if stem == "imagenet" and sk else [(0, 0), (1, 2)]:
        yield Layer(f"stem.{ours}", f"{first}/{theirs}", "resnet")
    block_type, counts = BLOCKS_PER_GROUP[depth]
    bottleneck = block_type is BottleneckBlock
    for group, count in enumerate(counts):
        for number in range(count):
            ours, theirs = f"groups.{group}.{number}", f"block_groups/{group}/layers/{number}"
            scope = f"resnet/block_group{group + 1}/{'bottleneck' if bottleneck else 'residual'}_block"
            if number == 0:
                pooled = (1 if group == 0 else 2) if sk else 0  # (padding and) pool come first
                shortcut = f"{theirs}/{'projection' if bottleneck else 'shortcut'}_layers"
                yield Layer(f"{ours}.shortcut.{int(sk)}", f"{shortcut}/{pooled}", scope)
                yield Layer(f"{ours}.shortcut.{int(sk) + 1}", f"{shortcut}/{pooled + 1}", scope)
            if not bottleneck:
                for mine, its in ((0, 0), (1, 1), (3, 2), (4, 3)):
                    yield Layer(f"{ours}.residual.{mine}", f"{theirs}/conv2d_bn_layers/{its}", scope)
                continue
            convs = f"{theirs}/conv_relu_dropblock_layers"
            yield Layer(f"{ours}.residual.0", f"{convs}/0", scope)
            yield Layer(f"{ours}.residual.1", f"{convs}/1", scope)
            if sk:
                inner = ("streams.0", "conv2d_fixed_padding"), ("streams.1", "batch_norm_relu"), ("squeeze.0", "conv2d_0")
                for mine, its in (*inner, ("squeeze.1", "batch_norm_relu_1"), ("select", "conv2d_1")):
                    yield Layer(f"{ours}.residual.3.{mine}", f"{convs}/3/{its}", f"{scope}/sk__conv2d")
            else:
                yield Layer(f"{ours}.residual.3.0", f"{convs}/3", scope)
                yield Layer(f"{ours}.residual.3.1", f"{convs}/4", scope)
            shift = 0 if sk else 1
            yield Layer(f"{ours}.residual.4", f"{convs}/{5 + shift}", scope)
            yield Layer(f"{ours}.residual.5", f"{convs}/{6 + shift}", scope)


@dataclass(frozen=True)
class Variable:
    """One variable of a network under all its names."""

    tf1: str
    path: str
    full_name: str
    value: np.ndarray[Any, Any]


@dataclass
class Official:
    """A network of ours with random weights, and its variables as the official codes name them."""

    depth: int = 18
    width: float = 1 / 16
    sk: float = 0.0
    stem: str = "imagenet"
    num_head_layers: int = 3
    embedding_dim: int = 24
    classifier_after: int | None = 1
    num_classes: int = 5
    bn: str = "batch_normalization"
    variables: list[Variable] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        after = self.classifier_after or 0
        with torch.device("meta"):
            self.backbone = ResNet(self.depth, self.width, self.sk, self.stem)  # type: ignore[arg-type]
            self.head = ProjectionHead(self.backbone.feature_dim, self.num_head_layers, self.embedding_dim)
            features = self.embedding_dim if after and after == self.num_head_layers else self.backbone.feature_dim
            self.linear = nn.Linear(features, self.num_classes)
        for module in (self.backbone, self.head, self.linear):
            module.to_empty(device="cpu").eval().requires_grad_(False)
            for name, tensor in module.state_dict().items():
                if "num_batches" in name:
                    tensor.zero_()
                elif "running_var" in name or ("weight" in name and tensor.ndim == 1):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                else:
                    tensor.uniform_(-0.5, 0.5, generator=generator)
        if self.num_head_layers:
            self.head.layers[-1][1].bias.zero_()  # type: ignore[index, union-attr]
        self.variables = [*self._of_backbone(), *self._of_head()]

    def classify(self, features: Tensor) -> Tensor:
        """Logits of what the backbone gives."""
        for layer in list(self.head.layers)[: self.classifier_after]:
            features = layer(features)
        return self.linear(features)

    def tf1(self) -> Tensors:
        """The tensors of a TF1 checkpoint."""
        return {one.tf1: one.value for one in self.variables}

    def _of_backbone(self) -> Iterator[Variable]:
        modules = dict(self.backbone.named_modules())
        convs = norms = 0
        for layer in backbone_layers(self.depth, self.stem, self.sk > 0):
            module, path = modules[layer.module], f"model/resnet_model/{layer.path}"
            if isinstance(module, nn.Conv2d):
                k, convs = f"_{convs}" if convs else "", convs + 1
                inner = "" if path.endswith(("conv2d_0", "conv2d_1")) else "/conv2d"
                full = f"{layer.scope}{'/conv2d_fixed_padding' + k if inner else ''}/conv2d{k}/kernel"
                value = module.weight.permute(2, 3, 1, 0).numpy()
                yield Variable(f"base_model/conv2d{k}/kernel", f"{path}{inner}/kernel", full, value)
            else:
                assert isinstance(module, nn.BatchNorm2d)
                k, norms = f"_{norms}" if norms else "", norms + 1
                for part, value in norm_parts(module).items():
                    full = f"{layer.scope}/batch_norm_relu{k}/{self.bn}{k}/{part}"
                    yield Variable(f"base_model/batch_normalization{k}/{part}", f"{path}/bn/{part}", full, value)

    def _of_head(self) -> Iterator[Variable]:
        for j, layer in enumerate(self.head.layers):
            dense, norm = layer[0], layer[1]  # type: ignore[index]
            path, full = f"model/_projection_head/linear_layers/{j}", f"projection_head/nl_{j}"
            name = f"head_contrastive/nl_{j}"
            yield Variable(f"{name}/dense/kernel", f"{path}/dense/kernel", f"{full}/dense_{j}/kernel", dense.weight.T.numpy())
            for part, value in norm_parts(norm).items():
                if part != "beta" or j < self.num_head_layers - 1:
                    scope = f"{full}/batch_norm_relu_9{j}/{self.bn}_9{j}"
                    yield Variable(f"{name}/batch_normalization/{part}", f"{path}/bn_relu/bn/{part}", f"{scope}/{part}", value)
        if self.classifier_after is not None:
            for part, value in (("kernel", self.linear.weight.T.numpy()), ("bias", self.linear.bias.numpy())):
                name, path = f"linear_layer/dense/{part}", f"model/supervised_head/linear_layer/dense/{part}"
                yield Variable(f"head_supervised/{name}", path, f"head_supervised/linear_layer/dense_7/{part}", value)


def norm_parts(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> dict[str, np.ndarray[Any, Any]]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    parts = {"gamma": norm.weight, "beta": norm.bias, "moving_mean": norm.running_mean, "moving_variance": norm.running_var}
    return {part: tensor.detach().numpy() for part, tensor in parts.items()}


def tf2_tensors(official: Official, *, step: int = 7, slots: Callable[[str], bool] | None = None) -> Tensors:
    """The tensors of a `tf.train.Checkpoint`; `slots` says by object path which variables were trained."""
    tensors: Tensors = {one.path + VALUE: one.value for one in official.variables}
    names = {one.path: one.full_name for one in official.variables}
    for one in official.variables if slots is not None else ():
        if slots is not None and "moving" not in one.path and slots(one.path):
            tensors[f"{one.path}/.OPTIMIZER_SLOT/optimizer/Momentum{VALUE}"] = np.full_like(one.value, 0.1)
    tensors |= {"global_step" + VALUE: np.int64(step).reshape(()), "save_counter" + VALUE: np.int64(1).reshape(())}
    keys = {path: path + VALUE for path in names}
    return tensors | {"_CHECKPOINTABLE_OBJECT_GRAPH": object_graph(keys, names)}


def saved_model_tensors(official: Official, *, structure: bool) -> Tensors:
    """The tensors of a SavedModel: keys are positions; without `structure` only full names tell what is what."""
    ordered = sorted(official.variables, key=lambda one: (not one.tf1.endswith(("kernel", "gamma", "beta", "bias")), one.path[::-1]))
    keys = {one.path: f"model/variables/{i}{VALUE}" for i, one in enumerate(ordered)}
    names = {one.path: one.full_name for one in ordered}
    if not structure:
        names = {keys[path].removesuffix(VALUE): name for path, name in names.items()}
    graph = object_graph({path: keys.get(path, path + VALUE) for path in names}, names)
    return {keys[one.path]: one.value for one in ordered} | {"_CHECKPOINTABLE_OBJECT_GRAPH": graph}


def object_graph(keys: Mapping[str, str], full_names: Mapping[str, str]) -> bytes:
    """A TrackableObjectGraph: path of an object -> key of its tensor and full name."""
    children: list[dict[str, int]] = [{}]
    at: dict[int, str] = {}
    for path in keys:
        place = 0
        for part in path.split("/"):
            if part not in children[place]:
                children[place][part] = len(children)
                children.append({})
            place = children[place][part]
        at[place] = path
    out = b""
    for place, named in enumerate(children):
        held = b"".join(proto(1, proto(1, child) + proto(2, name)) for name, child in named.items())
        path = at.get(place)
        if path is not None:
            held += proto(2, proto(1, "VARIABLE_VALUE") + proto(2, full_names[path]) + proto(3, keys[path]))
        out += proto(1, held)
    return out


def graph_def(nodes: Iterable[tuple[str, str, tuple[str, ...]]], *, function: bool) -> bytes:
    """A GraphDef of (name, op, inputs): its own nodes, or those of a function in its library."""
    messages = [proto(1, name) + proto(2, op) + b"".join(proto(3, one) for one in inputs) for name, op, inputs in nodes]
    if function:
        return proto(2, proto(1, proto(1, proto(1, "call")) + b"".join(proto(3, message) for message in messages)))
    return b"".join(proto(1, message) for message in messages)


@dataclass(frozen=True)
class TensorFlow:
    """All of the above, for tests."""

    write_bundle: Callable[..., None] = write_bundle
    network: type[Official] = Official
    tf2_tensors: Callable[..., Tensors] = tf2_tensors
    saved_model_tensors: Callable[..., Tensors] = saved_model_tensors
    object_graph: Callable[..., bytes] = object_graph
    graph_def: Callable[..., bytes] = graph_def
    proto: Callable[..., bytes] = proto


@pytest.fixture(scope="session")
def tf() -> TensorFlow:
    """Writes what TensorFlow writes."""
    return TensorFlow()
