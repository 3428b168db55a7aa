"""Versions of the teachers in a Triton model repository: put in, listed, made the served one, taken out.

Unit of data: one version. `config.pbtxt` is the only place that says which version is served, and it is replaced by one rename; a version's
folder appears and disappears by one rename. So a crash at any moment leaves the repository as it was before or as it was to become, and
what lies half made under a hidden name is swept away by the next change. A number is never given twice: a client that still knows
version 3 as one teacher must not find another behind it.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from pydantic import ValidationError
from tritonclient.grpc.model_config_pb2 import ModelConfig

from distill.config import Section
from distill.errors import BadInput, ConfigError, DistillError, FingerprintMismatch, StageMissing
from distill.teacher_info import METADATA_KEY, TeacherInfo
from export.files import write_atomically
from export.fingerprint import read_teacher_info
from export.first_answer import require_answer
from export.imports import teacher_file
from export.large_models import model_bytes
from export.settings import RepositorySettings
from export.triton_repository import (
    WARMUP_TEMPERATURE,
    changing,
    config_for,
    model_config,
    put_version,
    read_config,
    served_versions,
    sweep,
    write_config,
)

LAST_VERSION = "last_version"
"""File in a model's folder: the highest number that was ever taken out of it."""


class ListedVersion(Section):
    """What `distill repository list` says of one version."""

    model: str
    """Name of the model."""
    version: int
    """Number of the version."""
    served: bool
    """Whether `config.pbtxt` names it: what Triton serves, or will after its next start."""
    fingerprint: str | None
    """Of the teacher; None where the file is no teacher, or not what it says it is."""
    num_classes: int | None
    """K."""
    image_size: int | None
    """Height and width of its crops, in pixels."""
    size_bytes: int
    """Of the graph with its weights."""
    precision: str | None
    """What its graph computes in."""
    added_at: float
    """When it was put in, in seconds since 1970."""
    problem: str | None = None
    """Why it cannot be served."""


def add_version(
    repository: Path, source: Path, settings: RepositorySettings, *, name: str | None = None, default_temperature: float | None = None
) -> tuple[TeacherInfo, bool]:
    """Put a teacher in as the next version of a model, without serving it; the first version of a new model is served at once.

    Args:
        repository: made if it is not there.
        source: a teacher folder or its `model.onnx`.
        settings: how a model that is new here is to be run. One that is here keeps what its configuration says.
        name: of the model. Default: the name that the teacher bears.
        default_temperature: as the teacher says, by default.

    Returns:
        What the version says of itself, and whether it is the served one.

    Raises:
        ConfigError: a name that cannot be, or the same teacher is there already.
        StageMissing, BadInput, FingerprintMismatch: see `read_teacher_info`.
    """
    model = teacher_file(source)
    info = read_teacher_info(model)
    info = _named(info, name or info.name, default_temperature or info.default_temperature)
    folder = repository / info.name
    with changing(repository):
        sweep(folder)
        if (version := version_of(repository, info.name, info.fingerprint)) is not None:
            raise ConfigError(
                f"{info.name} has teacher {info.fingerprint[:12]} already, as version {version};"
                f" serve it with `distill repository activate {info.name} {version}`"
            )
        info = info.replace(version=_next_version(folder))
        current = read_config(folder)
        if current is None:
            require_answer(model, info)  # it is served at once
            write_atomically(folder / "warmup" / WARMUP_TEMPERATURE, struct.pack("<f", 1.0))
        put_version(model, info, folder / str(info.version))
        if current is None:
            write_config(folder, model_config(info, settings))
    return info, current is None


def list_versions(repository: Path) -> list[ListedVersion]:
    """Every version of every model, by name and number.

    Raises:
        StageMissing: no such folder.
        BadInput: a configuration that cannot be read.
    """
    if not repository.is_dir():
        raise StageMissing(
            f"there is no model repository at {repository}; `distill export-teacher` or `distill repository add` makes one,"
            " --config or --repository names another"
        )
    return [
        _listed(folder, version, active_version(repository, folder.name))
        for folder in sorted(repository.iterdir())
        for version in served_versions(repository, folder.name)
    ]


def active_version(repository: Path, name: str) -> int | None:
    """The version that a model's configuration names; None without a configuration, or where it leaves the choice to Triton."""
    config = read_config(repository / name)
    return max(config.version_policy.specific.versions, default=None) if config is not None else None


def version_of(repository: Path, name: str, fingerprint: str) -> int | None:
    """The served version of a model, or else the lowest, that is this teacher; None if none is."""
    active = active_version(repository, name)
    found = [number for number in served_versions(repository, name) if _fingerprint_of(repository / name / str(number)) == fingerprint]
    return active if active in found else min(found, default=None)


def activation(repository: Path, name: str, version: int) -> ModelConfig:
    """The configuration that makes a version the served one. Changes nothing.

    Raises:
        StageMissing: no such model or version; those that are there are named.
        BadInput, FingerprintMismatch: the version's file cannot be served.
    """
    folder = _require(repository, name, version)
    info = read_teacher_info(folder / str(version) / "model.onnx")
    current = read_config(folder)
    return model_config(info, RepositorySettings()) if current is None else config_for(info, current)


