"""What a published SimCLR checkpoint was trained for, and on which layer of the projection head its classifier sits.

Unit of data: one decision and its reason. All hidden layers of the head have the backbone's width, so shapes alone cannot tell a classifier
on the features (layer 0: linear evaluation, 100 % of the labels) from one on the first layer (the paper's choice for 1 % and 10 %). The
evidence, best first: what the caller says; the shapes; the saved computation; the run's own flags; in which head layers the optimiser has
momentum (TF2 trains exactly those below the classifier; TF1 trains none of them in fine-tuning, so there that says nothing); the names of
file and folders, as the published ones lie in (`finetuned_1pct/r50_1x_sk0`) or with the `ft_proj_selector` in them (`r18_ft2`); the step,
which names the published runs; and at last the official default, 0. Names and the default are said to be guesses, and so is the step of a
run that is not on ImageNet's classes, unless a name agrees with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from distill.errors import CheckpointError
from teacher_trainer.simclr_architecture import our_backbone
from teacher_trainer.simclr_checkpoint import SimclrCheckpoint
from teacher_trainer.simclr_names import MEMORY, head_name, supervised_name

PRETRAINING_STEP = 250_228  # 800 epochs of 1,281,167 images in batches of 4096, and one: the published pretrained networks
STEPS_AFTER_FIRST_LAYER = {751: "1 %", 3754: "10 %"}  # of the labels: 60 and 30 epochs in batches of 1024
STEPS_AFTER_BACKBONE = {37_535: "fine-tuned with 100 % of the labels", 28_151: "supervised"}
PUBLISHED_CLASSES = 1000
GUESS = "that is a guess: if its accuracy is poor, import it again and say another layer (classifier_after)"


@dataclass(frozen=True)
class ClassifierPlace:
    """Where the classifier sits."""

    after: int
    """Layers of the projection head below it; the head's own number of layers means on its output."""
    reason: str
    """What this was concluded from."""
    doubt: str = ""
    """Why it may be wrong, for people; empty where it is known."""


class Purpose(StrEnum):
    """What the last run was for."""

    PRETRAINED = "pretrained"
    """Contrastive pretraining; a classifier in the file only looked on."""
    FINE_TUNED = "fine-tuned"
    """Fine-tuning, supervised training or linear evaluation."""
    UNKNOWN = "unknown"
    """Head and classifier are there, and nothing tells."""


NAMES: dict[str, tuple[Purpose, int | None]] = {
    **{rf"(?<![a-z0-9])ft{selector}(?!\d|pct)": (Purpose.FINE_TUNED, selector) for selector in range(-1, 10)},
    r"(?<!\d)10?pct": (Purpose.FINE_TUNED, 1),
    r"(?<!\d)100pct|(?<![a-z])(?<!self[-_])(?<!semi[-_])supervised": (Purpose.FINE_TUNED, 0),
    r"(?<![a-z])fine[-_]?tun": (Purpose.FINE_TUNED, None),
    r"(?<![a-z])pretrain(ed)?(?![a-z]|[-_]?(models?|networks?|weights|checkpoints?|ckpts?))": (Purpose.PRETRAINED, None),
}
"""How a file or folder is called -> what the run was for, and its `ft_proj_selector`: published runs by their share of the labels."""


@dataclass(frozen=True)
class FoundPurpose:
    """What the last run was for, and how sure that is."""

    purpose: Purpose
    doubt: str = ""
    """Why it may be wrong, for people; empty where the file tells."""


def find_purpose(checkpoint: SimclrCheckpoint, step: int | None) -> FoundPurpose:
    """What a checkpoint was last trained for."""
    names, graph, last = checkpoint.names, checkpoint.graph, checkpoint.num_head_layers
    if not last or checkpoint.num_classes is None:
        return FoundPurpose(Purpose.PRETRAINED if last else Purpose.FINE_TUNED)
    mode = checkpoint.files.flags.get("train_mode")
    if mode in ("pretrain", "finetune"):
        return FoundPurpose(Purpose.PRETRAINED if mode == "pretrain" else Purpose.FINE_TUNED)
    shown = graph.classifier_after if graph is not None else None
    if names.slots:
        # The contrastive loss alone trains the head's last layer, unless the classifier sits on it.
        fitting = _fitting(checkpoint)
        if fitting == [last] or shown == last or not checkpoint.was_trained(head_name(last - 1, "kernel")):
            return FoundPurpose(Purpose.FINE_TUNED)
        doubt = "fine-tuning from the head's output (classifier_after -1, take: classifier) would have left the same slots"
        return FoundPurpose(Purpose.PRETRAINED, doubt if last in fitting and shown is None else "")
    if graph is not None and shown is not None:
        return FoundPurpose(Purpose.PRETRAINED if graph.gradient_stopped else Purpose.FINE_TUNED)
    momentum_encoder = any(name.startswith("ema_model/") for name in names.averages.values())
    if names.format != "tf1" and supervised_name("kernel") in names.averages:
        momentum_encoder = False  # an average of the whole model, which any run may keep
    if names.ignored[MEMORY] or momentum_encoder:
        return FoundPurpose(Purpose.PRETRAINED)
    if step == PRETRAINING_STEP:
        return FoundPurpose(Purpose.PRETRAINED)
    if step in STEPS_AFTER_FIRST_LAYER or step in STEPS_AFTER_BACKBONE:
        return FoundPurpose(Purpose.FINE_TUNED)
    for called, purpose, _ in _hints(checkpoint):
        return FoundPurpose(purpose, f"only the name {called} tells pretraining from fine-tuning here, so that is a guess")
    return FoundPurpose(Purpose.UNKNOWN, "nothing tells pretraining from fine-tuning here")


