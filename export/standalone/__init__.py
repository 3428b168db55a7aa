"""The program that travels with a student: it needs the file's runtime, Pillow and numpy, and nothing of ours. It is copied as it is."""

from __future__ import annotations

from pathlib import Path

from export.files import write_atomically

PROGRAM = "run_student.py"
"""Runs the files of every runtime that runs here."""


def write_standalone(out_dir: Path) -> None:
    """Copy it into the student's folder."""
    write_atomically(out_dir / PROGRAM, (Path(__file__).parent / PROGRAM).read_bytes())
