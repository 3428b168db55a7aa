"""Several teachers -> one: a single graph that averages the members' logits, through the parity gate, as a teacher folder like any other.

    images uint8 [B,H,W,3] -> member 1 (its own normalisation) -> logits - their mean -> * weight 1 --+
                           -> member 2 ...                                             -> * weight 2 --+--> sum = logits [B,K]
    logits -> /temperature float32 [B,1] -> Softmax -> soft_labels [B,K]

Why logits are averaged and not probabilities. A label is kept as logits and read at any temperature later, and every part of the system
relies on soft_labels = softmax(logits / T). The mean of the members' distributions at T is the softmax of no fixed logits at all T, so it
could be served but never kept. The weighted mean of logits is one set of logits at every T; its soft labels are the weighted geometric
mean of the members' soft labels at that T, made to sum to 1 again. A class that one member calls impossible gets little, where the mean
of probabilities would give it a share; and a member with larger logits speaks louder, which its weight can balance.

Why each member's logits are first shifted to mean 0 (over the classes of a crop): no shift changes a soft label, and without an offset of
their own the fp32 digits and the bits of a kept label go to the differences that matter.

Unit of data: one ensemble. Shapes: B crops of a batch, H W pixels, K classes, M members.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.compose
from onnx import TensorProto, helper, numpy_helper

from distill.config import validate
from distill.crops import Interpolation
from distill.errors import ConfigError
from distill.teacher_info import Preprocessing, TeacherInfo
from export.files import write_atomically
from export.fingerprint import load_model, read_teacher_info
from export.foreign_model import keep_only
from export.graph import (
    IMAGES,
    LOGITS,
    SOFT_LABELS,
    TEMPERATURE,
    save_model,
    strip_descriptions,
)
from export.graph_regions import opset_of
from export.imports import teacher_file
from export.label_space import Crops, Logits
from export.parity import Reference
from export.sessions import open_session
from export.settings import TeacherExportSettings
from export.simplify import at_least_opset
from export.teacher import admit_teacher, unchecked_model

MEMBERS_FILE = "members.json"
"""Beside the graph in the teacher folder: who was averaged, with which weight."""
BATCH = "batch"
MIN_OPSET = 18
"""From here on, ReduceMean takes its axes as an input."""


class Member(NamedTuple):
    """One of the teachers that are averaged."""

    model: Path
    info: TeacherInfo
    weight: float
    """Its share; the shares of all members sum to 1."""


def read_members(wanted: Sequence[tuple[Path, float]]) -> list[Member]:
    """The members of an ensemble, with weights that sum to 1.

    Args:
        wanted: (teacher folder or its `model.onnx`, weight above 0) of each.

    Raises:
        ConfigError: fewer than two, one twice, a weight that is not above 0, or members that differ in classes, crop size or precision.
        StageMissing, BadInput, FingerprintMismatch: see `read_teacher_info`.
    """
    if len(wanted) < 2:
        raise ConfigError(f"an ensemble has at least two members, {len(wanted)} given: give --member PATH once for each")
    for path, weight in wanted:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"member {path}: weight {weight:g} is not above 0; leave a member out that is not to count")
    total = sum(weight for _, weight in wanted)
    members = [Member(teacher_file(path), read_teacher_info(teacher_file(path)), weight / total) for path, weight in wanted]
    for number, member in enumerate(members[1:], start=1):
        _require_alike(members[0], member)
        for earlier in members[:number]:
            if earlier.info.fingerprint == member.info.fingerprint:
                raise ConfigError(
                    f"{member.model} and {earlier.model} are the same teacher {member.info.fingerprint[:12]}: give it once, with a weight"
                )
    return members


def ensemble_preprocessing(
    members: Sequence[Member], crop_ratio: float | None = None, interpolation: Interpolation | None = None
) -> Preprocessing:
    """What an image goes through before the ensemble sees it. Each member normalises by itself; a mean and std that all share are stated.

    Raises:
        ConfigError: the members' evaluation crops differ and none is chosen, or the chosen one is not above 0 and at most 1.
    """
    first = members[0].info.preprocessing
    chosen = {"crop_ratio": crop_ratio, "interpolation": interpolation}
    for name, choice in chosen.items():
        values = {member.model: getattr(member.info.preprocessing, name) for member in members}
        if choice is None and len(set(values.values())) > 1:
            said = ", ".join(f"{model} {value}" for model, value in values.items())
            raise ConfigError(f"the members' evaluation crops differ ({name} of {said}): choose one with --{name.replace('_', '-')}")
        chosen[name] = next(iter(values.values())) if choice is None else choice
    same = all((m.info.preprocessing.mean, m.info.preprocessing.std) == (first.mean, first.std) for m in members)
    normalised = {"mean": first.mean, "std": first.std} if same else {}
    return validate(Preprocessing, {"image_size": first.image_size, **chosen, **normalised}, origin="ensemble")


def export_ensemble(
    members: Sequence[Member],
    preprocessing: Preprocessing,
    crops_NHWC: Crops,
    image_ids: Sequence[str],
    folder: Path,
    settings: TeacherExportSettings,
) -> TeacherInfo:
    """Write the ensemble as a teacher folder.

    Args:
        members: from `read_members`.
        preprocessing: from `ensemble_preprocessing`.
        crops_NHWC: uint8 [N,H,W,3], real crops for the parity gate.
        image_ids: N names of their images.
        folder: the teacher folder; beside graph and parity report it gets `members.json`.
        settings: name, default temperature and limits. The precision is that of the members; what is added to them computes in fp32.

    Raises:
        ConfigError: a member that cannot be merged, a name that cannot be.
        ParityError: the graph does not say what the mean of the members says.
    """
    settings = settings.replace(precision=members[0].info.precision)
    with unchecked_model(folder) as path:
        merge_teachers(members, path)
        write_atomically(folder / MEMBERS_FILE, (json.dumps(provenance(members), indent=2) + "\n").encode())
        class_names = members[0].info.class_names
        reference = mean_reference(members)
        return admit_teacher(path, folder, reference, preprocessing, class_names, crops_NHWC, image_ids, settings, as_it_is=True)


def provenance(members: Sequence[Member]) -> list[dict[str, str | int | float]]:
    """Who the members are, as plain data."""
    return [
        {
            "name": member.info.name,
            "version": member.info.version,
            "fingerprint": member.info.fingerprint,
            "weight": member.weight,
            "path": str(member.model),
        }
        for member in members
    ]


def mean_reference(members: Sequence[Member]) -> Reference:
    """What the graph has to agree with: every member asked by itself in ONNX Runtime, and averaged by numpy in float64."""
    sessions = [(open_session(member.model), member.weight) for member in members]

    def reference(crops_BHWC: Crops) -> Logits:
        feed = {IMAGES: crops_BHWC, TEMPERATURE: np.ones((len(crops_BHWC), 1), np.float32)}
        answers_MBK = [(np.asarray(session.run([LOGITS], feed)[0], np.float64), weight) for session, weight in sessions]
        centred_MBK = [weight * (logits_BK - logits_BK.mean(axis=1, keepdims=True)) for logits_BK, weight in answers_MBK]
        return np.sum(centred_MBK, axis=0)

    return reference


def merge_teachers(members: Sequence[Member], target: Path) -> None:
    """Write one graph that runs all members on the same crops. Raises as `export_ensemble`, but for the gate."""
    models = [_bare(member) for member in members]
    opset = max(MIN_OPSET, *(opset_of(model) for model in models))
    models = [
        onnx.compose.add_prefix(at_least_opset(model, opset, f"member {member.model}:"), f"member_{number}/")
        for number, (model, member) in enumerate(zip(models, members, strict=True))
    ]
    info = members[0].info
    size, num_classes = info.preprocessing.image_size, info.num_classes
    nodes, constants = _averaging([member.weight for member in members])
    graph = helper.make_graph(
        nodes=[
            *(
                helper.make_node("Identity", [IMAGES], [f"member_{number}/{IMAGES}"], name=f"give_{number}")
                for number in range(len(models))
            ),
            *(node for model in models for node in model.graph.node),
            *nodes,
        ],
        name="classifier",
        inputs=[
            helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, [BATCH, size, size, 3]),
            helper.make_tensor_value_info(TEMPERATURE, TensorProto.FLOAT, [BATCH, 1]),
        ],
        outputs=[helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, num_classes]) for name in (LOGITS, SOFT_LABELS)],
        initializer=[*constants, *(tensor for model in models for tensor in model.graph.initializer)],
        sparse_initializer=[tensor for model in models for tensor in model.graph.sparse_initializer],
    )
    merged = helper.make_model(
        graph,
        opset_imports=_opsets(models, members),
        functions=[function for model in models for function in model.functions],
        ir_version=max(8, *(model.ir_version for model in models)),
    )
    strip_descriptions(merged)
    save_model(merged, target)


def _bare(member: Member) -> onnx.ModelProto:
    """A member from its crops to its logits, and nothing else."""
    model = load_model(member.model)
    strip_descriptions(model)
    keep_only(model.graph, LOGITS)
    inputs = [value for value in model.graph.input if value.name == IMAGES]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    del model.graph.value_info[:]  # their names for the batch differ from member to member
    return model


def _averaging(weights: Sequence[float]) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes from the members' logits to the ensemble's outputs, and their constants."""
    constants = [numpy_helper.from_array(np.array([1], np.int64), "classes_axis")]
    nodes = []
    for number, weight in enumerate(weights):
        logits, mean, centred = f"member_{number}/{LOGITS}", f"mean_{number}", f"centred_{number}"
        constants.append(numpy_helper.from_array(np.array(weight, np.float32), f"weight_{number}"))
        nodes += [
            helper.make_node("ReduceMean", [logits, "classes_axis"], [mean], keepdims=1, name=f"average_{number}"),
            helper.make_node("Sub", [logits, mean], [centred], name=f"centre_{number}"),
            helper.make_node("Mul", [centred, f"weight_{number}"], [f"weighted_{number}"], name=f"weigh_{number}"),
        ]
    nodes += [
        helper.make_node("Sum", [f"weighted_{number}" for number in range(len(weights))], [LOGITS], name="to_logits"),
        helper.make_node("Div", [LOGITS, TEMPERATURE], ["tempered"], name="temper"),
        helper.make_node("Softmax", ["tempered"], [SOFT_LABELS], axis=1, name="soften"),
    ]
    return nodes, constants