def _hints(checkpoint: SimclrCheckpoint) -> Iterator[tuple[str, Purpose, int | None]]:
    """The names of file and folders that say something, nearest first: the name, and what `NAMES` has of it."""
    for called in checkpoint.files.called:
        yield from ((called, *hint) for pattern, hint in NAMES.items() if re.search(pattern, called.lower()))


def place_classifier(given: int | None, checkpoint: SimclrCheckpoint, found: FoundPurpose, step: int | None) -> ClassifierPlace:
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
    place = _evidence(checkpoint, fitting, found, step)
    if place.after not in fitting:
        return ClassifierPlace(fitting[0], f"the first that fits; {place.reason} says {place.after}, which does not", GUESS)
    return place


def _from_selector(selector: int, num_head_layers: int) -> int:
    """The official `ft_proj_selector` indexes [features, first layer, ..., output] as Python does."""
    return selector if selector >= 0 else selector + num_head_layers + 1


def _fitting(checkpoint: SimclrCheckpoint) -> list[int]:
    """The layers after which there are as many features as the classifier takes."""
    num_inputs = checkpoint.shapes[supervised_name("kernel")][0]
    backbone, _ = our_backbone(checkpoint.network)
    kernels = [checkpoint.shapes[head_name(j, "kernel")] for j in range(checkpoint.num_head_layers)]
    return [after for after, width in enumerate([backbone.feature_dim, *(kernel[1] for kernel in kernels)]) if width == num_inputs]


def _evidence(checkpoint: SimclrCheckpoint, fitting: list[int], found: FoundPurpose, step: int | None) -> ClassifierPlace:
    """The first piece of evidence that there is."""
    names, graph = checkpoint.names, checkpoint.graph
    if not checkpoint.num_head_layers:
        return _without_head(checkpoint, step)
    if len(fitting) == 1:
        return ClassifierPlace(fitting[0], "no other layer has its width")
    if graph is not None and graph.classifier_after is not None:
        return ClassifierPlace(graph.classifier_after, "the saved computation")
    selector = checkpoint.files.flags.get("ft_proj_selector")
    if isinstance(selector, int):
        return ClassifierPlace(_from_selector(selector, checkpoint.num_head_layers), "ft_proj_selector in flags.json")
    if found.purpose is Purpose.PRETRAINED:
        return ClassifierPlace(0, "linear evaluation beside pretraining")
    trained = [j for j in range(checkpoint.num_head_layers) if checkpoint.was_trained(head_name(j, "kernel"))]
    if trained:
        return ClassifierPlace(trained[-1] + 1, "the optimiser's slots show which head layers were trained")
    if names.slots and names.format != "tf1":
        return ClassifierPlace(0, "the optimiser's slots show that no head layer was trained")
    if names.slots and not any(name.startswith("base_model/") for name in names.slots):
        return ClassifierPlace(0, "only the classifier has optimiser slots, as in linear evaluation")
    return _by_names_and_step(checkpoint, step) or ClassifierPlace(0, "the official default; nothing in the file tells", GUESS)


def _by_names_and_step(checkpoint: SimclrCheckpoint, step: int | None) -> ClassifierPlace | None:
    """What file and folders are called, or else the step; where they agree it is no guess."""
    by_step = None
    if step in STEPS_AFTER_FIRST_LAYER:
        by_step = ClassifierPlace(1, f"step {step}: fine-tuned with {STEPS_AFTER_FIRST_LAYER[step]} of the labels")
    elif step in STEPS_AFTER_BACKBONE:
        by_step = ClassifierPlace(0, f"step {step}: {STEPS_AFTER_BACKBONE[step]}")
    for called, _, selector in _hints(checkpoint):
        if selector is not None:
            after = _from_selector(selector, checkpoint.num_head_layers)
            if by_step is not None and by_step.after == after:
                return by_step
            against = "" if by_step is None else f", though {by_step.reason} says {by_step.after}"
            return ClassifierPlace(after, f"the name {called}{against}", GUESS)
    if by_step is not None and checkpoint.num_classes != PUBLISHED_CLASSES:
        return replace(by_step, doubt=GUESS)  # not the published run of that step
    return by_step


def _without_head(checkpoint: SimclrCheckpoint, step: int | None) -> ClassifierPlace:
    """TF1's hub modules leave the head out, even where the classifier was trained on one of its layers."""
    said = _by_names_and_step(checkpoint, step)
    doubt = ""
    if said is not None and said.after > 0:
        doubt = (
            f"by {said.reason}, it was trained on head layer {said.after}, which is not in the file, and its logits will not be those of"
            " training: import the training checkpoint (model.ckpt-STEP), or say classifier_after 0 if it is known to sit on the features"
        )
    return ClassifierPlace(0, "there is no projection head", doubt)
