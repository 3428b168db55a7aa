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
    pending = path.with_name(f".{TUNING}.pending")
    pending.write_text(tuning.model_dump_json(indent=1) + "\n", encoding="utf-8")
    pending.replace(path)
    return path


def tuned_settings(settings: TeacherExportSettings, run_dir: Path) -> TeacherExportSettings:
    """`settings` with what was tuned for this teacher; a field that the run file sets to anything but its default stays as it is.

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
    fixed = fixed_fields(settings.repository)
    taken = {name: value for name, value in tuning.chosen.items() if name in TUNED_FIELDS and name not in fixed}
    tree = {**settings.repository.model_dump(), **taken}
    return settings.replace(repository=validate(RepositorySettings, tree, origin=str(path)))


def fixed_fields(settings: RepositorySettings) -> list[str]:
    """What tuning could decide and the run file has decided: set to anything but its default."""
    defaults = RepositorySettings()
    return [name for name in TUNED_FIELDS if getattr(settings, name) != getattr(defaults, name)]
