"""What a published SimCLR checkpoint was trained for, and on which layer of the projection head its classifier sits.

Unit of data: one decision and its reason. All hidden layers of the head have the backbone's width, so shapes alone cannot tell a classifier
on the features (layer 0: linear evaluation, 100 % of the labels) from one on the first layer (the paper's choice for 1 % and 10 %). The
evidence, best first: what the caller says; the shapes; the saved computation; the run's own flags; in which head layers the optimiser has
momentum (TF2 trains exactly those below the classifier; TF1 trains none of them in fine-tuning, so there that says nothing); the training
step, which names the published runs; the names of the folders, as the published ones lie in (`finetuned_1pct/r50_1x_sk0`); and at last the
official default, 0. The last two are said to be guesses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from distill.errors import CheckpointError
from teacher_trainer.simclr_architecture import our_backbone
from teacher_trainer.simclr_checkpoint import SimclrCheckpoint
from teacher_trainer.simclr_names import MEMORY, head_name, supervised_name

PRETRAINING_STEP = 250_228  # 800 epochs of 1,281,167 images in batches of 4096, and one: the published pretrained networks
STEPS_AFTER_FIRST_LAYER = {751: "1 %", 3754: "10 %"}  # of the labels: 60 and 30 epochs in batches of 1024
STEPS_AFTER_BACKBONE = {37_535: "fine-tuned with 100 % of the labels", 28_151: "supervised"}
NAMES_AFTER = {r"(?<!\d)10?pct": 1, r"100pct|supervised": 0, r"(?<![a-z0-9])ft0(?!\d)": 0, r"(?<![a-z0-9])ft1(?!\d)": 1}
"""How a folder is called -> the layer: published runs by their share of the labels, others by their `ft_proj_selector`."""


@dataclass(frozen=True)
class ClassifierPlace:
    """Where the classifier sits."""

    after: int
    """Layers of the projection head below it; the head's own number of layers means on its output."""
    reason: str
    """What this was concluded from."""
    is_guess: bool = False
    """Nothing in the file tells."""


class Purpose(Enum):
    """What the last run was for."""

    PRETRAINED = "pretrained"
    """Contrastive pretraining; a classifier in the file only looked on."""
    FINE_TUNED = "fine-tuned"
    """Fine-tuning, supervised training or linear evaluation."""
    UNKNOWN = "unknown"
    """Head and classifier are there, and nothing tells."""


def find_purpose(checkpoint: SimclrCheckpoint, step: int | None) -> Purpose:
    """What a checkpoint was last trained for."""
    names, graph, last = checkpoint.names, checkpoint.graph, checkpoint.num_head_layers
    if not last or checkpoint.num_classes is None:
        return Purpose.PRETRAINED if last else Purpose.FINE_TUNED
    mode = checkpoint.files.flags.get("train_mode")
    if mode in ("pretrain", "finetune"):
        return Purpose.PRETRAINED if mode == "pretrain" else Purpose.FINE_TUNED
    if names.slots:
        # The contrastive loss alone trains the head's last layer, unless the classifier sits on it.
        on_output = _fitting(checkpoint) == [last] or (graph is not None and graph.classifier_after == last)
        whole = checkpoint.was_trained(head_name(last - 1, "kernel")) and not on_output
        return Purpose.PRETRAINED if whole else Purpose.FINE_TUNED
    if graph is not None and graph.classifier_after is not None:
        return Purpose.PRETRAINED if graph.gradient_stopped else Purpose.FINE_TUNED
    momentum_encoder = any(name.startswith("ema_model/") for name in names.averages.values())
    if names.format != "tf1" and supervised_name("kernel") in names.averages:
        momentum_encoder = False  # an average of the whole model, which any run may keep
    if names.ignored[MEMORY] or momentum_encoder:
        return Purpose.PRETRAINED
    if step == PRETRAINING_STEP:
        return Purpose.PRETRAINED
    return Purpose.FINE_TUNED if step in STEPS_AFTER_FIRST_LAYER or step in STEPS_AFTER_BACKBONE else Purpose.UNKNOWN


