"""What `distill tune` found for a run, and how the run uses it: `tuning.json` in the run folder.

Flow: `distill tune` writes it -> whoever writes the teacher's Triton configuration takes it in place of the defaults.
Unit of data: one tuning of one teacher.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from distill.config import Section, validate
from distill.errors import ConfigError
from distill.progress import console
from export.files import write_atomically
from export.settings import RepositorySettings, TeacherExportSettings

TUNING = "tuning.json"
TUNED_FIELDS = (
    "preferred_batch_sizes",
    "max_queue_delay_us",
    "max_queue_size",
    "instance_count",
    "intra_op_threads",
    "warmup_batch_sizes",
)
"""Fields of `RepositorySettings` that tuning decides."""


class Tuning(Section):
    """What was measured and what was decided from it."""

    model: str
    """Name of the teacher in the repository."""
    fingerprint: str
    """The teacher that was measured."""
    max_p99_ms: float = Field(gt=0)
    """The latency limit, in ms."""
    num_cores: int = Field(ge=1)
    """Cores that could be used."""
    chosen: dict[str, Any]
    """Fields of `teacher.repository` and their tuned values."""
    table: list[dict[str, Any]]
    """All candidates, as measured; see `teacher_server.tuning.Measured`."""


def write_tuning(run_dir: Path, tuning: Tuning) -> Path:
    """Write it in one step."""
    path = run_dir / TUNING
    write_atomically(path, (tuning.model_dump_json(indent=1) + "\n").encode())
    return path


def tuned_settings(settings: TeacherExportSettings, run_dir: Path, fingerprint: str) -> TeacherExportSettings:
    """`settings` with what was tuned for this teacher on this many cores; a field that the run file sets stays as it is.

    A tuning of another teacher, or of a machine with more or fewer cores, is left alone, and said to be.

    Args:
        settings: of the run file.
        run_dir: where `tuning.json` lies, if there is one.
        fingerprint: of the teacher that is to be run.

    Raises:
        ConfigError: `tuning.json` cannot be read.
    """
    path = run_dir / TUNING
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return settings
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}; remove it, or run `distill tune` again") from error
    tuning = validate(Tuning, tree, origin=str(path))
    if tuning.model != settings.name:
        return settings
    if (tuning.fingerprint, tuning.num_cores) != (fingerprint, cores := _usable_cores()):
        console.print(
            f"  {path} is not used: it was measured for teacher {tuning.fingerprint[:12]} on {tuning.num_cores} core(s), this is"
            f" {fingerprint[:12]} on {cores}; `distill tune` measures anew",
            markup=False,
        )
        return settings
    fixed = fixed_fields(settings.repository)
    taken = {name: value for name, value in tuning.chosen.items() if name in TUNED_FIELDS and name not in fixed}
    tree = {**settings.repository.model_dump(exclude_unset=True), **taken}
    return settings.replace(repository=validate(RepositorySettings, tree, origin=str(path)))


def fixed_fields(settings: RepositorySettings) -> list[str]:
    """What tuning could decide and the run file has decided, be it as the default is."""
    return [name for name in TUNED_FIELDS if name in settings.model_fields_set]


def _usable_cores() -> int:
    from teacher_server.tuning import usable_cores  # brings Triton's client: only where there is a tuning

    return usable_cores()