def _opsets(models: Sequence[onnx.ModelProto], members: Sequence[Member]) -> list[onnx.OperatorSetIdProto]:
    """Every operator domain of every member, once."""
    versions: dict[str, int] = {}
    for model, member in zip(models, members, strict=True):
        for entry in model.opset_import:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if versions.setdefault(domain, entry.version) != entry.version:
                raise ConfigError(
                    f"member {member.model} uses version {entry.version} of the operators {domain!r}, another member {versions[domain]}:"
                    " export them with one version of the exporter"
                )
    return [helper.make_opsetid(domain, version) for domain, version in sorted(versions.items())]


def _require_alike(first: Member, other: Member) -> None:
    ours, theirs = first.info.class_names, other.info.class_names
    if len(ours) != len(theirs):
        raise ConfigError(f"{other.model} has {len(theirs)} classes, {first.model} has {len(ours)}: members know the same classes")
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            raise ConfigError(
                f"{other.model} calls class {number} {b!r}, {first.model} calls it {a!r}: members have the same classes in the same order"
            )
    sizes = first.info.preprocessing.image_size, other.info.preprocessing.image_size
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{other.model} sees crops of {sizes[1]} pixels, {first.model} of {sizes[0]}: members see the same crops; export one anew"
        )
    if first.info.precision != other.info.precision:
        raise ConfigError(
            f"{other.model} computes in {other.info.precision}, {first.model} in {first.info.precision}: members have the same precision;"
            " export one anew"
        )