def place_classifier(given: int | None, checkpoint: SimclrCheckpoint, purpose: Purpose, step: int | None) -> ClassifierPlace:
    """Decide on which layer the classifier sits.

    Args:
        given: what the caller says, as the official `ft_proj_selector` counts: 0 the backbone, 1 the first layer, -1 the head's output.

    Raises:
        CheckpointError: the caller names a layer that is not there or does not fit, or no layer fits.
    """
    fitting = _fitting(checkpoint)
    num_inputs = checkpoint.shapes[supervised_name("kernel")][0]
    if not fitting:
        raise CheckpointError(f"{checkpoint.files.prefix}: its classifier takes {num_inputs} features, and no layer gives so many")
    if given is not None:
        after = _from_selector(given, checkpoint.num_head_layers)
        if after not in fitting:
            raise CheckpointError(
                f"classifier_after {given} does not fit {checkpoint.files.prefix}: its classifier takes {num_inputs} features, "
                f"as they come after head layers {', '.join(map(str, fitting))}"
            )
        return ClassifierPlace(after, "as given")
    found = _evidence(checkpoint, fitting, purpose, step)
    if found.after not in fitting:
        return ClassifierPlace(fitting[0], f"the first that fits; {found.reason} says {found.after}, which does not", is_guess=True)
    return found


def _from_selector(selector: int, num_head_layers: int) -> int:
    """The official `ft_proj_selector` indexes [features, first layer, ..., output] as Python does."""
    return selector if selector >= 0 else selector + num_head_layers + 1


def _fitting(checkpoint: SimclrCheckpoint) -> list[int]:
    """The layers after which there are as many features as the classifier takes."""
    num_inputs = checkpoint.shapes[supervised_name("kernel")][0]
    backbone, _ = our_backbone(checkpoint.network)
    kernels = [checkpoint.shapes[head_name(j, "kernel")] for j in range(checkpoint.num_head_layers)]
    return [after for after, width in enumerate([backbone.feature_dim, *(kernel[1] for kernel in kernels)]) if width == num_inputs]


def _evidence(checkpoint: SimclrCheckpoint, fitting: list[int], purpose: Purpose, step: int | None) -> ClassifierPlace:
    """The first piece of evidence that there is."""
    names, graph = checkpoint.names, checkpoint.graph
    if not checkpoint.num_head_layers:
        return ClassifierPlace(0, "there is no projection head")
    if len(fitting) == 1:
        return ClassifierPlace(fitting[0], "no other layer has its width")
    if graph is not None and graph.classifier_after is not None:
        return ClassifierPlace(graph.classifier_after, "the saved computation")
    selector = checkpoint.files.flags.get("ft_proj_selector")
    if isinstance(selector, int):
        return ClassifierPlace(_from_selector(selector, checkpoint.num_head_layers), "ft_proj_selector in flags.json")
    if purpose is Purpose.PRETRAINED:
        return ClassifierPlace(0, "linear evaluation beside pretraining")
    trained = [j for j in range(checkpoint.num_head_layers) if checkpoint.was_trained(head_name(j, "kernel"))]
    if trained:
        return ClassifierPlace(trained[-1] + 1, "the optimiser's slots show which head layers were trained")
    if names.slots and names.format != "tf1":
        return ClassifierPlace(0, "the optimiser's slots show that no head layer was trained")
    if names.slots and not any(name.startswith("base_model/") for name in names.slots):
        return ClassifierPlace(0, "only the classifier has optimiser slots, as in linear evaluation")
    if step in STEPS_AFTER_FIRST_LAYER:
        return ClassifierPlace(1, f"step {step}: fine-tuned with {STEPS_AFTER_FIRST_LAYER[step]} of the labels")
    if step in STEPS_AFTER_BACKBONE:
        return ClassifierPlace(0, f"step {step}: {STEPS_AFTER_BACKBONE[step]}")
    for folder in reversed(checkpoint.files.prefix.absolute().parts[-4:-1]):
        for pattern, after in NAMES_AFTER.items():
            if re.search(pattern, folder.lower()):
                return ClassifierPlace(after, f"the folder is called {folder}", is_guess=True)
    return ClassifierPlace(0, "the official default; nothing in the file tells", is_guess=True)
