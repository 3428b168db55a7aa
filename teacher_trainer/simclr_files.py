"""Find a published SimCLR checkpoint on disk: from whatever path the user has at hand to the files that belong to it.

Unit of data: one checkpoint. The official code leaves `model.ckpt-STEP.{index,data-*,meta}` (TF1), `ckpt-STEP.{index,data-*}` (TF2), each
beside a text file `checkpoint` that names the latest and, after an evaluation, `flags.json`; and exports `saved_model/STEP/` (TF2) or
`hub/STEP/` (TF1) with `saved_model.pb` and `variables/`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError

LATEST = "checkpoint"
SAVED_MODEL = "saved_model.pb"
_ACCEPTED = "a prefix such as model.ckpt-751, its .index file, a folder with a `checkpoint` file or one .index, or a SavedModel folder"


@dataclass(frozen=True)
class SimclrFiles:
    """The files of one checkpoint."""

    prefix: Path
    """Path of the tensor bundle without `.index`."""
    graph: Path | None = None
    """The computation, where it is kept: `saved_model.pb`, or the `.meta` file beside a TF1 checkpoint."""
    is_saved_model: bool = False
    """Found as `saved_model.pb` with `variables/`."""
    flags: dict[str, Any] = field(default_factory=dict)
    """The command line flags of the run, from `flags.json`; empty where there is none."""
    step: int | None = None
    """The training step in the name of the prefix or of the folder."""

    @property
    def called(self) -> list[str]:
        """What people called it: the names of the prefix, or of the SavedModel's folder, and of the three folders around, nearest first."""
        named = self.graph.parent if self.is_saved_model and self.graph else self.prefix
        return [*reversed(named.absolute().parts[-4:])]


def find_checkpoint(path: Path) -> SimclrFiles:
    """The checkpoint that a path means: a prefix, an `.index` file, a folder that holds one, or a SavedModel folder.

    Raises:
        CheckpointError: nothing of the kind is there, or several are and none is said to be the latest.
    """
    if path.is_dir():
        return _in_folder(path)
    prefix = path.with_name(path.name.removesuffix(".index"))
    prefix = prefix.with_name(re.sub(r"\.(meta|data-\d+-of-\d+)$", "", prefix.name))
    if path.name == SAVED_MODEL and path.is_file():
        return _in_folder(path.parent)
    if path.name == LATEST and path.is_file():
        return _in_folder(path.parent)
    if not _index(prefix).is_file():
        v1 = " (it may be in TensorFlow's format V1 of one file, which cannot be read)" if path.is_file() else ""
        raise CheckpointError(f"{path} is no SimCLR checkpoint: there is no {_index(prefix).name}{v1}; give {_ACCEPTED}")
    return _of_prefix(prefix)


def _in_folder(folder: Path) -> SimclrFiles:
    if (folder / SAVED_MODEL).is_file():
        variables = folder / "variables" / "variables"
        if not _index(variables).is_file():
            raise CheckpointError(f"{folder} is a SavedModel without weights: {_index(variables)} is missing")
        step = int(folder.name) if folder.name.isdecimal() else None
        flags = _flags(folder) or _flags(folder.parent) or _flags(folder.parent.parent)  # MODEL_DIR/saved_model/STEP
        return SimclrFiles(variables, folder / SAVED_MODEL, is_saved_model=True, flags=flags, step=step)
    if (folder / LATEST).is_file():
        return _of_prefix(_latest(folder))
    found = sorted(folder.glob("*.index"))
    if len(found) != 1:
        what = "several: " + ", ".join(path.name for path in found[:4]) if found else "none"
        raise CheckpointError(f"{folder} holds no `{LATEST}` file, no {SAVED_MODEL}, and of .index files {what}; give {_ACCEPTED}")
    return _of_prefix(found[0].with_name(found[0].name.removesuffix(".index")))


def _latest(folder: Path) -> Path:
    """The prefix that the text file `checkpoint` names. It was often written elsewhere, so only the last part of a long path counts."""
    try:
        text = (folder / LATEST).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{folder / LATEST} cannot be read as text; give the prefix or the .index file itself") from error
    named = re.search(r'^\s*model_checkpoint_path:\s*"([^"]+)"', text, re.MULTILINE)
    if named is None:
        raise CheckpointError(f"{folder / LATEST} names no model_checkpoint_path; give the prefix or the .index file itself")
    prefix = folder / Path(named[1]).name
    if not _index(prefix).is_file():
        raise CheckpointError(f"{folder / LATEST} names {named[1]}, but there is no {_index(prefix).name} beside it")
    return prefix


def _of_prefix(prefix: Path) -> SimclrFiles:
    if prefix.parent.name == "variables" and (prefix.parent.parent / SAVED_MODEL).is_file():
        return _in_folder(prefix.parent.parent)
    meta = prefix.with_name(prefix.name + ".meta")
    step = re.search(r"-(\d+)$", prefix.name)
    return SimclrFiles(
        prefix, meta if meta.is_file() else None, flags=_flags(prefix.parent), step=int(step[1]) if step is not None else None
    )


def _flags(folder: Path) -> dict[str, Any]:
    """`flags.json` of the run. It only ever helps to decide, so one that is damaged counts as none."""
    try:
        flags = json.loads((folder / "flags.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return flags if isinstance(flags, dict) else {}


def _index(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")