def activate_version(repository: Path, name: str, version: int) -> ModelConfig:
    """Make a version the one that Triton serves after its next start or load. Raises as `activation`."""
    _require(repository, name, version)
    with changing(repository):
        config = activation(repository, name, version)
        sweep(repository / name)
        write_atomically(repository / name / "warmup" / WARMUP_TEMPERATURE, struct.pack("<f", 1.0))
        write_config(repository / name, config)
    return config


def active_info(repository: Path, name: str) -> TeacherInfo:
    """What the served version says of itself, checked against its graph.

    Raises:
        StageMissing: no such model, or none of its versions is the served one.
        BadInput, FingerprintMismatch: its file cannot be served.
    """
    version = active_version(repository, name)
    if version is None:
        raise StageMissing(f"no version of {name!r} in {repository} is the served one; choose with `distill repository activate`")
    return read_teacher_info(_require(repository, name, version) / str(version) / "model.onnx")


def run_version_so(repository: Path, name: str, settings: RepositorySettings) -> None:
    """Have the served version run as `settings` say, from its next load on. Raises as `active_info`."""
    with changing(repository):
        write_config(repository / name, model_config(active_info(repository, name), settings))


def remove_version(repository: Path, name: str, version: int) -> None:
    """Take a version out for good.

    Raises:
        StageMissing: no such model or version.
        ConfigError: it is the served one.
    """
    folder = _require(repository, name, version)
    with changing(repository):
        others = [number for number in served_versions(repository, name) if number != version]
        if active_version(repository, name) == version:
            way_out = (
                f"activate another first (`distill repository activate {name} {others[-1]}`)" if others else "add another version first"
            )
            raise ConfigError(f"version {version} of {name} is the served one: {way_out}")
        sweep(folder)
        # Before it is gone: a crash in between only skips a number.
        write_atomically(folder / LAST_VERSION, f"{max(version, _next_version(folder) - 1)}\n".encode())
        hidden = folder / f".{version}.{os.getpid()}.removed"
        (folder / str(version)).rename(hidden)
        shutil.rmtree(hidden)


def _named(info: TeacherInfo, name: str, default_temperature: float) -> TeacherInfo:
    try:
        if name.startswith("."):
            raise ValueError  # a hidden folder, or one outside the repository
        return info.replace(name=name, default_temperature=default_temperature)
    except (ValidationError, ValueError) as error:
        raise ConfigError(
            f"{name!r} cannot name a model: 1 to 64 of A-Z a-z 0-9 _ . - that do not begin with a dot; give --name"
        ) from error


def _next_version(folder: Path) -> int:
    """One above every version that is there, or that was taken out."""
    last = folder / LAST_VERSION
    taken_out = int(last.read_text(encoding="utf-8")) if last.is_file() else 0
    return max([taken_out, *served_versions(folder.parent, folder.name)]) + 1


def _require(repository: Path, name: str, version: int) -> Path:
    """The folder of a model that has this version."""
    models = sorted(path.name for path in repository.iterdir() if served_versions(repository, path.name)) if repository.is_dir() else []
    if name not in models:
        raise StageMissing(f"model repository {repository} has no model {name!r}; it has {', '.join(models) or 'none'}")
    there = served_versions(repository, name)
    if version not in there:
        raise StageMissing(f"{name} has no version {version}; it has {', '.join(map(str, there))}")
    return repository / name


def _fingerprint_of(folder: Path) -> str | None:
    try:
        return read_teacher_info(folder / "model.onnx").fingerprint
    except DistillError:
        return None  # a model of somebody else, or an altered one: `list` says so


def _listed(folder: Path, version: int, active: int | None) -> ListedVersion:
    path = folder / str(version) / "model.onnx"
    info, problem = None, None
    try:
        info = read_teacher_info(path)
    except FingerprintMismatch:
        problem = "altered after its export"
    except BadInput:
        problem = "no teacher of ours"
    config = read_config(folder)
    if info and config and version == active and not _describes(config, info):
        problem = f"config.pbtxt describes another teacher; `distill repository activate {folder.name} {version}` mends it"
    return ListedVersion(
        model=folder.name,
        version=version,
        served=version == active,
        fingerprint=info.fingerprint if info else None,
        num_classes=info.num_classes if info else None,
        image_size=info.preprocessing.image_size if info else None,
        size_bytes=model_bytes(path) if info else path.stat().st_size,
        precision=info.precision if info else None,
        added_at=path.stat().st_mtime,
        problem=problem,
    )


def _describes(config: ModelConfig, info: TeacherInfo) -> bool:
    try:
        return TeacherInfo.model_validate_json(config.parameters[METADATA_KEY].string_value).fingerprint == info.fingerprint
    except ValidationError:
        return False
