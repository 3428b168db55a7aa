"""A published SimCLR checkpoint, opened: its tensors under the official names, held against our network name by name and shape by shape.

Unit of data: one checkpoint. Nothing but names and shapes is read here; what is missing or left over is an error that lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.errors import CheckpointError
from distill.models.settings import NetworkSettings
from teacher_trainer.simclr_architecture import count_head_layers, find_network, list_names, our_backbone, our_head, torch_shape
from teacher_trainer.simclr_files import SimclrFiles, find_checkpoint
from teacher_trainer.simclr_graph import GraphEvidence, read_graph
from teacher_trainer.simclr_names import SimclrNames, head_name, read_tf1_names, supervised_name
from teacher_trainer.simclr_object_graph import OBJECT_GRAPH, read_tf2_names
from teacher_trainer.tensor_bundle import TensorBundle


@dataclass(frozen=True)
class SimclrCheckpoint:
    """A checkpoint that holds the whole of one of our networks and nothing that is not understood."""

    files: SimclrFiles
    """Where it lies."""
    bundle: TensorBundle
    """Its tensors."""
    names: SimclrNames
    """Which is which."""
    sources: Mapping[str, str]
    """Official name -> name of the tensor to read: the weight, or its average."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all weights, by official name."""
    network: NetworkSettings
    """The backbone."""
    graph: GraphEvidence | None
    """What the saved computation says, where there is one."""

    @property
    def num_head_layers(self) -> int:
        """Layers of the projection head; 0 for none."""
        return count_head_layers(self.shapes)

    @property
    def embedding_dim(self) -> int | None:
        """Width of the head's output; None without a head."""
        return self.shapes[head_name(self.num_head_layers - 1, "kernel")][1] if self.num_head_layers else None

    @property
    def num_classes(self) -> int | None:
        """Classes of the linear classifier; None without one."""
        kernel = self.shapes.get(supervised_name("kernel"))
        return None if kernel is None else kernel[1]

    @property
    def num_backbone_parameters(self) -> int:
        """Numbers in the backbone, with the moving statistics of batch norm, as the paper's table counts them."""
        return sum(int(np.prod(shape)) for name, shape in self.shapes.items() if name.startswith("base_model/"))

    def step(self) -> int | None:
        """The training step, from the file or else from its name."""
        return self.files.step if self.names.step_name is None else int(self.bundle.read(self.names.step_name))

    def tensor(self, official: str) -> Tensor:
        """One variable as float32, in torch's order of axes.

        Raises:
            CheckpointError: the tensor is damaged.
        """
        array = self.bundle.read(self.sources[official])
        turned = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        return torch.from_numpy(np.ascontiguousarray(turned, dtype=np.float32))

    def was_trained(self, official: str) -> bool:
        """Whether the last run trained a variable: it has optimiser slots, and some gradient has arrived there.

        Keras' newer optimisers make slots of everything, and those of what gets no gradient stay 0.

        Raises:
            CheckpointError: a slot is damaged.
        """
        return any(self.bundle.read(slot).any() for slot in self.names.slots.get(official, ()))


def open_simclr(path: Path, use_ema: bool) -> SimclrCheckpoint:
    """Find a checkpoint and hold it against our network.

    Args:
        use_ema: read the moving averages of the weights in place of the weights.

    Raises:
        CheckpointError: nothing there, damaged, of another network, or with tensors missing or left over, which are listed.
    """
    files = find_checkpoint(path)
    bundle = TensorBundle(files.prefix)
    is_tf2 = OBJECT_GRAPH in bundle or any(name.endswith("/.ATTRIBUTES/VARIABLE_VALUE") for name in bundle.names())
    names = read_tf2_names(bundle, "saved_model" if files.is_saved_model else "tf2") if is_tf2 else read_tf1_names(bundle.names())
    if names.unknown or names.absent:
        complaint = list_names({"missing": names.absent, "left over": names.unknown})
        raise CheckpointError(f"{files.prefix} is not a SimCLR network, or not the whole of one ({complaint})")
    graph = None if files.graph is None else read_graph(files.graph)
    shapes = {official: bundle.shape(name) for official, name in names.weights.items()}
    network = find_network(shapes, _pooled_shortcut(files, names, graph), str(files.prefix))
    found = SimclrCheckpoint(files, bundle, names, _sources(names, files, use_ema), shapes, network, graph)
    _check_complete(found)
    return found


def _pooled_shortcut(files: SimclrFiles, names: SimclrNames, graph: GraphEvidence | None) -> bool | None:
    """Whether shortcuts begin with a pool: by the objects of the file, the saved computation, or the flags of the run."""
    if names.pooled_shortcut is not None:
        return names.pooled_shortcut
    if graph is not None:
        return graph.pools_average
    sk_ratio = files.flags.get("sk_ratio")
    return sk_ratio > 0 if isinstance(sk_ratio, (int, float)) else None


def _sources(names: SimclrNames, files: SimclrFiles, use_ema: bool) -> dict[str, str]:
    """Which tensor each weight is read from. Averages need not exist of the classifier, of batch norm's own moving statistics, and of what
    the optimiser left alone."""
    if not use_ema:
        return names.weights
    if not names.averages:
        raise CheckpointError(f"{files.prefix} holds no EMA copies; import it without use_ema")
    trained = names.slots or names.weights
    without = [name for name in trained if name not in names.averages and "/moving_" not in name and "head_supervised" not in name]
    if without:
        raise CheckpointError(f"{files.prefix} holds EMA copies of some weights only ({list_names({'missing': without})})")
    return {**names.weights, **names.averages}


def _check_complete(checkpoint: SimclrCheckpoint) -> None:
    """Every variable of the network is there in the right shape, and no other."""
    shapes = checkpoint.shapes
    backbone, ours = our_backbone(checkpoint.network)
    expected = _expected_shapes(backbone, ours)
    if checkpoint.num_head_layers:
        last = shapes.get(head_name(checkpoint.num_head_layers - 1, "gamma"), (128,))
        expected |= _expected_shapes(*our_head(backbone.feature_dim, checkpoint.num_head_layers, last[0]))
    kernel, bias = shapes.get(supervised_name("kernel")), shapes.get(supervised_name("bias"))
    if kernel is not None or bias is not None:
        expected[supervised_name("kernel")] = torch_shape(kernel) if kernel is not None and len(kernel) == 2 else (0, 0)
        expected[supervised_name("bias")] = expected[supervised_name("kernel")][:1]
    tensors = {**checkpoint.names.weights, **checkpoint.sources}
    found = {official: torch_shape(checkpoint.bundle.shape(tensors[official])) for official in shapes}
    complaint = list_names(
        {
            "missing": sorted(expected.keys() - found.keys()),
            "left over": sorted(tensors[name] for name in found.keys() - expected.keys()),
            "other shape": sorted(tensors[name] for name in expected.keys() & found.keys() if expected[name] != found[name]),
        }
    )
    if complaint:
        raise CheckpointError(f"{checkpoint.files.prefix} is not the whole of a ResNet-{checkpoint.network.depth} of SimCLR ({complaint})")


def _expected_shapes(module: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    state = module.state_dict()
    return {official: tuple(state[ours].shape) for official, ours in names.items()}
