"""Linear evaluation: how good the features of a backbone are, by the accuracy of a linear classifier on them (SimCLRv2, table 1).

The backbone is a fixed function: its weights are not trained and its batch norms keep the statistics of pretraining, as in the official
code.
"""

from __future__ import annotations

from distill.errors import ConfigError
from distill.models.classifier import Classifier, ResNetClassifier


def freeze_backbone(network: Classifier) -> None:
    """Leave only the linear classifier to be trained; `train_mode` keeps the statistics of the rest.

    Raises:
        ConfigError: a network that is not one of our ResNets, or has layers between backbone and classifier.
    """
    body = network.body
    if not isinstance(body, ResNetClassifier) or len(body.neck):
        raise ConfigError("finetune.linear needs a backbone of ours (network.name=resnet) with the classifier right on it")
    body.backbone.requires_grad_(False)


def train_mode(network: Classifier) -> None:
    """Training mode, but for a frozen backbone: its batch norms go on with the statistics that they have."""
    network.train()
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
