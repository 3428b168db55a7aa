"""A checkpoint: a folder with `weights.safetensors`, optionally `state.pt`, and `manifest.json`, which appears whole or not at all.

The manifest says what the weights are (kind, settings, classes, parent, metrics) and holds the sha256 of every other file, so a truncated
or altered file is found when it is read. `state.pt` (optimiser, counters) is read with `weights_only=True`: no pickle is ever executed.

A training loop pays for a copy only: `prepare_checkpoint` takes it, and what it returns may be written by another thread while the loop
goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import CheckpointError
from distill.teacher_info import Preprocessing

WEIGHTS = "weights.safetensors"
STATE = "state.pt"
MANIFEST = "manifest.json"

Write: TypeAlias = Callable[[Path], None]
"""Writes one checkpoint into a folder."""

PRETRAINED = "pretrained"
"""`kind` in the manifest of a checkpoint of stage 1: `network` there names the backbone, the weights are `backbone.*` and `head.*`."""


def pretrained_preprocessing(manifest: dict[str, Any], origin: str) -> Preprocessing:
    """What the images of pretraining went through.

    Raises:
        CheckpointError: the manifest of the pretrained checkpoint does not say.
    """
    if "preprocessing" not in manifest:
        raise CheckpointError(
            f"the manifest in {origin} does not say with which mean and std it was pretrained; pretrain or import it again"
        )
    return Preprocessing.model_validate(manifest["preprocessing"])


def require_same_pixels(manifest: dict[str, Any], preprocessing: Preprocessing, origin: str) -> None:
    """Another mean or std than in pretraining would cost points in silence. The size of crops may change between the stages.

    Raises:
        CheckpointError: they differ, or see `pretrained_preprocessing`.
    """
    known = pretrained_preprocessing(manifest, origin)
    for name in ("mean", "std"):
        theirs, ours = list(getattr(known, name)), list(getattr(preprocessing, name))
        if theirs != ours:
            raise CheckpointError(f"data.{name} is {ours}, but {origin} was pretrained with {theirs}; set data.{name} to that")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    weights: dict[str, Tensor]
    manifest: dict[str, Any]
    state: dict[str, Any] | None


def save_checkpoint(folder: Path, weights: dict[str, Tensor], manifest: dict[str, Any], state: dict[str, Any] | None = None) -> None:
    """Write a checkpoint so that `folder` holds either the old one or the new one, whatever happens on the way.

    Args:
        weights: name -> tensor, on any device.
        manifest: JSON-able description.
        state: optimiser state and counters: tensors, numbers, strings and containers of them.
    """
    pending = folder.with_name(f".{folder.name}.pending")
    shutil.rmtree(pending, ignore_errors=True)  # what a killed process left
    pending.mkdir(parents=True)
    save_file(_apart(weights), str(pending / WEIGHTS))
    if state is not None:
        torch.save(state, pending / STATE)
    files = {path.name: file_sha256(path) for path in sorted(pending.iterdir())}
    (pending / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1), encoding="utf-8")
    for path in (*pending.iterdir(), pending):
        fsync_path(path)
    replace_folder(pending, folder)


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none in the memory of another: safetensors refuses tied weights, which are written once for each name."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in weights.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in taken:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        apart[name] = own
    return apart


def prepare_checkpoint(weights: dict[str, Tensor], manifest: dict[str, Any], state: dict[str, Any] | None = None) -> Write:
    """What `save_checkpoint` would write now, copied to the CPU: nothing that happens to the arguments later changes it."""
    weights, manifest, state = _copied(weights), _copied(manifest), _copied(state)
    return lambda folder: save_checkpoint(folder, weights, manifest, state)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint back and check it.

    Raises:
        CheckpointError: no checkpoint there, a file missing, truncated or altered.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    try:
        for name, expected in files.items():
            if file_sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name} is truncated or altered (its sha256 is not the manifest's); make it again")
        weights = load_file(str(folder / WEIGHTS))
        state = _load_state(folder / STATE) if STATE in files else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"no checkpoint in {folder}: {Path(error.filename or folder).name} is missing") from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint in {folder} is damaged ({error}); make it again") from error
    return Checkpoint(weights, manifest, state)


def keep_weights(training: Path, folder: Path) -> dict[str, Any]:
    """Copy a checkpoint of a training that is over, without the state that only going on needs; return its manifest.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    found = load_checkpoint(training)
    manifest = {name: value for name, value in found.manifest.items() if name != "files"}
    save_checkpoint(folder, found.weights, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone; the files that it lists are not looked at.

    Raises:
        CheckpointError: no checkpoint there, or a damaged manifest.
    """
    recover_folder(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"no checkpoint in {folder}: {MANIFEST} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"the checkpoint in {folder} is damaged ({error}); make it again") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or WEIGHTS not in files:
        raise CheckpointError(f"the checkpoint in {folder} is damaged (its manifest lists no {WEIGHTS}); make it again")
    return manifest


def _load_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")  # a GPU wrote it, perhaps, and none is here
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or holds pickled objects, which are never run; make it again") from error


def load_weights(network: torch.nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Put weights into a network; every name must fit.

    Raises:
        CheckpointError: names that are missing, left over or of another shape, listed.
    """
    own = network.state_dict()
    missing = sorted(own.keys() - weights.keys())
    left_over = sorted(weights.keys() - own.keys())
    other_shape = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    if missing or left_over or other_shape:
        parts = [
            f"{what}: {', '.join(n[:20])}{f' ... ({len(n)} in all)' if len(n) > 20 else ''}"
            for what, n in (("missing", missing), ("left over", left_over), ("other shape", other_shape))
            if n
        ]
        raise CheckpointError(f"{origin} belongs to another network ({'; '.join(parts)})")
    network.load_state_dict(weights)


def replace_folder(pending: Path, folder: Path) -> None:
    """Put a finished folder in another's place. A crash in between leaves the old one as `.NAME.old`; `recover_folder` brings it back."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    pending.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was cut off between its two renames."""
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        old.rename(folder)


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
