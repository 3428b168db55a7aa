"""The weights of a published SimCLR checkpoint as state dicts of our own networks.

Unit of data: one state dict. Kernels are turned into torch's order of axes; layers keep their meaning, one for one, but for one case: a
classifier on the output of the whole projection head has no counterpart of ours, and is multiplied with the head's last layer.

Shapes: D features, E embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.models.resnet import BN_EPS
from teacher_trainer.simclr_architecture import our_backbone, our_head
from teacher_trainer.simclr_checkpoint import SimclrCheckpoint
from teacher_trainer.simclr_names import head_name, supervised_name


def pretrained_weights(checkpoint: SimclrCheckpoint) -> dict[str, Tensor]:
    """Backbone and projection head, under the names of `ContrastiveNetwork`.

    Raises:
        CheckpointError: a tensor is damaged.
    """
    assert checkpoint.embedding_dim is not None, "there is a projection head"
    backbone, names = our_backbone(checkpoint.network)
    head, names_in_head = our_head(backbone.feature_dim, checkpoint.num_head_layers, checkpoint.embedding_dim)
    return _state_dict(checkpoint, backbone, names, "backbone.") | _state_dict(checkpoint, head, names_in_head, "head.")


def classifier_weights(checkpoint: SimclrCheckpoint, classifier_after: int) -> dict[str, Tensor]:
    """Backbone, kept layers of the head and linear classifier, under the names of `Classifier`.

    Args:
        classifier_after: layers of the head below the classifier; all of them means on the head's output.

    Raises:
        CheckpointError: a tensor is damaged.
    """
    backbone, names = our_backbone(checkpoint.network)
    weights = _state_dict(checkpoint, backbone, names, "body.backbone.")
    kept = kept_head_layers(checkpoint, classifier_after)
    head, names_in_head = our_head(backbone.feature_dim, kept + 1, 1)  # one more than kept: the last layer of a head has another form
    for j, layer in enumerate(head.first_layers(kept)):
        names_in_layer = {
            official: ours.removeprefix(f"layers.{j}.") for official, ours in names_in_head.items() if ours.startswith(f"layers.{j}.")
        }
        weights |= _state_dict(checkpoint, layer, names_in_layer, f"body.neck.{j}.")
    weight_KD, bias_K = checkpoint.tensor(supervised_name("kernel")), checkpoint.tensor(supervised_name("bias"))
    if classifier_after > kept:
        weight_KD, bias_K = _through_last_layer(checkpoint, weight_KD, bias_K)
    return weights | {"body.linear.weight": weight_KD, "body.linear.bias": bias_K}


def kept_head_layers(checkpoint: SimclrCheckpoint, classifier_after: int) -> int:
    """Layers of the head that stay layers below our classifier: all that lie below it but the head's last."""
    return min(classifier_after, max(checkpoint.num_head_layers - 1, 0))


def _state_dict(checkpoint: SimclrCheckpoint, module: nn.Module, names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """What TensorFlow does not have is 0: the offset of the head's last norm, which never moves, and torch's counters of batches."""
    weights = {ours: checkpoint.tensor(official) for official, ours in names.items()}
    for name, tensor in module.state_dict().items():
        weights.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
    return {prefix + name: tensor for name, tensor in weights.items()}


def _through_last_layer(checkpoint: SimclrCheckpoint, weight_KE: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """A classifier of the head's output as one of what goes into its last layer: both are affine, and no ReLU lies between them."""
    last = checkpoint.num_head_layers - 1
    dense_ED, gamma_E, mean_E, variance_E = (
        checkpoint.tensor(head_name(last, part)).double() for part in ("kernel", "gamma", "moving_mean", "moving_variance")
    )
    scaled_KE = weight_KE.double() * (gamma_E / torch.sqrt(variance_E + BN_EPS))
    return (scaled_KE @ dense_ED).float(), (bias_K.double() - scaled_KE @ mean_E).float()
