"""Programs that travel with a student and need its runtime, Pillow and numpy, and nothing of ours. They are copied as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export.edge import EdgeFile
from export.files import write_atomically
from export.runtimes.runtime import RuntimeName

PROGRAMS: dict[RuntimeName, str] = {
    "onnxruntime": "run_student.py",
    "openvino": "run_student_openvino.py",
    "executorch": "run_student_executorch.py",
}
"""Runtime -> the program that runs its files."""


def write_standalone(files: Sequence[EdgeFile], out_dir: Path) -> list[Path]:
    """Copy the program of every runtime that has a file which is shipped; returns where they are."""
    for program in PROGRAMS.values():
        (out_dir / program).unlink(missing_ok=True)
    written = []
    for runtime in dict.fromkeys(file.runtime for file in files if file.shipped):
        path = out_dir / PROGRAMS[runtime]
        write_atomically(path, (Path(__file__).parent / PROGRAMS[runtime]).read_bytes())
        written.append(path)
    return written
