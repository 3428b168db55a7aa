"""What `distill import` says when it is done: what was found, and the lines by which a run file takes it.

Unit of data: the result of one import, plain data from `teacher_import.import_into`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.cli.teacher_import import PLACES, Result

_SHORT_LIST = 20
"""Class lists up to this length are written out in the lines for a run file."""


def describe(result: Result, folder: Path) -> list[str]:
    """What was found and where it is, line by line, for people."""
    names, seen = result["class_names"], result["preprocessing"]
    listed = ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ... {names[-1]}"
    lines = [
        f"import {result['kind']}: {result['architecture']}",
        *(f"  {line}" for line in result.get("found", [])),
        f"  parameters     {result['num_parameters'] / 1e6:.2f} M",
        f"  classes        {len(names)}: {listed}" if names else "  classes        none",
        f"  preprocessing  {seen['image_size']} pixels, crop ratio {seen['crop_ratio']:g}, {seen['interpolation']}, "
        f"mean {_said(seen['mean'])}, std {_said(seen['std'])}",
        f"  {result['made']:<14} {folder / PLACES[result['made']]}",
    ]
    lines += [f"  note: {note}" for note in result["notes"]]
    return lines


def run_file_lines(result: Result, folder: Path) -> str:
    """The YAML by which a run file takes the teacher; `data` has more in it, and is added to."""
    seen, names = result["preprocessing"], result["class_names"]
    data: dict[str, Any] = {"image_size": seen["image_size"], "crop_ratio": seen["crop_ratio"]}
    if seen["interpolation"] != "bilinear":
        data["interpolation"] = seen["interpolation"]
    if list(seen["mean"]) != [0, 0, 0] or list(seen["std"]) != [1, 1, 1]:
        data |= {"mean": list(seen["mean"]), "std": list(seen["std"])}
    if 0 < len(names) <= _SHORT_LIST:
        data["class_names"] = list(names)
    kind = {"teacher": "onnx", "classifier": "checkpoint", "pretrained": "checkpoint"}[result["made"]]
    path = folder / PLACES["pretrained"] if result["made"] == "pretrained" else folder
    tree = {"import": {"kind": kind, "path": str(path)}, "data": data}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def _said(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
